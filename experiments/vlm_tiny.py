"""python -m starflow2_jax.train --config experiments/vlm_tiny.py --workdir runs/vlm_tiny

A small vision-language model with the architecture of Qwen2.5-VL, its own tower and tokenizer. It
is trained on the shapes benchmark: captions, questions, dialogs, several images, text. STARFlow2's
`tiny` variants build on it. Data and tokenizer (python -m starflow2_jax.prepare ...):
    import --format shapes --pixels 64 --withheld leave_out --tasks TASKS --n N --seed S --out OUT
        OUT                      TASKS                                              N      S
        data_cache/vlm_caption   caption                                            15000  7
        data_cache/vlm_dialog    dialog                                             40000  0
        data_cache/vlm_quiz      quiz                                               40000  0
        data_cache/vlm_mixed     caption,question,multi,text                        40000  0
        data_cache/vlm_test      question                                           1000   1
        data_cache/vlm_words     caption,question,dialog,quiz,edit,reason,multi,text,t2i 4000 0
    tokenizer --data data_cache/vlm_words --vocabulary 640 --tower_patch 8 --tower_merge 1 \\
        --out data_cache/tokenizer
Variants:
    tower  first: the vision tower alone, by the words of each patch's region and by pixels
           (runs/vlm_tower)
    tiny   then the language model, from that run, with its tower frozen
    blind  the same on gray images, as a baseline that uses text alone
"""

import dataclasses

from starflow2_jax import config
from starflow2_jax.models import qwen_vision, starflow2

# The VLM of the tiny STARFlow2, with its tower.
MODEL = dataclasses.replace(
    starflow2.preset("tiny").vlm,
    vision=qwen_vision.VisionConfig(
        depth=4,
        width=96,
        heads=4,
        mlp_width=288,
        out_width=128,
        full_layers=(1, 2, 3),
        patch=8,
        merge=1,
        window=32,
    ),
)


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"vlm_{variant}", "vlm"
    cfg.model.update(dataclasses.asdict(MODEL))
    cfg.image.pixels = 64
    cfg.text.tokenizer, cfg.text.length, cfg.text.images = "data_cache/tokenizer", 288, 3
    cfg.data.mixture = (
        # Captions teach the first step: naming what is seen, in order.
        {"path": "data_cache/vlm_caption", "weight": 2.0},
        # A quiz has the most targets per row; dialogs ask as users do.
        {"path": "data_cache/vlm_quiz", "weight": 4.0},
        {"path": "data_cache/vlm_dialog", "weight": 1.0},
        {"path": "data_cache/vlm_mixed", "weight": 1.0},
    )
    cfg.eval_data.path = "data_cache/vlm_test"
    cfg.noise.kind = "none"
    cfg.cfg_dropout.text = 0.0
    cfg.train.trainable = ("vlm", "pixel_probe")
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 2400, 0.998
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1.5e-3, 1e-5, 150
    # With AdamW alone the tower did not distinguish shapes after a hundred thousand images.
    cfg.optim.muon_lr, cfg.optim.b2, cfg.optim.weight_decay = 1e-2, 0.98, 0.01
    cfg.sample.every = 0
    cfg.log.every = 20
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 200, 128, 16
    cfg.checkpoint.every = 200
    {"tower": _tower, "tiny": _tiny, "blind": _blind}[variant](cfg)
    return cfg


def _tower(cfg):
    cfg.data.mixture = ({"path": "data_cache/vlm_caption", "weight": 1.0},)
    cfg.eval_data.path = ""
    cfg.text.images = 1
    cfg.vlm.text_loss_weight, cfg.vlm.region_loss_weight, cfg.vlm.pixel_loss_weight = 0.0, 1.0, 10.0
    cfg.train.batch_size, cfg.train.steps = 64, 1200
    cfg.optim.warmup, cfg.log.every = 100, 20


def _tiny(cfg):
    cfg.init["from"] = "runs/vlm_tower"
    # Training on answers would make the tower forget shapes, and the latent codec needs its pixels.
    cfg.vlm.train_tower, cfg.vlm.region_loss_weight, cfg.vlm.pixel_loss_weight = False, 0.3, 0.0


def _blind(cfg):
    _tiny(cfg)
    cfg.data.blank_images = cfg.eval_data.blank_images = True
    cfg.train.steps = 600

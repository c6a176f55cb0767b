"""python -m starflow2_jax.train --config experiments/vlm_tiny.py --workdir runs/vlm_tiny

A small vision-language model of Qwen2.5-VL's shape, with its own tower and tokenizer, that reads
the shapes world: captions, questions, dialogs, several pictures, text. STARFlow2's `tiny` stands on
it. Data and tokenizer, in half of which every picture is asked several times:
    python -m starflow2_jax.prepare import --format shapes --pixels 64 --withheld leave_out \\
        --tasks dialog --n 40000 --seed 0 --out data_cache/vlm_dialog
    python -m starflow2_jax.prepare import --format shapes --pixels 64 --withheld leave_out \\
        --tasks caption,question,multi,text --n 40000 --seed 0 --out data_cache/vlm_mixed
    python -m starflow2_jax.prepare import --format shapes --pixels 64 --withheld leave_out \\
        --tasks question --n 1000 --seed 1 --out data_cache/vlm_test
    python -m starflow2_jax.prepare import --format shapes --pixels 64 --withheld leave_out \\
        --tasks caption,question,dialog,edit,reason,multi,text,t2i --n 4000 \\
        --out data_cache/vlm_words
    python -m starflow2_jax.prepare tokenizer --data data_cache/vlm_words --vocabulary 640 \\
        --tower_patch 8 --tower_merge 1 --out data_cache/tokenizer
Variants:
    tiny   about half an hour on 2 cores
    blind  the same without seeing: grey pictures; what words alone can tell
"""

import dataclasses

from starflow2_jax import config
from starflow2_jax.models import qwen, qwen_vision

MODEL = qwen.Config(
    vocab=640,
    width=128,
    layers=4,
    heads=4,
    kv_heads=2,
    mlp_width=384,
    sections=(4, 6, 6),
    # So small that columns turn far enough over 8 of them.
    rope_base=50.0,
    tied=True,
    # In the order of `data.tokenizer.SPECIAL`.
    vision_start_token=3,
    vision_end_token=4,
    image_token=5,
    video_token=6,
    vision=qwen_vision.VisionConfig(
        depth=4,
        width=96,
        heads=4,
        mlp_width=288,
        out_width=128,
        full_layers=(1, 3),
        patch=8,
        merge=1,
        window=32,
    ),
)


def get_config(variant: str = "tiny"):
    """The resolved configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"vlm_{variant}", "vlm"
    cfg.model.update(dataclasses.asdict(MODEL))
    cfg.image.pixels = 64
    cfg.text.tokenizer, cfg.text.length, cfg.text.images = "data_cache/tokenizer", 288, 3
    cfg.data.mixture = (
        {"path": "data_cache/vlm_dialog", "weight": 2.0},
        {"path": "data_cache/vlm_mixed", "weight": 1.0},
    )
    cfg.eval_data.path = "data_cache/vlm_test"
    cfg.vlm.reconstruction = 0.5
    cfg.noise.kind = "none"
    cfg.drop.condition = 0.0
    cfg.train.trains = ("vlm", "pixel_probe")
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 3000, 0.998
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1.5e-3, 1e-5, 150
    cfg.optim.weight_decay = 0.01
    cfg.sample.every = 0
    cfg.log.every = 20
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 200, 128, 16
    cfg.checkpoint.every = 200
    {"tiny": lambda _: None, "blind": _blind}[variant](cfg)
    return cfg


def _blind(cfg):
    cfg.data.blank = cfg.eval_data.blank = True
    cfg.train.steps = 1000

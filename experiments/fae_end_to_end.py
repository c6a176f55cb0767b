"""python -m starflow2_jax.train --config experiments/fae_end_to_end.py:tiny --workdir runs/fae

The latent codec in one training: tower, encoder and decoders learn pixels through latent noise, so
that what an image needs survives the noise of a flow's training. A larger model tunes a trained
codec in the same way: --config.init.fae=FOLDER, with train.trainable=encoder,feature_decoder,
pixel_decoder,latent for a frozen tower.
Variants:
    tiny    64x64 images of any content, 16 channels for each of 8x8 tokens. CPU.
            Data: launch/data_wide.sh (procedural images, shapes, emoji, photographs)
    longer  the same from runs/fae, with more objects in the shapes (launch/data_tiny.sh)
"""

import dataclasses

from starflow2_jax import config
from starflow2_jax.models import qwen_vision
from starflow2_jax.models.fae import codec

TOWER = qwen_vision.VisionConfig(
    depth=4,
    width=160,
    heads=5,
    mlp_width=424,
    out_width=160,
    full_layers=(0, 1, 2, 3),
    patch=8,
    merge=1,
    window=64,
)


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"fae_end_to_end_{variant}", "fae_end_to_end"
    {"tiny": _tiny, "longer": _longer}[variant](cfg)
    return cfg


def _tiny(cfg):
    model = codec.preset(
        "tiny",
        feature_width=160,
        encoder_heads=4,
        encoder_head_dim=40,
        decoder_layers=1,
        decoder_heads=5,
        decoder_mlp=424,
        pixel_layers=4,
        pixel_width=160,
        pixel_heads=5,
        pixel_mlp=424,
    )
    cfg.model.update(dataclasses.asdict(model))
    cfg.image.pixels, cfg.image.flip = model.pixels, True
    cfg.teacher.kind = "qwen"
    cfg.teacher.tower = dataclasses.asdict(TOWER)
    cfg.train.trainable = ("teacher", "encoder", "feature_decoder", "pixel_decoder", "latent")
    cfg.data.mixture = (
        {"path": "data_cache/procedural64", "weight": 0.2},
        {"path": "data_cache/shapes64", "weight": 0.5},
        {"path": "data_cache/emoji64", "weight": 0.2},
        {"path": "data_cache/cifar64", "weight": 0.1},
    )
    cfg.eval_data.path = "data_cache/shapes64_test"
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 32, 2500, 0.995
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 2e-3, 1e-5, 100
    cfg.optim.muon_lr, cfg.optim.b2, cfg.optim.weight_decay = 1e-2, 0.99, 0.0
    cfg.fae.l1, cfg.fae.l2, cfg.fae.gan, cfg.fae.perceptual = 1.0, 1.0, 0.0, 0.0
    # Without it the outlines of small objects are the last thing that the codec learns.
    cfg.fae.gradient = 1.0
    cfg.fae.latent_noise, cfg.fae.beta, cfg.fae.statistics_decay = 0.35, 1e-7, 0.995
    cfg.sample.every, cfg.sample.count = 500, 48
    cfg.evaluate.every, cfg.evaluate.rows = 500, 200
    cfg.checkpoint.every = 250


def _longer(cfg):
    _tiny(cfg)
    cfg.init.fae, cfg.seed = "runs/fae", 1
    cfg.data.mixture = (
        {"path": "data_cache/procedural64", "weight": 0.15},
        {"path": "data_cache/t2i64", "weight": 0.55},
        {"path": "data_cache/emoji64", "weight": 0.2},
        {"path": "data_cache/cifar64", "weight": 0.1},
    )
    # The latents are local; these tell every token what the image holds and where.
    cfg.model.frequency_gain, cfg.model.gain_frequencies = 5.0, 2
    cfg.train.steps = 2400
    cfg.optim.lr, cfg.optim.muon_lr = 1e-3, 6e-3

"""python -m starflow2_jax.train --config experiments/fae_features.py:tiny --workdir runs/fae_features

The latent codec FAE, first training: encoder and feature decoder, from a frozen tower's features.
Variants:
    tiny   64x64 shapes and the shipped Qwen-style tower (teacher.path=pretrained/vlm_tiny; without a
           path the tower is drawn from the seed). The latents have little noise, which limits what
           they keep of the features; the pixel decoder learns to tolerate more.
           Data: prepare import --format shapes --pixels 64 --tasks t2i --n 40000 --withheld leave_out
    paper  256x256 images, seen at 224 pixels by DINOv2-g/14 (arXiv 2512.07829). Accelerators only.
           Data: prepare import of 256x256 images; --config.teacher.path=FOLDER of the tower
"""  # noqa: E501

import dataclasses

from starflow2_jax import config
from starflow2_jax.models.fae import codec


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"fae_features_{variant}", "fae_features"
    model = codec.preset(variant)
    cfg.model.update(dataclasses.asdict(model))
    cfg.image.pixels, cfg.image.flip = model.pixels, True
    cfg.train.trainable = ("encoder", "feature_decoder", "latent")
    cfg.optim.b2, cfg.optim.weight_decay = 0.999, 0.0
    cfg.sample.every = 0
    {"tiny": _tiny, "paper": _paper}[variant](cfg)
    return cfg


def _tiny(cfg):
    cfg.data.path, cfg.eval_data.path = "data_cache/t2i64", "data_cache/t2i64_test"
    cfg.teacher.kind, cfg.teacher.path = "qwen", "pretrained/vlm_tiny"
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 32, 1200, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 2e-3, 1e-5, 50
    cfg.optim.muon_lr = 1e-2
    cfg.fae.statistics_decay, cfg.fae.latent_noise, cfg.fae.beta = 0.99, 0.1, 1e-7
    cfg.evaluate.every, cfg.evaluate.rows = 400, 200
    cfg.checkpoint.every = 200


def _paper(cfg):
    cfg.teacher.pixels = 224
    cfg.compute_dtype, cfg.layout, cfg.mesh = "bfloat16", "fsdp", "fsdp=-1"
    cfg.data.path, cfg.eval_data.path = "data_cache/images256", "data_cache/images256_test"
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 1024, 1_000_000, 0.9999
    cfg.optim.lr, cfg.optim.warmup = 1e-4, 1000
    cfg.evaluate.every = cfg.checkpoint.every = 10_000
    cfg.evaluate.rows, cfg.log.every = 50_000, 100

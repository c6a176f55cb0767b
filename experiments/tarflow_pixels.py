"""python -m starflow2_jax.train --config experiments/tarflow_pixels.py:tiny --workdir runs/tiny

TarFlow on pixels. Variants:
    tiny   16x16 shapes, one object each, conditioned on color and shape; a few minutes on 2 cores.
           Data: prepare import --format shapes --pixels 16 --tags single_object --label pair
    cifar  32x32 photographs, conditioned on the class; about 10 minutes on 2 cores.
           Data: prepare import --format webdataset --label caption
    in64   64x64 ImageNet, unconditional, the recipe of the published 2.99 bits/dim
           (arXiv 2412.06329): 256 rows, 200 epochs, uniform dequantization. Accelerators only.
           Data: prepare import of 64x64 images (box-downsampled ILSVRC 2012)
"""

from starflow2_jax import config


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name = f"tarflow_pixels_{variant}"
    # A TarFlow has no start token, learned positions and an exponential scale.
    cfg.model.update({"start": "shift", "positions": "learned", "scale": "exp"})
    cfg.train.trainable = ("flow",)
    cfg.loss.latent_penalty = 0.0
    cfg.sample.guidance_rule = "linear_log_scale"
    {"tiny": _tiny, "cifar": _cifar, "in64": _in64}[variant](cfg)
    return cfg


def _pixels(cfg, pixels, patch):
    cfg.image.pixels, cfg.image.patch = pixels, patch
    cfg.model.side, cfg.model.channels = pixels // patch, 3 * patch**2


def _tiny(cfg):
    # Within a token a block only scales and shifts: patches of 4 would blur edges.
    _pixels(cfg, 16, 2)
    cfg.model.update({"width": 192, "layers": (2, 2, 2, 2), "head_dim": 64, "classes": 64})
    cfg.data.path, cfg.eval_data.path = "data_cache/shapes16", "data_cache/shapes16_test"
    cfg.data.labels = cfg.eval_data.labels = True
    cfg.noise.sigma = 0.05
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 64, 700, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1.5e-3, 1e-5, 30
    cfg.sample.every, cfg.sample.count, cfg.sample.guidance = 100, 48, 1.0
    cfg.evaluate.every, cfg.evaluate.rows = 100, 500
    cfg.checkpoint.every = 100


def _cifar(cfg):
    _pixels(cfg, 32, 4)
    cfg.model.update({"width": 256, "layers": (2, 2, 2, 2), "head_dim": 64, "classes": 10})
    cfg.data.path, cfg.eval_data.path = "data_cache/cifar10_train", "data_cache/cifar10_test"
    cfg.data.labels = cfg.eval_data.labels = True
    cfg.image.flip = True
    cfg.noise.sigma = 0.05
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 64, 600, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-3, 1e-5, 50
    cfg.sample.every, cfg.sample.count, cfg.sample.guidance = 200, 40, 1.5
    cfg.evaluate.every, cfg.evaluate.rows = 100, 1000
    cfg.checkpoint.every = 100


def _in64(cfg):
    _pixels(cfg, 64, 2)
    cfg.model.update({"width": 768, "layers": (8,) * 8, "head_dim": 64, "remat": "full"})
    cfg.compute_dtype, cfg.layout = "bfloat16", "fsdp"
    cfg.mesh = "fsdp=-1"
    cfg.data.path, cfg.eval_data.path = "data_cache/imagenet64_train", "data_cache/imagenet64_val"
    cfg.noise.kind = "uniform"
    cfg.cfg_dropout.text = 0.0
    # 200 epochs of 1,281,167 images.
    cfg.train.batch_size, cfg.train.steps = 256, 200 * 1_281_167 // 256
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-4, 1e-6, 5000
    cfg.sample.every = cfg.evaluate.every = cfg.checkpoint.every = 10_000
    cfg.evaluate.rows = 50_000
    cfg.log.every = 100

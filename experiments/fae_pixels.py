"""python -m starflow2_jax.train --config experiments/fae_pixels.py:tiny --config.init.fae=runs/fae_features --workdir runs/fae_pixels

The latent codec FAE, second training: pixels from the noisy features of a tower. `init.fae` names the
run of `fae_features.py`, whose encoder, feature decoder and tower are used. To continue on decoded
features, run it again with --config.fae.train_on_decoded_features --config.init.from=runs/fae_pixels
and another workdir. --config.fae.lpips=FILE names a safetensors file of LPIPS or VGG16; without it
the perceptual distance compares features of the tower.
Variants:
    tiny   64x64 shapes, from the start on decoded features with latent noise 0.2, by L1 and L2 alone.
           Flat shapes have no texture that a discriminator or a perceptual distance could restore;
           both cost PSNR, and steps that a CPU cannot afford.
    paper  256x256 images (arXiv 2512.07829); accelerators only.
"""  # noqa: E501

import dataclasses

from starflow2_jax import config
from starflow2_jax.models.fae import codec


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"fae_pixels_{variant}", "fae_pixels"
    model = codec.preset(variant)
    cfg.model.update(dataclasses.asdict(model))
    cfg.image.pixels, cfg.image.flip = model.pixels, True
    cfg.train.trainable = ("pixel_decoder", "discriminator", "lecam")
    cfg.optim.b2, cfg.optim.weight_decay = 0.999, 0.0
    cfg.fae.l1 = 1.0
    {"tiny": _tiny, "paper": _paper}[variant](cfg)
    return cfg


def _tiny(cfg):
    cfg.data.path, cfg.eval_data.path = "data_cache/t2i64", "data_cache/t2i64_test"
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 32, 4500, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 2e-3, 1e-5, 50
    cfg.optim.muon_lr = 1e-2
    cfg.fae.train_on_decoded_features, cfg.fae.latent_noise = True, 0.2
    cfg.fae.gan, cfg.fae.perceptual = 0.0, 0.0
    # Declared all the same, so that --config.fae.gan=0.1 is enough to turn it on.
    cfg.fae.discriminator_widths, cfg.fae.gan_start = (32, 64, 128), 1000
    cfg.sample.every, cfg.sample.count = 400, 48
    cfg.evaluate.every, cfg.evaluate.rows = 400, 200
    cfg.checkpoint.every = 200


def _paper(cfg):
    cfg.teacher.pixels = 224
    cfg.compute_dtype, cfg.layout, cfg.mesh = "bfloat16", "fsdp", "fsdp=-1"
    cfg.data.path, cfg.eval_data.path = "data_cache/images256", "data_cache/images256_test"
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 512, 1_000_000, 0.9999
    cfg.optim.lr, cfg.optim.warmup = 1e-4, 1000
    cfg.fae.latent_noise, cfg.fae.gan_start = 0.3, 50_000
    cfg.sample.every = cfg.evaluate.every = cfg.checkpoint.every = 10_000
    cfg.evaluate.rows, cfg.log.every = 50_000, 100

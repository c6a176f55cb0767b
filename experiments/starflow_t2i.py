"""python -m starflow2_jax.train --config experiments/starflow_t2i.py:tiny --workdir runs/starflow

STARFlow, text to image. Variants:
    tiny  32x32 shapes as 4x4 pixel patches, captions as bytes with a trained embedding.
          Data: prepare import --format shapes
    3b    the released 3,858,281,544-parameter configuration at 256x256: SD-VAE latents [1024, 4]
          and T5-XL features [128, 2048] from records. Accelerators only.
          Data: prepare import of 256x256 images with captions, then prepare features
"""

from starflow2_jax import config


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name = f"starflow_t2i_{variant}"
    cfg.model.update({"order": "L2R", "soft_clip": 4.0, "final_norm": True})
    cfg.image.channel_order = "channel_last"
    {"tiny": _tiny, "3b": _3b}[variant](cfg)
    return cfg


def _tiny(cfg):
    cfg.image.pixels, cfg.image.patch = 32, 4
    cfg.model.update(
        {
            "side": 8, "channels": 48, "width": 192, "layers": (1, 1, 1, 5), "head_dim": 64,
            "text_channels": 64, "text_length": 80,
        }
    )  # fmt: skip
    cfg.text.vocabulary = 257
    cfg.train.trainable = ("flow", "text")
    cfg.data.path, cfg.eval_data.path = "data_cache/shapes32_t2i", "data_cache/shapes32_t2i_test"
    cfg.data.text = cfg.eval_data.text = "bytes"
    cfg.noise.sigma = 0.05
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 64, 500, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-3, 1e-5, 30
    cfg.sample.every, cfg.sample.count, cfg.sample.guidance = 100, 24, 2.0
    cfg.evaluate.every, cfg.evaluate.rows = 100, 500
    cfg.checkpoint.every = 100


def _3b(cfg):
    cfg.model.update(
        {
            "side": 32, "channels": 4, "width": 3072, "layers": (2, 2, 2, 2, 2, 24),
            "text_channels": 2048, "text_length": 128, "remat": "full",
        }
    )  # fmt: skip
    cfg.compute_dtype, cfg.layout, cfg.mesh = "bfloat16", "fsdp", "fsdp=-1"
    cfg.data.path, cfg.data.latents = "data_cache/t2i", "data_cache/t2i_features"
    cfg.data.features, cfg.data.text = "data_cache/t2i_features", "features"
    cfg.noise.sigma = 0.3
    # 400 M images, a batch of 1,024 at 6.4e-5 (the released configuration).
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 1024, 390_625, 0.9999
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 6.4e-5, 1e-6, 5000
    cfg.sample.every, cfg.sample.guidance = 5000, 4.0
    cfg.evaluate.every, cfg.checkpoint.every, cfg.log.every = 5000, 5000, 100

"""python -m starflow2_jax.train --config experiments/stage1_t2i.py:tiny --workdir runs/stage1

STARFlow2, stage 1: text to image. The flows are trained behind a frozen VLM that reads only text;
adapter and skips are off (arXiv 2605.08029). Variants:
    tiny   8x8x16 latents of 64-pixel shapes, the VLM of experiments/vlm_tiny.py. CPU.
    small  256-pixel images, Qwen2.5-VL-3B, a flow of 0.2 B. A few accelerators.
    paper  256-pixel images, Qwen2.5-VL-7B, 3.637 B trained parameters. Many accelerators.
Data: tiny uses the output of launch/data_tiny.sh, images and latents. The others need
prepare import of images with captions, then prepare latents, and --config.vlm.path=FOLDER of the
published VLM.
"""

from starflow2_jax import config
from starflow2_jax.models import starflow2


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"stage1_t2i_{variant}", "starflow2"
    cfg.model.update(starflow2.options(starflow2.preset(variant)))
    cfg.train.trainable = ("shallow", "deep")
    cfg.noise.sigma, cfg.cfg_dropout.text = 0.3, 0.1
    cfg.noise.context_sigma = 0.0
    cfg.sample.every, cfg.sample.denoise = 0, False
    {"tiny": _tiny, "small": _small, "paper": _paper}[variant](cfg)
    return cfg


def _tiny(cfg):
    cfg.vlm.path, cfg.fae.path = "pretrained/vlm_tiny", "pretrained/fae_tiny"
    cfg.data.path, cfg.eval_data.path = "data_cache/t2i64", "data_cache/t2i64_test"
    cfg.data.latents, cfg.eval_data.latents = (
        "data_cache/t2i64_latents",
        "data_cache/t2i64_test_latents",
    )
    cfg.data.packing = "mixture"
    cfg.text.length, cfg.text.images = 176, 2
    cfg.text.vlm_positions = 48  # two prompts of at most 21 positions each
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 500, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-3, 1e-5, 50
    cfg.optim.muon_lr = 1e-2
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 250, 128, 16
    cfg.checkpoint.every = cfg.sample.every = 250
    cfg.sample.guidance, cfg.sample.denoise, cfg.sample.image_temperature = 1.0, True, 0.2


def _large(cfg):
    cfg.compute_dtype, cfg.frozen_dtype = "bfloat16", "bfloat16"
    cfg.layout, cfg.mesh = "fsdp", "fsdp=-1"
    cfg.model.flow.remat = cfg.model.vlm.remat = "full"
    cfg.data.path, cfg.data.latents = "data_cache/t2i", "data_cache/t2i_latents"
    cfg.eval_data.path = "data_cache/t2i_test"
    cfg.eval_data.latents = "data_cache/t2i_test_latents"
    # An image takes 258 positions, its caption about 100. Splash attention needs multiples of 128.
    cfg.text.length, cfg.text.images = 1536, 4
    cfg.optim.lr, cfg.optim.final_lr = 1e-4, 1e-6
    cfg.train.ema, cfg.log.every = 0.9999, 100
    cfg.evaluate.every, cfg.checkpoint.every = 5000, 5000


def _small(cfg):
    _large(cfg)
    cfg.sample.every = 5000
    cfg.train.batch_size, cfg.train.steps, cfg.optim.warmup = 64, 150_000, 1000


def _paper(cfg):
    _large(cfg)
    # No sample grids: one device would have to hold all 30 GB of weights twice.
    # 800 M pairs, four per row: a batch of 1,024 images.
    cfg.train.batch_size, cfg.train.steps, cfg.optim.warmup = 256, 780_000, 5000

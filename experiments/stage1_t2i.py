"""python -m starflow2_jax.train --config experiments/stage1_t2i.py:tiny --workdir runs/stage1

STARFlow2, stage 1: text to image. The flows are trained behind a frozen VLM that reads only text;
adapter and skips are off (arXiv 2605.08029). Variants:
    tiny     8x8x16 latents of 64-pixel shapes, the VLM of experiments/vlm_tiny.py. CPU.
    shipped  the same model, trained for hours, also on emoji and photographs. CPU.
    small    256-pixel images, Qwen2.5-VL-3B, a flow of 0.2 B. A few accelerators.
    paper    256-pixel images, Qwen2.5-VL-7B, 3.637 B trained parameters. Many accelerators.
The CPU variants train on edits and copies of shapes, too. Data: tiny uses the output of
launch/data_tiny.sh, images and latents; shipped that of launch/data_wide.sh, too. The others need
prepare import of images with captions, then prepare latents, and --config.vlm.path=FOLDER of the
published VLM.
"""

from starflow2_jax import config
from starflow2_jax.models import starflow2


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"stage1_t2i_{variant}", "starflow2"
    model = starflow2.preset("tiny" if variant == "shipped" else variant)
    cfg.model.update(starflow2.options(model))
    cfg.train.trainable = ("shallow", "deep")
    cfg.noise.sigma, cfg.cfg_dropout.text = 0.3, 0.1
    cfg.noise.context_sigma = 0.0
    cfg.sample.every, cfg.sample.denoise = 0, False
    {"tiny": _tiny, "shipped": _shipped, "small": _small, "paper": _paper}[variant](cfg)
    return cfg


def _mixture(suffix, **weights):
    """Return dataset folders of 64-pixel images with their latents and their weights."""
    paths = {name: f"data_cache/{name}64{suffix}" for name in weights}
    return tuple(
        {"path": path, "weight": weights[name], "latents": f"{path}_latents"}
        for name, path in paths.items()
    )


def _tiny(cfg):
    cfg.vlm.path, cfg.fae.path = "pretrained/vlm_tiny", "pretrained/fae_tiny"
    # Edits and copies from the start: a flow that has learned to draw without looking at a source
    # learns to copy much later.
    cfg.data.mixture = _mixture("", t2i=0.65, edit=0.3, copy=0.05)
    cfg.eval_data.mixture = _mixture("_test", t2i=1.0, edit=1.0)
    cfg.data.packing = "mixture"
    # A row has room for an edit (153 positions) and a prompt with its image (84).
    cfg.text.length, cfg.text.images = 256, 3
    cfg.text.vlm_positions = 128
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 500, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-3, 1e-5, 50
    cfg.optim.muon_lr = 1e-2
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 250, 128, 16
    cfg.checkpoint.every = cfg.sample.every = 250
    cfg.sample.guidance, cfg.sample.denoise, cfg.sample.image_temperature = 1.0, True, 0.2


def _shipped(cfg):
    _tiny(cfg)
    cfg.data.mixture = _mixture("", t2i=0.55, edit=0.3, copy=0.05, emoji_white=0.05, cifar=0.05)
    cfg.eval_data.mixture = _mixture("_test", t2i=1.0, edit=1.0, emoji_white=1.0)
    cfg.train.steps, cfg.train.ema, cfg.optim.warmup = 4000, 0.998, 200
    cfg.evaluate.every = cfg.sample.every = 1000


def _large(cfg):
    cfg.compute_dtype, cfg.frozen_dtype = "bfloat16", "bfloat16"
    # Every device stores the frozen VLM; docs/planning.md compares the layouts.
    cfg.layout, cfg.mesh, cfg.frozen_layout = "fsdp", "fsdp=-1", "dp"
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
    # On TPUs, an fsdp axis across the whole slice would be gathered at twice the bytes.
    cfg.mesh = "data=2,fsdp=-1"
    # No sample grids: one device would have to hold all 30 GB of weights twice.
    # 800 M pairs, four per row: a batch of 1,024 images.
    cfg.train.batch_size, cfg.train.steps, cfg.optim.warmup = 256, 780_000, 5000

"""python -m starflow2_jax.train --config experiments/stage2_i2t.py:tiny --workdir runs/stage2

STARFlow2, stage 2: image to text. The adapter learns to feed the output of the frozen shallow flow
to the frozen VLM; the deep flow does not run (arXiv 2605.08029). It starts from stage 1.
Variants, as in stage1_t2i.py, with their trained parameters:
    tiny     18.7 K
    shipped  18.7 K
    small    4.26 M
    paper    12.97 M
Data: tiny and shipped use the output of launch/data_tiny.sh, images and latents. The others need
prepare import of images with captions, questions and answers, then prepare latents.
--config.init.from=WORKDIR of stage 1; --config.vlm.path as in stage 1.
"""

from starflow2_jax import config
from starflow2_jax.models import starflow2


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"stage2_i2t_{variant}", "starflow2"
    model = starflow2.preset("tiny" if variant == "shipped" else variant)
    cfg.model.update(starflow2.options(model))
    cfg.train.trainable = ("adapter",)
    # The noise of stages 1 and 3, whose latents the adapter reads.
    cfg.noise.sigma, cfg.cfg_dropout.text = 0.3, 0.0
    cfg.noise.context_sigma = 0.0
    cfg.init["from"] = "runs/stage1"
    cfg.sample.every, cfg.sample.denoise = 0, False
    {"tiny": _tiny, "shipped": _shipped, "small": _small, "paper": _paper}[variant](cfg)
    return cfg


def _tiny(cfg):
    cfg.vlm.path, cfg.fae.path = "pretrained/vlm_tiny", "pretrained/fae_tiny"
    cfg.data.path, cfg.eval_data.path = "data_cache/i2t64", "data_cache/i2t64_test"
    cfg.data.latents, cfg.eval_data.latents = (
        "data_cache/i2t64_latents",
        "data_cache/i2t64_test_latents",
    )
    cfg.data.packing = "mixture"
    cfg.text.length, cfg.text.images = 256, 2
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 100, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 2e-3, 2e-5, 50
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 50, 128, 16
    cfg.checkpoint.every = cfg.sample.every = 50


def _shipped(cfg):
    _tiny(cfg)
    cfg.train.steps, cfg.optim.warmup = 800, 100
    cfg.evaluate.every = cfg.checkpoint.every = cfg.sample.every = 200


def _large(cfg):
    cfg.compute_dtype, cfg.frozen_dtype = "bfloat16", "bfloat16"
    # Every device stores the frozen VLM; docs/planning.md compares the layouts.
    cfg.layout, cfg.mesh, cfg.frozen_layout = "fsdp", "fsdp=-1", "dp"
    cfg.model.flow.remat = cfg.model.vlm.remat = "full"
    cfg.data.path, cfg.data.latents = "data_cache/i2t", "data_cache/i2t_latents"
    cfg.eval_data.path = "data_cache/i2t_test"
    cfg.eval_data.latents = "data_cache/i2t_test_latents"
    cfg.text.length, cfg.text.images, cfg.text.max_targets = 2048, 5, 1024
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-4, 1e-6, 1000
    cfg.train.ema, cfg.log.every = 0.9999, 100
    cfg.evaluate.every, cfg.checkpoint.every = 5000, 5000


def _small(cfg):
    _large(cfg)
    cfg.sample.every = 5000
    cfg.train.batch_size, cfg.train.steps = 64, 30_000


def _paper(cfg):
    _large(cfg)
    # On TPUs, an fsdp axis across the whole slice would be gathered at twice the bytes.
    cfg.mesh = "data=2,fsdp=-1"
    # No sample grids: one device would have to hold all 30 GB of weights twice.
    # 200 M pairs, about four per row.
    cfg.train.batch_size, cfg.train.steps = 256, 195_000

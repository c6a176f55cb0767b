"""python -m starflow2_jax.train --config experiments/stage3_joint.py:tiny --workdir runs/stage3

STARFlow2, stage 3: everything but the VLM is trained jointly, the skips from zero (arXiv
2605.08029), on a mixture of generation, understanding, editing and interleaved reasoning. It starts
from stage 2.
Variants, as in stage1_t2i.py, with their trained parameters:
    tiny     3.21 M
    shipped  3.21 M
    small    0.21 B
    paper    3.661 B
Data: tiny uses the output of launch/data_tiny.sh, images and latents; shipped that of
launch/data_wide.sh, too. The others need prepare import of each part of the mixture, then prepare
latents.
--config.init.from=WORKDIR of stage 2; --config.vlm.path as in stage 1.
"""

from starflow2_jax import config
from starflow2_jax.models import starflow2


def get_config(variant: str = "tiny"):
    """Return the configuration of a variant."""
    cfg = config.default()
    cfg.name, cfg.task = f"stage3_joint_{variant}", "starflow2"
    model = starflow2.preset("tiny" if variant == "shipped" else variant)
    cfg.model.update(starflow2.options(model))
    cfg.train.trainable = ("adapter", "shallow", "deep", "skip")
    cfg.noise.sigma, cfg.cfg_dropout.text = 0.3, 0.1
    cfg.noise.context_sigma = 0.0
    cfg.init["from"] = "runs/stage2"
    cfg.sample.every, cfg.sample.denoise = 0, False
    {"tiny": _tiny, "shipped": _shipped, "small": _small, "paper": _paper}[variant](cfg)
    return cfg


def _mixture(suffix, latents=False, **weights):
    """Return dataset folders with their weights, and with stored latents if there are any."""
    entries = []
    for name, weight in weights.items():
        path = f"data_cache/{name}{suffix}"
        entries.append({"path": path, "weight": weight})
        if latents:
            entries[-1]["latents"] = f"{path}_latents"
    return tuple(entries)


def _tiny(cfg):
    cfg.vlm.path, cfg.fae.path = "pretrained/vlm_tiny", "pretrained/fae_tiny"
    shares = {"t2i": 0.4, "i2t": 0.2, "edit": 0.15, "copy": 0.05, "reasoning": 0.15, "text": 0.05}
    cfg.data.mixture = _mixture("64", latents=True, **shares)
    cfg.eval_data.mixture = _mixture("64_test", latents=True, **dict.fromkeys(shares, 1.0))
    cfg.data.packing = "mixture"
    cfg.text.length, cfg.text.images = 256, 3
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 300, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-3, 1e-5, 50
    cfg.optim.muon_lr = 7e-3
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 150, 128, 16
    cfg.checkpoint.every = cfg.sample.every = 150
    cfg.sample.guidance, cfg.sample.denoise, cfg.sample.image_temperature = 1.0, True, 0.2


def _shipped(cfg):
    _tiny(cfg)
    shares = {"t2i": 0.3, "i2t": 0.15, "edit": 0.2, "copy": 0.05, "reasoning": 0.15, "text": 0.05}
    cfg.data.mixture = _mixture("64", latents=True, **shares, emoji_white=0.05, cifar=0.05)
    cfg.train.steps, cfg.train.ema, cfg.optim.warmup = 20_000, 0.998, 200
    cfg.evaluate.every = cfg.sample.every = 1000


def _large(cfg):
    cfg.compute_dtype, cfg.frozen_dtype = "bfloat16", "bfloat16"
    # Every device stores the frozen VLM; docs/planning.md compares the layouts.
    cfg.layout, cfg.mesh, cfg.frozen_layout = "fsdp", "fsdp=-1", "dp"
    cfg.model.flow.remat = cfg.model.vlm.remat = "full"
    shares = {"t2i": 0.5, "i2t": 0.25, "edit": 0.15, "reasoning": 0.1}
    cfg.data.mixture = _mixture("", latents=True, **shares)
    cfg.eval_data.mixture = _mixture("_test", latents=True, **shares)
    cfg.data.packing = "mixture"
    cfg.text.length, cfg.text.images, cfg.text.max_targets = 2048, 6, 1024
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 5e-5, 1e-6, 1000
    cfg.train.ema, cfg.log.every = 0.9999, 100
    cfg.evaluate.every, cfg.checkpoint.every = 5000, 5000


def _small(cfg):
    _large(cfg)
    cfg.sample.every = 5000
    cfg.train.batch_size, cfg.train.steps = 64, 50_000


def _paper(cfg):
    _large(cfg)
    # On TPUs, an fsdp axis across the whole slice would be gathered at twice the bytes.
    cfg.mesh = "data=2,fsdp=-1"
    # No sample grids: one device would have to hold all 30 GB of weights twice.
    # 80 M records, about four per row.
    cfg.train.batch_size, cfg.train.steps = 256, 78_000

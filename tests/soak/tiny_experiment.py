"""A TarFlow on images of 8 pixels that trains for four steps, and saves and draws every second."""

from starflow2_jax import config


def get_config(data: str = "shapes"):
    """Return the configuration; the variant is the folder of its data."""
    cfg = config.default()
    cfg.name = "soak"
    cfg.model.update({"start": "shift", "positions": "learned", "scale": "exp"})
    cfg.model.update({"side": 2, "channels": 48, "width": 16, "layers": (1, 1), "head_dim": 8})
    cfg.model.update({"classes": 8})
    cfg.image.pixels, cfg.image.patch = 8, 4
    cfg.data.path = cfg.eval_data.path = data
    cfg.data.labels = cfg.eval_data.labels = True
    cfg.data.threads = cfg.eval_data.threads = 1
    cfg.train.batch_size, cfg.train.steps, cfg.train.trainable = 8, 4, ("flow",)
    cfg.loss.latent_penalty = 0.0
    cfg.optim.lr, cfg.optim.warmup, cfg.log.every = 1e-3, 2, 1
    cfg.sample.every, cfg.sample.count, cfg.sample.guidance_rule = 2, 2, "linear_log_scale"
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 2, 16, 8
    cfg.checkpoint.every, cfg.checkpoint.keep = 2, 3
    return cfg

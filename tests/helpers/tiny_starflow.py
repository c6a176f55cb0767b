"""Configurations of a small STARFlow whose sizes all differ, so that a size names an axis."""

from starflow2_jax import config

MESHES = {
    "dp": "data=8",
    "fsdp": "fsdp=8",
    "fsdp_tp": "fsdp=4,tensor=2",
    "tp": "data=2,tensor=4",
    "hybrid": "data=2,fsdp=4",
}
ROWS = 40


def experiment(layout="fsdp", mesh=None, depth=2, **changes):
    """Return a configuration whose batch size and lengths are no size of a parameter."""
    cfg = config.default()
    cfg.name = "small"
    cfg.model.update(
        {
            "side": 8, "channels": 12, "width": 64, "layers": (depth,), "head_dim": 32, "heads": 8,
            "soft_clip": 4.0, "final_norm": True, "remat": "full",
        }
    )  # fmt: skip
    cfg.image.pixels, cfg.image.patch = 16, 2
    cfg.train.batch_size = ROWS
    cfg.layout, cfg.mesh = layout, mesh or MESHES[layout]
    cfg.update_from_flattened_dict(changes)
    return config.to_dict(cfg)

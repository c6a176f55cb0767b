"""A tiny latent codec: configurations, batches, datasets, short trainings and runs."""

import dataclasses

import jax
import numpy as np

from starflow2_jax import config, mesh, params
from starflow2_jax.checkpoints import orbax
from starflow2_jax.checkpoints.convert import teacher as teacher_weights
from starflow2_jax.data import records
from starflow2_jax.latents import codec as codecs
from starflow2_jax.models.fae import codec as fae, teacher as teachers
from starflow2_jax.models.fae.config import model_config
from starflow2_jax.shapes import generator
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry

ROWS = 8
SIDE = 16
TINY = {
    "encoder_heads": 2, "encoder_head_dim": 8, "decoder_layers": 1, "decoder_heads": 2,
    "decoder_head_dim": 8, "decoder_mlp": 16, "pixel_layers": 1, "pixel_width": 16,
    "pixel_heads": 2, "pixel_mlp": 16, "latent": 4,
}  # fmt: skip


def experiment(**changes):
    """Return a configuration of stage one: 16 pixels, a random teacher, 2 x 2 features."""
    cfg = config.default()
    cfg.task = "fae_features"
    model = fae.preset("tiny", side=2, patch=8, **TINY)
    cfg.model.update(dataclasses.asdict(model))
    cfg.image.pixels, cfg.image.flip, cfg.teacher.pixels = 16, True, 16
    cfg.train.trainable = ("encoder", "feature_decoder", "latent")
    cfg.train.batch_size, cfg.train.steps = ROWS, 6
    cfg.optim.lr, cfg.optim.warmup, cfg.sample.every = 1e-2, 2, 0
    cfg.fae.statistics_decay, cfg.fae.latent_noise = 0.9, 0.3
    cfg.update_from_flattened_dict(changes)
    return config.to_dict(cfg)


def batch_of(seed=0):
    """Return a host batch of random images."""
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, 256, (ROWS, 16, 16, 3)).astype(np.uint8), "id": ["x"] * ROWS}


def run(cfg, steps=4, devices=None, batches=None):
    """Train for some steps, and return the losses, the state and the frozen parameters."""
    device_mesh = mesh.make_mesh(cfg["mesh"], devices or jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        program = registry.build(cfg, device_mesh, dry_run=True)
        state, frozen = program.init(jax.random.key(cfg["seed"]))
        losses = []
        for i in range(steps):
            batch = to_device(program, batches[i] if batches else batch_of(i))
            state, metrics = program.step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state, frozen


def pixel_experiment(**changes):
    """Return a configuration of stage two, with a discriminator from step 2 on."""
    base = {
        "task": "fae_pixels", "train.trainable": ("pixel_decoder", "discriminator", "lecam"),
        "fae.l1": 1.0, "fae.gan_start": 2, "fae.discriminator_widths": (4, 8),
        "fae.discriminator_groups": 4, "train.ema": 0.9, "image.flip": False,
    }  # fmt: skip
    return experiment(**{**base, **changes})


TOWER = {
    "depth": 1, "width": 16, "heads": 2, "mlp_width": 16, "out_width": 16, "full_layers": (0,),
    "patch": 8, "merge": 1, "window": 16,
}  # fmt: skip


def end_to_end_experiment(**changes):
    """Return a configuration of the training of the whole codec, with a tower of its own."""
    base = {
        "task": "fae_end_to_end", "teacher.kind": "qwen", "teacher.tower": TOWER,
        "train.trainable": ("teacher", "encoder", "feature_decoder", "pixel_decoder", "latent"),
        "model.feature_width": 16, "fae.l1": 1.0, "train.ema": 0.9, "image.flip": False,
    }  # fmt: skip
    return experiment(**{**base, **changes})


def run_config(data, kind=experiment, **changes):
    """Return the configuration of a short run of `kind` on a dataset."""
    base = {
        "checkpoint.every": 2, "checkpoint.keep": 9, "log.every": 1, "evaluate.every": 3,
        "evaluate.rows": 16, "evaluate.batch_size": 8, "data.path": str(data),
        "eval_data.path": str(data), "data.threads": 1, "eval_data.threads": 1,
    }  # fmt: skip
    cfg = kind(**{**base, **changes})
    config.check(cfg)
    return cfg


def codec():
    """Return a random codec of 16 pixels."""
    cfg = experiment(task="fae_pixels", **{"teacher.kind": "qwen"})
    model = model_config(cfg)
    teacher = teacher_weights.teacher_config(cfg, model)
    declared = {**fae.declare(model), "teacher": teachers.declare(teacher)}
    return codecs.from_params(cfg, model, teacher, params.init(jax.random.key(0), declared))


def dataset(path, count=30, pixels=SIDE, tags=("single_object", "counting"), seed=0, **options):
    """Write a dataset of the shapes benchmark, and return its path."""
    records.write(path, generator.make_records(seed, count, pixels, tags=tags, **options))
    return str(path)


def make_run(workdir, seed):
    """Write the checkpoint of a run of stage one, and return its folder."""
    cfg = experiment(seed=seed)
    program = registry.build(cfg, mesh.make_mesh("data=1", jax.devices()[:1]), dry_run=True)
    state, _ = program.init(jax.random.key(seed))
    latent = {"mean": np.full(4, 0.25, np.float32), "std": np.full(4, 0.5, np.float32)}
    state = state.replace(ema={**state.ema, "latent": jax.tree.map(jax.numpy.asarray, latent)})
    writer = orbax.open(workdir)
    orbax.save(writer, 1, state, {"config": cfg, "step": 1, "frozen": {}})
    orbax.close(writer)
    return str(workdir)

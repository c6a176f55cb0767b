"""python -m experiments.ablations.run --variant tiny

Rows of the ablation table. A row is experiments/stage3_joint.py with one change, and one run: all
trainable parts are trained jointly on stage 3's data from random weights, with the VLM and the
latent codec of the variant's stages. Rows whose flows differ in shape cannot start from one trained
flow, and comparing them with a Pretzel that does would prove nothing; so every row starts from
scratch. `rows.py:VARIANT/ROW` is also an experiment:
python -m starflow2_jax.train --config experiments/ablations/rows.py:tiny/mot_frozen --workdir W

The budget of every run:
    tiny   400 steps of 8 rows (of 256 positions, three images at most), Muon at 1e-2, AdamW at 2e-3
    small  20,000 steps of 64 rows, peak rate 1e-4; rows are packed as in stage3_joint.py:small
In tiny, 45% of the rows are image to text (25% in stage 3); with less, so short a run would not
learn it. All rows with the same seed see the same records, noise and dropout in the same order. The
core rows have three seeds, the others one. The number of trained parameters is within 5% of the
Pretzel's, except if the VLM is trained, with four crossings, and on features of many channels. A
trained VLM has the same learning rates as everything else.
"""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from starflow2_jax import config
from starflow2_jax.models import starflow2
from starflow2_jax.models.ablations import mot

STAGE3 = Path(__file__).parents[1] / "stage3_joint.py"
VARIANTS = ("tiny", "small")
SEEDS = 3
# Channels of the latents that replace the codec's: 4 x 4 pixels, or features of its tower.
CHANNELS = {
    "pixels": {"tiny": 48, "small": 48},
    "features": {"tiny": 128, "small": 1536},
}
# Layers of every block; their sum is that of the stages' flow.
LAYERS = {
    "tiny": {
        "shallow_1": (2, 5),
        "shallow_3": (1, 1, 1, 4),
        "shallow_4": (1, 1, 1, 1, 3),
        "equal_blocks": (2, 2, 3),
    },
    "small": {
        "shallow_1": (4, 12),
        "shallow_3": (2, 2, 2, 10),
        "shallow_4": (2, 2, 2, 2, 8),
        "equal_blocks": (5, 5, 6),
    },
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        what: its label.
        change: (stage 3's configuration, variant) -> None; applies the change.
        core: whether it has `SEEDS` seeds.
        latents: the flow's data: the codec's latents (`fae`), `pixels` or `features`.
        matched: it trains as many parameters as the Pretzel within 5%.
        comparable: its image nats refer to the same latents and noise as the Pretzel's.
    """

    what: str
    change: Callable[[Any, str], None]
    core: bool = False
    latents: str = "fae"
    matched: bool = True
    comparable: bool = True

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return SEEDS if self.core else 1


def _nothing(cfg, variant):
    del cfg, variant


def _mot(cfg, variant, *, trains):
    group = starflow2.options(mot.preset(variant))
    for name in ("flow", "vlm"):
        group[name]["remat"] = cfg.model[name].remat
    cfg.model = ConfigDict(group)
    cfg.train.trainable = trains


def _skips(cfg, variant, *, skips):
    del variant
    cfg.model.skips = skips
    if not skips:
        cfg.train.trainable = tuple(name for name in cfg.train.trainable if name != "skip")


def _crossings(cfg, variant, *, count):
    del variant
    cfg.model.crossings = count


def _vlm_trained(cfg, variant):
    del variant
    cfg.train.trainable = ("vlm", *cfg.train.trainable)


def _channels(cfg, variant, *, kind):
    cfg.model.flow.channels = CHANNELS[kind][variant]


def _layers(cfg, variant, *, name):
    cfg.model.flow.layers = LAYERS[variant][name]


def _set(cfg, variant, **values):
    del variant
    cfg.update_from_flattened_dict({name.replace("__", "."): v for name, v in values.items()})


ROWS: dict[str, Row] = {
    "pretzel": Row("the Pretzel", _nothing, core=True),
    "mot_frozen": Row(
        "mixture of transformers, VLM frozen",
        partial(_mot, trains=("shallow", "deep")),
        core=True,
    ),
    "mot_joint": Row(
        "mixture of transformers, all trained",
        partial(_mot, trains=("vlm", "shallow", "deep")),
        core=True,
        matched=False,
    ),
    "no_skips": Row("no skips: a cascade", partial(_skips, skips=()), core=True),
    "skip_vlm": Row("skip from the VLM alone", partial(_skips, skips=("vlm",)), core=True),
    "skip_deep": Row("skip from the flow alone", partial(_skips, skips=("deep",)), core=True),
    "crossings_2": Row("two crossings", partial(_crossings, count=2)),
    "crossings_4": Row("four crossings", partial(_crossings, count=4), matched=False),
    "vlm_trained": Row("VLM trained", _vlm_trained, matched=False),
    "pixels": Row(
        "pixels (4 x 4 of a smaller image) as latents",
        partial(_channels, kind="pixels"),
        latents="pixels",
        comparable=False,
    ),
    "features": Row(
        "features of the codec's tower as latents",
        partial(_channels, kind="features"),
        latents="features",
        matched=False,
        comparable=False,
    ),
    "shallow_1": Row("one shallow block", partial(_layers, name="shallow_1")),
    "shallow_3": Row("three shallow blocks", partial(_layers, name="shallow_3")),
    "shallow_4": Row("four shallow blocks", partial(_layers, name="shallow_4")),
    "equal_blocks": Row("equal blocks", partial(_layers, name="equal_blocks")),
    "text_weight_0.1": Row("text loss x 0.1", partial(_set, loss__text_weight=0.1)),
    "text_weight_0.3": Row("text loss x 0.3", partial(_set, loss__text_weight=0.3)),
    "noise_0.1": Row("noise 0.1", partial(_set, noise__sigma=0.1), comparable=False),
    "noise_0.5": Row("noise 0.5", partial(_set, noise__sigma=0.5), comparable=False),
    "noisy_context": Row(
        "source images as noisy as targets", partial(_set, noise__context_sigma=0.3)
    ),
    "adapter_linear": Row("linear adapter", partial(_set, model__adapter="linear")),
    "adapter_open": Row(
        "adapter not zero at initialization", partial(_set, model__adapter_std=0.02)
    ),
    "skip_into_width": Row("VLM skip after W_in", partial(_set, model__skip_into="width")),
    "no_text_into_flow": Row(
        "no text gradient into the flow", partial(_set, loss__text_into_flow=False)
    ),
}


def get_config(which: str = "tiny/pretzel"):
    """Return the configuration of `VARIANT/ROW`."""
    variant, _, name = which.partition("/")
    if variant not in VARIANTS or name not in ROWS:
        raise KeyError(which)
    return configuration(variant, name)


def configuration(variant: str, name: str, *, data: str = "data_cache", steps: int = 0) -> Any:
    """Return the ConfigDict of a row.

    Args:
        data: folder of stage 3's datasets.
        steps: of training; 0 for those of the budget.
    """
    row, cfg = ROWS[name], _stage3(variant)
    cfg.name = f"ablation_{variant}_{name}"
    cfg.data.mixture = _moved(cfg.data.mixture, data, row.latents)
    # `scores` evaluates after training.
    cfg.eval_data.mixture = ()
    cfg.init["from"] = ""
    cfg.sample.every = cfg.evaluate.every = 0
    {"tiny": _tiny, "small": _small}[variant](cfg)
    cfg.train.steps = steps or cfg.train.steps
    cfg.optim.warmup = min(cfg.optim.warmup, max(cfg.train.steps // 10, 1))
    cfg.checkpoint.every = cfg.train.steps
    row.change(cfg, variant)
    if row.latents != "fae":
        cfg.fae.path = ""
    return cfg


def define(values: flags.FlagValues) -> None:
    """Define the flags that select a row, for the commands in this folder."""
    text = flags.DEFINE_string
    flags.DEFINE_enum("variant", "tiny", VARIANTS, "size of models and data", flag_values=values)
    text("data", "data_cache", "folder of stage 3's datasets", flag_values=values)
    text("vlm", "", "folder of the VLM, if it has moved", flag_values=values)
    text("fae", "", "folder of the codec, if it has moved", flag_values=values)
    flags.DEFINE_integer("steps", 0, "training steps; 0: the budget", 0, flag_values=values)


def settings(values: flags.FlagValues, name: str, seed: int) -> dict[str, Any]:
    """Return the configuration of a run, by the flags of `define`.

    Raises:
        ValueError: The row is unknown, or a key is wrong.
    """
    if name not in ROWS:
        raise ValueError(f"no row {name!r}{config.nearest(name, ROWS)}; rows: {', '.join(ROWS)}")
    cfg = configuration(values.variant, name, data=values.data, steps=values.steps)
    cfg.seed = seed
    cfg.vlm.path = values.vlm or cfg.vlm.path
    if ROWS[name].latents == "fae":
        cfg.fae.path = values.fae or cfg.fae.path
    config.check(cfg)
    return config.to_dict(cfg)


def held_out(variant: str, name: str, *, data: str = "data_cache") -> tuple[dict[str, Any], ...]:
    """Return stage 3's evaluation data with a row's latents, and `text` records without images."""
    cfg, kind = _stage3(variant), ROWS[name].latents
    entries = _moved(cfg.eval_data.mixture, data, kind)
    first = Path(entries[0]["path"])
    words = str(first.with_name(first.name.replace("t2i", "text")))
    return (*entries, {"path": words, "latents": f"{words}_{_folder(kind)}", "text": True})


def _stage3(variant):
    return runpy.run_path(str(STAGE3))["get_config"](variant)


def _folder(kind):
    return "latents" if kind == "fae" else kind


def _moved(mixture, data, kind):
    """Return the entries in another folder, each with its latents of a kind."""

    def path(entry):
        return f"{data}/{entry['path'].removeprefix('data_cache/')}"

    return tuple(
        {"path": path(e), "weight": e["weight"], "latents": f"{path(e)}_{_folder(kind)}"}
        for e in mixture
    )


def _tiny(cfg):
    cfg.fae.path = "pretrained/fae_tiny"
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 8, 400, 0.98
    # More image to text than in stage 3: with less, so short a run would not learn it.
    shares = {"t2i": 0.4, "i2t": 0.45, "edit": 0.05, "reasoning": 0.05, "text": 0.05}
    cfg.data.mixture = tuple(
        {**entry, "weight": share} for name, share in shares.items()
        for entry in cfg.data.mixture if f"/{name}64" in entry["path"]
    )  # fmt: skip
    # The learning rate of stage 2, for the adapter.
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 2e-3, 1e-5, 20
    # The rate of stage 1, which also starts from scratch.
    cfg.optim.muon_lr = 1e-2
    cfg.log.every = 20


def _small(cfg):
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 64, 20_000, 0.999
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-4, 1e-6, 1000

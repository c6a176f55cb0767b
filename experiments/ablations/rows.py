"""python -m experiments.ablations.run --variant tiny

Rows of the ablation table. A row is experiments/stage3_joint.py with one change. As in the paper it
continues stages 1 and 2: all rows start from the weights of one common stage 2, and what a row adds
to them (skips, mostly) starts as it always does. A row whose flow, latents or noise differ has a
stage 1 and a stage 2 of its own, with the same data, steps and order; a row with another adapter
has a stage 2 of its own. `rows.py:VARIANT/ROW` is also an experiment:
python -m starflow2_jax.train --config experiments/ablations/rows.py:tiny/mot_frozen --workdir W

The budget of every run (stages 1, 2 and 3):
    tiny   1,000 and 150 steps of 16 rows, then 400 of 8 rows (256 positions, three images at most)
    small  50,000, 10,000 and 20,000 steps of 64 rows, peak rate 1e-4 in stage 3
In tiny, 35% of the rows of stage 3 are image to text (20% in stage3_joint.py:tiny). All rows with
the same seed see the same records, noise and dropout in the same order. Seeds are those of stage 3;
the core rows have three, the others one. The number of parameters that stage 3 trains is within 5%
of the Pretzel's, except if the VLM is trained, with four crossings, and on features of many
channels. A trained VLM has the same learning rates as everything else.

A mixture of transformers has no adapter, so in its stage 2 the expert itself learns to be read.
Half of the rows are then those of stage 1, in twice the steps, lest the expert forget how to draw.
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

EXPERIMENTS = {1: "stage1_t2i.py", 2: "stage2_i2t.py", 3: "stage3_joint.py"}
VARIANTS = ("tiny", "small")
SEEDS = 3
# Steps of stages 1, 2 and 3.
STEPS = {
    "tiny": {1: 1000, 2: 150, 3: 400},
    "small": {1: 50_000, 2: 10_000, 3: 20_000},
}
STEPS_FLAGS = {1: "stage1_steps", 2: "stage2_steps", 3: "steps"}
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
        change: (a stage's configuration, variant) -> None; applies the change.
        first_stage: the first stage whose training has the change.
        base: the row whose stages before that it continues.
        start: the stage whose weights stage 3 starts from.
        core: whether it has `SEEDS` seeds.
        latents: the flow's data: the codec's latents (`fae`), `pixels` or `features`.
        matched: it trains as many parameters as the Pretzel within 5%.
        comparable: its image nats refer to the same latents and noise as the Pretzel's.
    """

    what: str
    change: Callable[[Any, str], None]
    first_stage: int = 3
    base: str = "pretzel"
    start: int = 2
    core: bool = False
    latents: str = "fae"
    matched: bool = True
    comparable: bool = True

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return SEEDS if self.core else 1


def stage_row(name: str, stage: int) -> str:
    """Return the row whose training of stage 1 or 2 a row continues."""
    while stage < ROWS[name].first_stage and name != ROWS[name].base:
        name = ROWS[name].base
    return name


def _nothing(cfg, variant):
    del cfg, variant


def _stage1_again(cfg, variant):
    stage1 = _experiment(1, variant)
    cfg.train.trainable = stage1.train.trainable
    cfg.data.mixture = _entries(stage1.data)


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
        first_stage=1,
        core=True,
    ),
    "mot_joint": Row(
        "mixture of transformers, all trained",
        partial(_mot, trains=("vlm", "shallow", "deep")),
        base="mot_frozen",
        core=True,
        matched=False,
    ),
    "no_skips": Row("no skips: a cascade", partial(_skips, skips=()), core=True),
    "skip_vlm": Row("skip from the VLM alone", partial(_skips, skips=("vlm",)), core=True),
    "skip_deep": Row("skip from the flow alone", partial(_skips, skips=("deep",)), core=True),
    "skip_into_width": Row(
        "VLM skip after W_in", partial(_set, model__skip_into="width"), core=True
    ),
    "stage1_again": Row("stage 1 for as many steps more", _stage1_again, core=True, start=1),
    "crossings_2": Row("two crossings", partial(_crossings, count=2)),
    "crossings_4": Row("four crossings", partial(_crossings, count=4), matched=False),
    "vlm_trained": Row("VLM trained", _vlm_trained, matched=False),
    "pixels": Row(
        "pixels (4 x 4 of a smaller image) as latents",
        partial(_channels, kind="pixels"),
        first_stage=1,
        latents="pixels",
        comparable=False,
    ),
    "features": Row(
        "features of the codec's tower as latents",
        partial(_channels, kind="features"),
        first_stage=1,
        latents="features",
        matched=False,
        comparable=False,
    ),
    "shallow_1": Row("one shallow block", partial(_layers, name="shallow_1"), first_stage=1),
    "shallow_3": Row("three shallow blocks", partial(_layers, name="shallow_3"), first_stage=1),
    "shallow_4": Row("four shallow blocks", partial(_layers, name="shallow_4"), first_stage=1),
    "equal_blocks": Row("equal blocks", partial(_layers, name="equal_blocks"), first_stage=1),
    "text_weight_0.1": Row("text loss x 0.1", partial(_set, loss__text_weight=0.1)),
    "text_weight_0.3": Row("text loss x 0.3", partial(_set, loss__text_weight=0.3)),
    "noise_0.1": Row("noise 0.1", partial(_set, noise__sigma=0.1), first_stage=1, comparable=False),
    "noise_0.5": Row("noise 0.5", partial(_set, noise__sigma=0.5), first_stage=1, comparable=False),
    "noisy_context": Row(
        "source images as noisy as targets",
        partial(_set, noise__context_sigma=0.3),
        first_stage=1,
    ),
    "released_positions": Row(
        "positions of the released STARFlow",
        partial(_set, model__flow__rope_frequencies="released", model__flow__key_positions="next"),
        first_stage=1,
    ),
    "adapter_linear": Row("linear adapter", partial(_set, model__adapter="linear"), first_stage=2),
    "adapter_open": Row(
        "adapter not zero at initialization",
        partial(_set, model__adapter_std=0.02),
        first_stage=2,
    ),
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


def configuration(
    variant: str, name: str, *, data: str = "data_cache", steps: int = 0, stage: int = 3
) -> Any:
    """Return the ConfigDict of a stage of a row, without the weights that it starts from.

    Args:
        data: folder of the stages' datasets.
        steps: of training; 0 for those of the budget.
    """
    row, cfg = ROWS[name], _experiment(stage, variant)
    cfg.name = f"ablation_{variant}_{name}" + ("" if stage == 3 else f"_stage{stage}")
    # `scores` evaluates after training.
    cfg.eval_data.mixture, cfg.eval_data.path, cfg.eval_data.latents = (), "", ""
    cfg.init["from"] = ""
    cfg.sample.every = cfg.evaluate.every = 0
    if stage == 3:
        {"tiny": _tiny, "small": _small}[variant](cfg)
    cfg.train.steps = steps or STEPS[variant][stage]
    row.change(cfg, variant)
    if cfg.model.get("kind") == "mot" and stage == 2:
        _add_stage1(cfg, variant)
    cfg.data.mixture = _moved(_entries(cfg.data), data, row.latents)
    cfg.data.path = cfg.data.latents = ""
    cfg.optim.warmup = min(cfg.optim.warmup, max(cfg.train.steps // 10, 1))
    # A run that is killed loses little; what was not measured goes on there.
    cfg.checkpoint.every = min(cfg.train.steps, max(cfg.train.steps // 4, 50))
    cfg.checkpoint.keep = 1
    if row.latents != "fae":
        cfg.fae.path = ""
    return cfg


def _add_stage1(cfg, variant):
    """Let half of the rows of stage 2 be those of stage 1, in twice the steps."""
    stage1, entries = _experiment(1, variant), _entries(cfg.data)
    cfg.data.mixture = (*entries, *_entries(stage1.data))  # the weights of each add up to 1
    cfg.text.images = max(cfg.text.images, stage1.text.images)
    cfg.train.steps *= 2


def _entries(group):
    """Return the datasets of a group of keys as entries of a mixture."""
    one = {"path": group.path, "weight": 1.0, "latents": group.latents}
    return tuple(group.mixture) or (one,)


def define(values: flags.FlagValues) -> None:
    """Define the flags that select a row, for the commands in this folder."""
    text = flags.DEFINE_string
    flags.DEFINE_enum("variant", "tiny", VARIANTS, "size of models and data", flag_values=values)
    text("data", "data_cache", "folder of stage 3's datasets", flag_values=values)
    text("vlm", "", "folder of the VLM, if it has moved", flag_values=values)
    text("fae", "", "folder of the codec, if it has moved", flag_values=values)
    for stage, flag in STEPS_FLAGS.items():
        flags.DEFINE_integer(
            flag, 0, f"steps of stage {stage}; 0: the budget", 0, flag_values=values
        )


def settings(values: flags.FlagValues, name: str, seed: int = 0, stage: int = 3) -> dict[str, Any]:
    """Return the configuration of a run, by the flags of `define`.

    Raises:
        ValueError: The row is unknown, or a key is wrong.
    """
    if name not in ROWS:
        raise ValueError(f"no row {name!r}{config.nearest(name, ROWS)}; rows: {', '.join(ROWS)}")
    steps = values[STEPS_FLAGS[stage]].value
    cfg = configuration(values.variant, name, data=values.data, steps=steps, stage=stage)
    cfg.seed = seed
    cfg.vlm.path = values.vlm or cfg.vlm.path
    if ROWS[name].latents == "fae":
        cfg.fae.path = values.fae or cfg.fae.path
    config.check(cfg)
    return config.to_dict(cfg)


def held_out(variant: str, name: str, *, data: str = "data_cache") -> tuple[dict[str, Any], ...]:
    """Return stage 3's evaluation data with a row's latents, and `text` records without images."""
    cfg, kind = _experiment(3, variant), ROWS[name].latents
    entries = _moved(cfg.eval_data.mixture, data, kind)
    first = Path(entries[0]["path"])
    words = str(first.with_name(first.name.replace("t2i", "text")))
    return (*entries, {"path": words, "latents": f"{words}_{_folder(kind)}", "text": True})


def _experiment(stage, variant):
    path = Path(__file__).parents[1] / EXPERIMENTS[stage]
    return runpy.run_path(str(path))["get_config"](variant)


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
    cfg.train.batch_size, cfg.train.ema = 8, 0.98
    # More image to text than in stage 3: with less, so short a run would not learn it.
    shares = {"t2i": 0.3, "i2t": 0.35, "edit": 0.15, "reasoning": 0.15, "text": 0.05}
    cfg.data.mixture = tuple(
        {**entry, "weight": share} for name, share in shares.items()
        for entry in cfg.data.mixture if f"/{name}64" in entry["path"]
    )  # fmt: skip
    cfg.log.every = 20


def _small(cfg):
    cfg.train.batch_size, cfg.train.ema = 64, 0.999
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 1e-4, 1e-6, 1000

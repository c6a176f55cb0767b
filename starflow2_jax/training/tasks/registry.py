"""What differs between the tasks of `train`: model, data, program, and the work of a step."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jax.sharding import Mesh

from starflow2_jax import params
from starflow2_jax.checkpoints import model_folder
from starflow2_jax.data import image_batches, packed_batches
from starflow2_jax.data.packing import PackingSpec
from starflow2_jax.evaluation import likelihood
from starflow2_jax.models import flops
from starflow2_jax.shapes.regions import RegionLabels
from starflow2_jax.training import init_from, program as programs
from starflow2_jax.training.tasks import fae, starflow2, vlm

Config = Mapping[str, Any]

# Those that read interleaved rows of several records.
INTERLEAVED = ("vlm", "starflow2")


def _step(cfg: Config) -> ModuleType:
    own = {"flow": programs, "vlm": vlm, "starflow2": starflow2}
    return own.get(cfg["task"], fae)


def model_config(cfg: Config) -> Any:
    """The model of an experiment; ValueError as the `model_config` of its task's step."""
    return _step(cfg).model_config(cfg)


def build(cfg: Config, mesh: Mesh, *, null_text: Any = None, dry_run: bool = False) -> Any:
    """The program of an experiment; errors as the `build` of its task's step."""
    if cfg["task"] == "flow":
        return programs.build(cfg, mesh, null_text=null_text)
    if cfg["task"] in INTERLEAVED:
        return _step(cfg).build(cfg, mesh)
    return fae.build(cfg, mesh, init_from.codec(cfg, dry_run))


def reader(cfg: Config) -> ModuleType:
    """`rows` or `pipeline`: describe, batches and eval_batches of the task's options."""
    return packed_batches if cfg["task"] in INTERLEAVED else image_batches


def data_options(cfg: Config, model: Any, group: str = "eval_data", **changes: Any) -> Any:
    """Options of `reader(cfg)` for a group of an experiment's configuration, with `changes`."""
    if cfg["task"] not in INTERLEAVED:
        return likelihood.data_options(cfg, model, group, **changes)
    text, dropout = cfg["text"], cfg["cfg_dropout"]
    side = vlm.side(cfg, model) if cfg["task"] == "vlm" else model.flow.side
    own = {name: v for name, v in cfg[group].items() if name not in ("labels", "text", "features")}
    own["mixture"] = tuple(own["mixture"])
    own |= {
        # A stage reads with its VLM's own, unless told otherwise.
        "tokenizer": str(model_folder.locate(text["tokenizer"] or cfg["vlm"]["path"])),
        "packing": PackingSpec(text["length"], side**2, text["images"]),
        "grid_side": side,
        "pixels": cfg["image"]["pixels"],
        "seed": cfg["seed"],
        "drop_text": dropout["text"],
        "drop_all": dropout["all"],
        "annotator": RegionLabels(*vlm.REGIONS) if _names_regions(cfg) else None,
    }
    return packed_batches.PackedBatchOptions(**{**own, **changes})


def _names_regions(cfg: Config) -> bool:
    return cfg["task"] == "vlm" and cfg["vlm"]["region_loss_weight"] > 0


def work(cfg: Config, model: Any, declared: Any) -> dict[str, float]:
    """Tokens and FLOPs of a step; FLOPs are 0 where they are not counted."""
    count = cfg["train"]["batch_size"]
    if cfg["task"] == "flow":
        done = flops.train_step(model, count, model.tokens, model.text_length)
        return {"tokens": count * model.tokens, "flops": done}
    if cfg["task"] == "vlm":
        length = cfg["text"]["length"]
        places = cfg["text"]["images"] or length // (vlm.side(cfg, model) ** 2 + 2)
        patches = places * (cfg["image"]["pixels"] // model.vision.patch) ** 2
        tree = dict(declared["vlm"])
        tower = params.count(tree.pop("vision"))
        # A tied embedding multiplies as the head; that of its own only looks up.
        language = params.count(tree) - (0 if model.tied else model.vocab * model.width)
        language *= cfg["vlm"]["text_loss_weight"] > 0
        return {
            "tokens": count * length,
            "flops": 6 * count * (length * language + patches * tower),
        }
    if cfg["task"] == "starflow2":
        return starflow2.work(cfg, model, declared)
    return {"tokens": count * model.tokens, "flops": 0}

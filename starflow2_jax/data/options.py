"""From an experiment's configuration to the options of its data readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starflow2_jax.config import context_sigma

if TYPE_CHECKING:
    from starflow2_jax.data.packed_batches import PackedBatchOptions, RegionAnnotator


def image_batch_options(
    cfg: Mapping[str, Any], model_config: Any, group: str = "eval_data", **changes: Any
) -> dict[str, Any]:
    """Return options of `data.image_batches`; `group` is `data` or `eval_data`."""
    unused = ("blank_images", "packing", "skip_long")
    options = {name: value for name, value in cfg[group].items() if name not in unused}
    options["pixels"] = cfg["image"]["pixels"]
    options["text_length"] = getattr(model_config, "text_length", 0)
    options["seed"] = cfg["seed"]
    return {**options, **changes}


def packed_batch_options(
    cfg: Mapping[str, Any],
    group: str = "eval_data",
    *,
    tokenizer: str,
    grid_side: int,
    annotator: RegionAnnotator | None = None,
    **changes: Any,
) -> PackedBatchOptions:
    """Return options of `data.packed_batches`; `group` is `data` or `eval_data`."""
    from starflow2_jax.data.packed_batches import PackedBatchOptions  # heavy
    from starflow2_jax.data.packing import PackingSpec

    unused = ("labels", "text", "features")
    options = {name: value for name, value in cfg[group].items() if name not in unused}
    options |= {
        "mixture": tuple(options["mixture"]),
        "packing_over": options.pop("packing", "dataset"),  # old configurations lack the key
        "tokenizer": tokenizer,
        "packing": PackingSpec(
            cfg["text"]["length"],
            grid_side**2,
            cfg["text"]["images"],
            clean_copies=context_sigma(cfg) is not None,
        ),
        "grid_side": grid_side,
        "pixels": cfg["image"]["pixels"],
        "seed": cfg["seed"],
        "drop_text": cfg["cfg_dropout"]["text"],
        "drop_all": cfg["cfg_dropout"]["all"],
        "annotator": annotator,
    }
    return PackedBatchOptions(**{**options, **changes})

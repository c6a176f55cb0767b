"""Convert state dicts of ml-tarflow and ml-starflow to our tree and back.

In the published state dicts, q, k and v share one matrix.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from starflow2_jax import config
from starflow2_jax.checkpoints.convert import starflow_options
from starflow2_jax.checkpoints.convert.starflow_options import (
    find_family,
    image_config,
    read_options,
)
from starflow2_jax.checkpoints.convert.tensor_map import (
    Piece,
    published_shapes,
    to_published,
    to_tree,
)
from starflow2_jax.checkpoints.tensor_files import (
    Index,
    StoredTensor,
    compare,
    open_source,
    raise_problems,
)
from starflow2_jax.models.flow import FlowConfig, declare
from starflow2_jax.params import Tree, flatten, unflatten

# Our names and the published ones, within a block. A gated MLP replaces some of them.
_NAMES = {
    "start": "sos_embed",
    "position": "pos_embed",
    "class_embed": "class_embed",
    "proj_in": "proj_in",
    "proj_text": "proj_txt",
    "proj_out": "proj_out",
    "final_norm": "final_norm",
    "layers/attention_norm": "attention.norm",
    "layers/query": "attention.qkv",
    "layers/key": "attention.qkv",
    "layers/value": "attention.qkv",
    "layers/query_norm": "attention.query_norm",
    "layers/key_norm": "attention.key_norm",
    "layers/out": "attention.proj",
    "layers/attention_post_norm": "attention.post_norm",
    "layers/mlp_norm": "mlp.norm",
    "layers/mlp_up": "mlp.main.0",
    "layers/mlp_down": "mlp.main.2",
    "layers/mlp_post_norm": "mlp.post_norm",
}
_GATED_NAMES = {
    "layers/mlp_gate": "mlp.gate_proj",
    "layers/mlp_up": "mlp.up_proj",
    "layers/mlp_down": "mlp.down_proj",
}
# Buffers, which hold no trained weights.
_BUFFERS = re.compile(r"blocks\.\d+\.attn_mask|var|feat_rope\.freqs_(cos|sin)")
# Standard deviation of the noise in each family's trainer.
_NOISE_STD = {"tarflow": 0.05, "starflow": 0.3}
_DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float64, np.float16)))


def table(cfg: FlowConfig) -> list[Piece]:
    """Return the table of names of `cfg`, without the buffers."""
    names = {**_NAMES, **(_GATED_NAMES if cfg.gated_mlp else {})}
    order = {stem: i for i, stem in enumerate(names)}
    # The leaves of each published tensor, by the order of their rows in it.
    leaves: dict[str, list[tuple[int, str, tuple[int, ...], int | None]]] = {}
    for leaf, spec in flatten(declare(cfg)).items():
        _, block, inner = leaf.split("/", 2)
        stem, _, kind = inner.rpartition("/") if inner not in names else (inner, "", "")
        ending = f"{names[stem]}.{kind}" if kind else names[stem]
        if stem.startswith("layers/"):
            for layer in range(spec.shape[0]):
                name = f"blocks.{block}.attn_blocks.{layer}.{ending}"
                leaves.setdefault(name, []).append((order[stem], leaf, spec.shape[1:], layer))
        else:
            leaves[f"blocks.{block}.{ending}"] = [(order[stem], leaf, spec.shape, None)]
    pieces = []
    for name, parts in leaves.items():
        first_row = 0
        for _, leaf, shape, layer in sorted(parts):
            transposed = leaf.endswith("/weight") and len(shape) == 2
            shape = shape[::-1] if transposed else shape
            if name.endswith("sos_embed"):
                shape = (1, 1, *shape)
            elif name.endswith("class_embed"):
                shape = (shape[0], 1, shape[1])
            pieces.append(Piece(name, shape, first_row, leaf, layer, transposed))
            first_row += shape[0]
    return pieces


def load(
    mapping_or_path: Mapping[str, Any] | str | Path,
    options: Mapping[str, Any] | str | Path,
) -> tuple[FlowConfig, dict[str, Any]]:
    """Load a published TarFlow or STARFlow as numpy arrays in the file's dtype, one at a time.

    Args:
        mapping_or_path: arrays by published name, or a path that `tensor_files.open_source` reads.
        options: the run's options, as `starflow_options.read_options` takes them.
    """
    source = open_source(mapping_or_path)
    cfg, _ = describe(source, options)
    leaves = flatten(tree_view(source, cfg))
    return cfg, unflatten({name: stored.read() for name, stored in leaves.items()})


def describe(
    source: Mapping[str, StoredTensor], options: Mapping[str, Any] | str | Path
) -> tuple[FlowConfig, dict[str, Any]]:
    """Return configuration and `image_config` of an opened state dict, after checking its names."""
    model_options = read_options(options)[0]
    family = find_family(model_options, set(source))
    shapes = {name: tensor.shape for name, tensor in source.items()}
    cfg = starflow_options.flow_config(model_options, family, shapes)
    _check(source, cfg, family)
    return cfg, image_config(model_options, family)


def _check(source: Mapping[str, StoredTensor], cfg: FlowConfig, family: str) -> None:
    expected = published_shapes(table(cfg))
    denoiser = [name for name in source if name.startswith("learnable_self_denoiser.")]
    if denoiser:
        raise ValueError(f"{denoiser[0]}: the video model's self-denoiser is not converted")
    weights = {n: t for n, t in source.items() if n in expected or not _BUFFERS.fullmatch(n)}
    checked = dict(expected)
    if "var" in source:
        # The only buffer that matters: with RoPE no weight depends on the side of the grid.
        weights["var"], checked["var"] = source["var"], (cfg.tokens, cfg.channels)
    problems = compare(weights, checked)
    dtypes = {name: source[name].dtype for name in expected if name in source}
    wrong = [name for name, dtype in dtypes.items() if dtype not in _DTYPES]
    if not wrong:
        first = min(dtype.name for dtype in dtypes.values()) if dtypes else ""
        wrong = [name for name, dtype in dtypes.items() if dtype.name != first]
    kind = "not of one dtype of float32, bfloat16, float16, float64"
    problems[kind] = [f"{name} is {dtypes[name]}" for name in wrong]
    raise_problems(f"the state dict is not the {family} that the options describe", problems)
    if family == "tarflow" and "var" in source:
        var = source["var"].read()
        if not np.all(var == 1):
            raise ValueError(
                f"var: a prior variance other than one (up to {np.max(np.abs(var - 1)):.3g} off; "
                "nvp was off in training) is not converted"
            )


def tree_view(source: Mapping[str, StoredTensor], cfg: FlowConfig) -> dict[str, Any]:
    """Return our tree of a checked state dict, as tensors that are assembled when read.

    Weights of float16 become float32, and those that are not finite are logged.
    """
    leaves = flatten(to_tree(table(cfg), source, declare(cfg)))
    return unflatten({name: _checked(name, stored) for name, stored in leaves.items()})


def _checked(name: str, stored: StoredTensor) -> StoredTensor:
    dtype = np.dtype(np.float32) if stored.dtype == np.float16 else stored.dtype

    def read(index: Index = ()) -> np.ndarray:
        array = stored.read(index)
        count = array.size - int(np.isfinite(array).sum())
        if count:
            logging.warning("%s: %d of %d weights of %s are not finite", stored.location, count,
                            array.size, name)  # fmt: skip
        return array.astype(dtype, copy=False)

    return StoredTensor(stored.shape, dtype, stored.location, read)


def public_view(params: Tree, cfg: FlowConfig) -> dict[str, StoredTensor]:
    """Return the published state dict of a tree, as tensors that are assembled when read."""
    return to_published(table(cfg), params, declare(cfg))


def export(params: Tree, cfg: FlowConfig) -> dict[str, np.ndarray]:
    """Return the published state dict without buffers, in the dtype of `params`."""
    return {name: tensor.read() for name, tensor in public_view(params, cfg).items()}


def experiment_config(
    model: FlowConfig,
    image: Mapping[str, Any],
    options: Mapping[str, Any],
    trainer_options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the experiment configuration of a converted flow, for `generate` and `evaluate`.

    `image` is that of `image_config`; the options are the two results of `read_options`. The noise
    is one of the trainer's options; its default is that of the family's trainer.
    """
    cfg = config.plain()
    cfg["name"] = f"converted {options['family']}"
    cfg["model"] = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if getattr(model, field.name) != field.default
    }
    # Tokens that are not of RGB pixels are latents: they are read, never cut out of an image.
    is_latent = options.get("vae") or options["in_channels"] != 3
    pixels = 0 if is_latent else model.side * image["patch"]
    cfg["image"].update(pixels=pixels, patch=image["patch"], channel_order=image["channel_order"])
    cfg["data"]["text"] = "features" if model.text_channels else "none"
    cfg["data"]["labels"] = bool(model.classes)
    sigma = trainer_options.get("noise_std")
    cfg["noise"]["sigma"] = float(_NOISE_STD[options["family"]] if sigma is None else sigma)
    cfg["noise"]["kind"] = trainer_options.get("noise_type") or "gaussian"
    cfg = config.to_dict(cfg)
    config.check(cfg)
    return cfg

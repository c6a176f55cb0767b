"""Convert DINOv2 folders as published on Hugging Face to our tree.

Both Dinov2Model and Dinov2WithRegistersModel are read. In the published files, the gate and up
projections of a SwiGLU share one matrix.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from starflow2_jax import params
from starflow2_jax.checkpoints.convert.tensor_map import Piece, published_shapes, to_tree
from starflow2_jax.checkpoints.model_folder import check, read_config
from starflow2_jax.checkpoints.tensor_files import (
    Index,
    StoredTensor,
    compare,
    open_source,
    raise_problems,
    to_device,
)
from starflow2_jax.models.fae.dinov2 import DinoConfig, declare, swiglu_width
from starflow2_jax.params import flatten, unflatten

_NAMES = {"patch": "embeddings.patch_embeddings.projection", "final_norm": "layernorm"}
_CLASS = "embeddings.cls_token"
_REGISTERS = "embeddings.register_tokens"
# The first row is the position of the class token (`class_position`); `position` has the others.
_POSITIONS = "embeddings.position_embeddings"
_LAYER_NAMES = {
    "attention_norm": "norm1",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "attention_scale": "layer_scale1.lambda1",
    "mlp_norm": "norm2",
    "mlp_scale": "layer_scale2.lambda1",
}
_PLAIN_NAMES = {"mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2"}
_GATED_NAMES = {
    "mlp_gate": "mlp.weights_in",
    "mlp_up": "mlp.weights_in",
    "mlp_down": "mlp.weights_out",
}
# Only masked training reads this tensor.
_UNUSED = "embeddings.mask_token"
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}
_MODELS = {"dinov2": False, "dinov2_with_registers": True}


def read_options(options: Mapping[str, Any]) -> DinoConfig:
    """Return our configuration of a published `config.json`."""
    kind = options.get("model_type")
    if kind not in _MODELS:
        raise ValueError(f"config.json: model_type={kind!r} is not one of {', '.join(_MODELS)}")

    def get(key: str, default: Any = None) -> Any:
        if key not in options and default is None:
            raise ValueError(f"config.json: {key!r} is missing")
        return options.get(key, default)

    def square(key: str) -> int:
        value = get(key)
        sides = set(value) if isinstance(value, list | tuple) else {value}
        if len(sides) != 1 or not isinstance(value := sides.pop(), int):
            raise ValueError(f"config.json: {key}={options[key]} is not one side of a square")
        return value

    registers, gated = _MODELS[kind], bool(get("use_swiglu_ffn", False))
    width, ratio = get("hidden_size"), get("mlp_ratio", 4)
    if get("num_channels", 3) != 3:
        raise ValueError(f"config.json: num_channels={options['num_channels']}, expected 3")
    activation = get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"config.json: hidden_act={activation!r} is not one of {known}")
    return DinoConfig(
        width=width,
        layers=get("num_hidden_layers"),
        heads=get("num_attention_heads"),
        mlp_width=swiglu_width(width, ratio) if gated else int(width * ratio),
        patch=square("patch_size"),
        side=square("image_size") // square("patch_size"),
        registers=get("num_register_tokens", 4) if registers else 0,
        gated=gated,
        activation="silu" if gated else _ACTIVATIONS[activation],
        qkv_bias=bool(get("qkv_bias", True)),
        norm_eps=get("layer_norm_eps", 1e-6),
        antialias=registers,
    )


def load(
    folder: str | Path, mesh: Mesh | None = None, layout: str = "fsdp", dtype: Any = None
) -> tuple[DinoConfig, dict[str, Any]]:
    """Load a published DINOv2 folder, each slice straight to the device that needs it.

    An absent `mesh` means the default device, an absent `dtype` that of the file.
    """
    check(folder)
    cfg = read_options(read_config(folder))
    tensors = flatten(view(open_source(folder), cfg))
    shardings = flatten(params.shardings(declare(cfg), mesh, layout)) if mesh is not None else {}
    leaves = {
        name: to_device(
            tensor, shardings.get(name), np.dtype(tensor.dtype if dtype is None else dtype)
        )
        for name, tensor in tensors.items()
    }
    return cfg, unflatten(leaves)


def table(cfg: DinoConfig) -> list[Piece]:
    """Return the table of names of `cfg`. Tokens and positions lack their leading axis of one."""
    layer_names = {**_LAYER_NAMES, **(_GATED_NAMES if cfg.gated else _PLAIN_NAMES)}
    # Leaf: (published name, first row, number of rows).
    rows_of_tokens = {
        "class_token": (_CLASS, 0, 1),
        "class_position": (_POSITIONS, 0, 1),
        "position": (_POSITIONS, 1, cfg.side**2),
        "registers": (_REGISTERS, 0, cfg.registers),
    }
    pieces = []
    for leaf, spec in flatten(declare(cfg)).items():
        if leaf in rows_of_tokens:
            name, first_row, count = rows_of_tokens[leaf]
            pieces.append(Piece(name, (count, cfg.width), first_row, leaf, None, False))
            continue
        stacked = leaf.startswith("layers/")
        stem, _, kind = leaf.removeprefix("layers/").partition("/")
        shape = spec.shape[1:] if stacked else spec.shape
        transposed = kind == "weight" and len(shape) == 2
        shape = shape[::-1]
        first_row = shape[0] if cfg.gated and stem == "mlp_up" else 0
        if leaf == "patch/weight":
            shape = (cfg.width, 3, cfg.patch, cfg.patch)
        name = (layer_names if stacked else _NAMES)[stem] + (f".{kind}" if kind else "")
        if not stacked:
            pieces.append(Piece(name, shape, 0, leaf, None, transposed))
            continue
        for layer in range(cfg.layers):
            layer_name = f"encoder.layer.{layer}.{name}"
            pieces.append(Piece(layer_name, shape, first_row, leaf, layer, transposed))
    return pieces


def view(source: Mapping[str, StoredTensor], cfg: DinoConfig) -> dict[str, Any]:
    """Return our tree of a published state dict, as tensors that are assembled when read."""
    pieces = table(cfg)
    shapes = published_shapes(pieces)
    tokens = [name for name in (_CLASS, _POSITIONS, _REGISTERS) if name in shapes]
    shapes |= {name: (1, *shapes[name]) for name in tokens}
    source = {name: tensor for name, tensor in source.items() if name != _UNUSED}
    summary = "the tensors are not the DINOv2 that config.json describes"
    raise_problems(summary, compare(source, shapes))
    source |= {name: _without_leading_axis(source[name]) for name in tokens}
    return to_tree(pieces, source, declare(cfg))


def _without_leading_axis(tensor: StoredTensor) -> StoredTensor:
    def read(index: Index = ()) -> np.ndarray:
        return tensor.read((slice(None), *index))[0]

    return StoredTensor(tensor.shape[1:], tensor.dtype, tensor.location, read)

"""DINOv2 folders as published on Hugging Face (Dinov2Model, Dinov2WithRegistersModel) to our tree.

Theirs: linears (out, in), one tensor a layer, a SwiGLU's gate and up projections in one matrix.
Ours: linears (in, out), layers stacked on the leading axis.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from starflow2_jax import params
from starflow2_jax.checkpoints.model_folder import read_config
from starflow2_jax.checkpoints.tensor_files import Index, Stored, open_source
from starflow2_jax.models.fae.dinov2 import DinoConfig, declare, swiglu_width
from starflow2_jax.params import flatten, unflatten

_NAMES = {"patch": "embeddings.patch_embeddings.projection", "final_norm": "layernorm"}
_CLASS = "embeddings.cls_token"
_REGISTERS = "embeddings.register_tokens"
# The class token's position is the first row of their table, our `position` holds the others.
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
# Read by their masked training alone.
_DEAD = "embeddings.mask_token"
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}
_MODELS = {"dinov2": False, "dinov2_with_registers": True}


def read_options(options: Mapping[str, Any]) -> DinoConfig:
    """Our configuration of a published `config.json`.

    Raises:
        ValueError: another architecture, a missing key, or a value that is not supported.
    """
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
    """A published DINOv2, each slice read straight to the device that holds it.

    Args:
        folder: `config.json` and safetensors (one file, or shards with an index).
        mesh, layout: where the weights go; without a mesh to the default device.
        dtype: by default that of the file.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        ValueError: another architecture; missing, unexpected and misshapen names, listed together;
            a damaged file (see `sources.open_source`).
    """
    cfg = read_options(read_config(folder))
    declared, held = flatten(declare(cfg)), flatten(view(open_source(folder), cfg))
    where = flatten(params.shardings(declare(cfg), mesh, layout)) if mesh is not None else {}
    leaves = {}
    for name in declared:
        target = np.dtype(held[name].dtype if dtype is None else dtype)
        # Waiting keeps later leaves from being read while this one is still on its way.
        leaves[name] = _place(held[name], where.get(name), target).block_until_ready()
    return cfg, unflatten(leaves)


def _place(stored: Stored, sharding: Any, dtype: np.dtype) -> jax.Array:
    if sharding is None:
        return jnp.asarray(stored.read().astype(dtype, copy=False))
    parts: dict[str, np.ndarray] = {}

    def read(index: Index) -> np.ndarray:
        # Devices that hold the same slice ask for it in turn.
        if str(index) not in parts:
            parts[str(index)] = stored.read(index).astype(dtype, copy=False)
        return parts[str(index)]

    return jax.make_array_from_callback(stored.shape, sharding, read)


@dataclass(frozen=True)
class Place:
    """Where one of our leaves lies: rows `first` to `first + rows` of a tensor, one a layer."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    first: int
    rows: int


def table(cfg: DinoConfig) -> dict[str, Place]:
    """Place of each of our leaves in the published state dict."""
    layer_names = {**_LAYER_NAMES, **(_GATED_NAMES if cfg.gated else _PLAIN_NAMES)}
    width, grid = cfg.width, cfg.side**2
    places = {
        "class_token": Place((_CLASS,), (1, 1, width), 0, 1),
        "class_position": Place((_POSITIONS,), (1, grid + 1, width), 0, 1),
        "position": Place((_POSITIONS,), (1, grid + 1, width), 1, grid),
        "registers": Place((_REGISTERS,), (1, cfg.registers, width), 0, cfg.registers),
    }
    for leaf, weight in flatten(declare(cfg)).items():
        if leaf in places:
            continue
        stacked = leaf.startswith("layers/")
        stem, _, kind = leaf.removeprefix("layers/").partition("/")
        name = (layer_names if stacked else _NAMES)[stem] + (f".{kind}" if kind else "")
        names = (
            tuple(f"encoder.layer.{i}.{name}" for i in range(cfg.layers)) if stacked else (name,)
        )
        shape = weight.shape[1:] if stacked else weight.shape
        shape = shape[::-1] if kind == "weight" else shape
        rows, first = shape[0], 0
        if leaf == "patch/weight":
            shape = (width, 3, cfg.patch, cfg.patch)
        elif cfg.gated and stem in ("mlp_gate", "mlp_up"):
            first, shape = (0 if stem == "mlp_gate" else rows), (2 * rows, *shape[1:])
        places[leaf] = Place(names, shape, first, rows)
    return {leaf: places[leaf] for leaf in flatten(declare(cfg))}


def view(source: Mapping[str, Stored], cfg: DinoConfig) -> dict[str, Any]:
    """Our tree of a published state dict, as tensors that are read, and put together, when asked.

    Raises:
        ValueError: missing, unexpected and misshapen names, listed together.
    """
    places = table(cfg)
    expected = {name: p.shape for p in places.values() for name in p.names}
    problems = {
        "missing": [name for name in expected if name not in source],
        "unexpected": [name for name in source if name not in expected and name != _DEAD],
        "misshapen": [
            f"{name} is {list(source[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in source and source[name].shape != shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(n)} {kind}: {', '.join(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"the tensors are not the DINOv2 that config.json describes. {text}")

    def stored(leaf: str, shape: tuple[int, ...]) -> Stored:
        place = places[leaf]
        stacked = leaf.startswith("layers/")
        inner = shape[1:] if stacked else shape
        transposed = leaf.endswith("/weight") and len(inner) == 2
        tensors = [source[name] for name in place.names]

        def part(tensor: Stored) -> np.ndarray:
            # Tokens and positions have axes of one in front of their rows.
            rows = tensor.read().reshape(-1, math.prod(inner) // place.rows)
            rows = rows[place.first : place.first + place.rows]
            return rows.T if transposed else rows.reshape(inner)

        def read(index: Index = ()) -> np.ndarray:
            if not stacked:
                return part(tensors[0])[index]
            layers, *rest = (*index, *(slice(None),) * (len(shape) - len(index)))
            sizes = [len(range(*cut.indices(size))) for cut, size in zip((layers, *rest), shape)]
            whole = np.empty(sizes, tensors[0].dtype)
            for target, tensor in zip(whole, tensors[layers]):
                target[...] = part(tensor)[tuple(rest)]
            return whole

        return Stored(shape, tensors[0].dtype, tensors[0].where, read)

    return unflatten({leaf: stored(leaf, w.shape) for leaf, w in flatten(declare(cfg)).items()})

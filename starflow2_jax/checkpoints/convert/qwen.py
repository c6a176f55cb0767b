"""Qwen2.5-VL folders as published on Hugging Face to our tree and back.

Theirs: linears (out, in), one tensor a layer, the tower's q, k and v in one matrix and its patch
embedding a convolution. Ours: linears (in, out), layers stacked on the leading axis. Two styles of
names are read, `model.layers...` with `visual...` and `model.language_model...` with
`model.visual...`; the first, which every release of transformers reads, is written.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from starflow2_jax.checkpoints.convert.qwen_options import public_options, read_options
from starflow2_jax.checkpoints.model_folder import CONFIG_FILE, read_config, write_tensors
from starflow2_jax.checkpoints.tensor_files import Stored, open_source
from starflow2_jax.models.qwen import QwenConfig, declare
from starflow2_jax.params import (
    ParamSpec,
    Tree,
    flatten,
    shardings as param_shardings,
    split as split_params,
    unflatten,
)

# What a processor and a chat read beside the weights.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "vision/patch": "visual.patch_embed.proj",
    "vision/merger/norm": "visual.merger.ln_q",
    "vision/merger/up": "visual.merger.mlp.0",
    "vision/merger/down": "visual.merger.mlp.2",
}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}
_VISION_LAYER_NAMES = {
    **_LAYER_NAMES,
    "attention_norm": "norm1",
    "query": "attn.qkv",
    "key": "attn.qkv",
    "value": "attn.qkv",
    "out": "attn.proj",
    "mlp_norm": "norm2",
}
_FUSED = ("query", "key", "value")


@dataclass(frozen=True)
class Piece:
    """Where one of their tensors, or some of its rows, lies in our tree.

    Attributes:
        name: theirs, in the style that is written; shape: of the rows in question.
        rows: how many rows of the tensor stand before them.
        leaf: our leaf; layer: index on its leading axis, None outside the layers.
        transposed: whether ours is (in, out).
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    leaf: str
    layer: int | None
    transposed: bool


def table(cfg: QwenConfig) -> list[Piece]:
    """Every piece of every public tensor of `cfg`; pieces of a leaf are neighbours."""
    pieces = []
    for leaf, weight in flatten(declare(cfg)).items():
        stem, _, kind = leaf.rpartition("/")
        before, layered, inner = stem.rpartition("layers/")
        if not layered:
            shape = weight.shape
            if leaf == "vision/patch/weight":
                vision = cfg.vision
                shape = (vision.width, vision.channels, vision.frames, vision.patch, vision.patch)
            elif _transposed(leaf):
                shape = shape[::-1]
            name = f"{_NAMES[stem]}.{kind}"
            pieces.append(Piece(name, shape, 0, leaf, None, _transposed(leaf)))
            continue
        vision = before == "vision/"
        names = _VISION_LAYER_NAMES if vision else _LAYER_NAMES
        shape = weight.shape[1:] if kind == "bias" else weight.shape[:0:-1]
        rows = shape[0] * _FUSED.index(inner) if vision and inner in _FUSED else 0
        place = "visual.blocks" if vision else "model.layers"
        for layer in range(weight.shape[0]):
            name = f"{place}.{layer}.{names[inner]}.{kind}"
            pieces.append(Piece(name, shape, rows, leaf, layer, _transposed(leaf)))
    return pieces


def _transposed(leaf: str) -> bool:
    return leaf.endswith("/weight") and not leaf.startswith("embed/") and "norm" not in leaf


def _public_shapes(cfg: QwenConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in table(cfg):
        rows = shapes.get(piece.name, (0,))[0] + piece.shape[0]
        shapes[piece.name] = (rows, *piece.shape[1:])
    return shapes


# ----------------------------------------------------------------------------------------- loading


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    layout: str = "fsdp",
    dtype: Any = None,
    *,
    only: str | tuple[str, ...] = "",
) -> tuple[QwenConfig, dict[str, Any]]:
    """A published Qwen2.5-VL, tensor by tensor straight into arrays where they are to lie.

    On the host there is never more than one tensor beside the finished arrays.

    Args:
        folder: `config.json` and safetensors (one file, or shards with an index).
        mesh, layout: where the weights go; without a mesh to the default device.
        dtype: by default that of the files.
        only: the top-level subtree, or subtrees, that are read, such as `vision`; all by default.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        ValueError: another architecture or an unsupported option; missing, unexpected and
            misshapen names, listed together; a damaged file or index (see `sources.open_source`);
            a layout that does not fit a weight. Nothing is loaded before all of it is checked.
    """
    cfg = read_options(read_config(folder), str(Path(folder) / CONFIG_FILE))
    source = _open(folder, cfg)
    kinds = {source[piece.name].dtype for piece in table(cfg)}
    if dtype is None and len(kinds) > 1:
        names = ", ".join(sorted(map(str, kinds)))
        raise ValueError(f"{folder} holds tensors of {names}; say which dtype is wanted")
    dtype = np.dtype(kinds.pop() if dtype is None else dtype)
    if dtype.itemsize == 8 and not jax.config.jax_enable_x64:
        raise ValueError(f"{folder} is {dtype}; enable jax_enable_x64 or give a dtype")
    tree = declare(cfg)
    names = (only,) if isinstance(only, str) else only
    declared = flatten(split_params(tree, names)[0] if only else tree)
    if mesh is None:
        device = SingleDeviceSharding(jnp.zeros(()).device)
        where = {leaf: device for leaf in declared}
    else:
        where = flatten(param_shardings(unflatten(declared), mesh, layout))
    pieces: dict[str, list[Piece]] = {}
    for piece in table(cfg):
        pieces.setdefault(piece.leaf, []).append(piece)
    read = functools.partial(_read, source)
    leaves = {
        leaf: _place(pieces[leaf], weight, read, where[leaf], dtype)
        for leaf, weight in declared.items()
    }
    return cfg, unflatten(leaves)


def _open(folder: str | Path, cfg: QwenConfig) -> dict[str, Stored]:
    """Their tensors under the names that are written, checked against the table."""
    source: dict[str, Stored] = {}
    for name, stored in open_source(folder).items():
        ours = re.sub(r"^model\.visual\.", "visual.", name)
        ours = re.sub(r"^model\.language_model\.", "model.", ours)
        if ours in source:
            raise ValueError(f"{folder} holds {ours} under two names, one of them {name}")
        source[ours] = stored
    shapes = _public_shapes(cfg)
    if cfg.tied and {_HEAD, _EMBED} <= set(source):
        _check_tied(folder, source.pop(_HEAD), source[_EMBED])
    numbers = ("float16", "bfloat16", "float32", "float64")
    problems = {
        "missing": [name for name in shapes if name not in source],
        "unexpected": [name for name in source if name not in shapes],
        "misshapen": [
            f"{name} is {list(source[name].shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if name in source and source[name].shape != shape
        ],
        "not floating point": [
            f"{name} is {source[name].dtype}"
            for name in shapes
            if name in source and source[name].dtype.name not in numbers
        ],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ValueError(f"{folder} does not hold the model of its {CONFIG_FILE}. {text}")
    return source


def _check_tied(folder: str | Path, head: Stored, embed: Stored) -> None:
    same = head.shape == embed.shape
    for first in range(0, head.shape[0] if same else 0, 4096):
        rows = (slice(first, first + 4096),)
        same = same and np.array_equal(head.read(rows), embed.read(rows))
    if not same:
        raise ValueError(f"{folder}: {CONFIG_FILE} ties the head, but {_HEAD} is not {_EMBED}")


def _read(source: Mapping[str, Stored], piece: Piece) -> np.ndarray:
    """One piece as the file holds it, but for the patch embedding as a matrix (out, in)."""
    part = source[piece.name].read((slice(piece.rows, piece.rows + piece.shape[0]),))
    return part.reshape(len(part), -1) if piece.transposed else part


def _place(
    pieces: list[Piece], weight: ParamSpec, read: Any, sharding: Any, dtype: Any
) -> jax.Array:
    """One leaf; a stacked one is born empty and filled a layer at a time, in place.

    Devices are sent rows as they lie in the file; they turn and cast them.
    """
    turned, layered = pieces[0].transposed, pieces[0].layer is not None
    theirs = sharding
    if isinstance(sharding, NamedSharding):
        axes = sharding.spec[1:] if layered else tuple(sharding.spec)
        theirs = NamedSharding(sharding.mesh, PartitionSpec(*(axes[::-1] if turned else axes)))
    convert, empty, fill = _programs(turned, np.dtype(dtype), sharding)
    if not layered:
        return convert(_put(read(pieces[0]), theirs))
    stack = empty(weight.shape)
    for piece in pieces:
        # Waiting keeps later layers from being read while this one is still on its way.
        stack = fill(stack, _put(read(piece), theirs), piece.layer).block_until_ready()
    return stack


@functools.lru_cache(maxsize=64)
def _programs(turned: bool, dtype: np.dtype, sharding: Any) -> tuple[Any, Any, Any]:
    """To convert a matrix, to begin a stack, to fill in a layer: each compiled once for all leaves
    of one shape, and for folders read later."""
    convert = lambda part: (part.T if turned else part).astype(dtype)

    def fill(stack, part, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, convert(part), layer, 0)

    there = {"out_shardings": sharding}
    empty = jax.jit(lambda shape: jnp.zeros(shape, dtype), static_argnums=0, **there)
    return jax.jit(convert, **there), empty, jax.jit(fill, donate_argnums=0, **there)


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    parts, last, part = [], None, array
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        if str(index) != last:
            last, part = str(index), np.ascontiguousarray(array[index])
        parts.append(jax.device_put(part, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


# ----------------------------------------------------------------------------------------- writing


def export(
    params: Tree,
    cfg: QwenConfig,
    folder: str | Path,
    *,
    processor: str | Path | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that `transformers` and `load` read.

    Args:
        params: arrays, or Stored that are read when their turn comes.
        processor: a folder whose tokenizer, image processor and chat template are copied.
        extra: further entries of config.json, e.g. `eos_token_id`.
        overwrite: replace a folder that this function wrote before.

    Raises:
        ValueError: `params` is not a tree of `cfg`, or `cfg` has no tower.
        FileExistsError, OSError: as `files.write_tensors`.
    """
    tensors = public_view(params, cfg)
    kinds = {stored.dtype for stored in tensors.values()}
    if len(kinds) != 1:
        raise ValueError(f"params: expected one dtype, got {', '.join(sorted(map(str, kinds)))}")
    options = {**public_options(cfg), "torch_dtype": str(kinds.pop()), **(extra or {})}
    texts = {CONFIG_FILE: json.dumps(options, indent=2) + "\n"}
    if processor is not None:
        found = [Path(processor) / name for name in PROCESSOR_FILES]
        texts |= {file.name: file.read_text("utf-8") for file in found if file.exists()}
        if "tokenizer_config.json" not in texts:
            raise FileNotFoundError(f"{processor} holds no tokenizer_config.json")
    write_tensors(folder, tensors, texts, overwrite=overwrite)


def public_view(params: Tree, cfg: QwenConfig) -> dict[str, Stored]:
    """The public tensors of a tree, made when they are read.

    Raises:
        ValueError: `params` is not a tree of `cfg`; all that differs is listed.
    """
    declared, leaves = flatten(declare(cfg)), flatten(params)
    problems = [f"missing {name}" for name in declared if name not in leaves]
    problems += [f"unexpected {name}" for name in leaves if name not in declared]
    problems += [
        f"{name} is {list(leaves[name].shape)}, expected {list(weight.shape)}"
        for name, weight in declared.items()
        if name in leaves and tuple(leaves[name].shape) != weight.shape
    ]
    if problems:
        raise ValueError(f"not the parameters of the configuration: {'; '.join(problems)}")
    held: dict[str, list[Piece]] = {}
    for piece in table(cfg):
        held.setdefault(piece.name, []).append(piece)

    def stored(name: str, shape: tuple[int, ...]) -> Stored:
        pieces = sorted(held[name], key=lambda piece: piece.rows)

        def read(index: tuple = ()) -> np.ndarray:
            parts = [_part(leaves[p.leaf], p) for p in pieces]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            return whole[index] if index else whole

        return Stored(shape, np.dtype(leaves[pieces[0].leaf].dtype), "the tree", read)

    return {name: stored(name, shape) for name, shape in _public_shapes(cfg).items()}


def _part(leaf: Any, piece: Piece) -> np.ndarray:
    if isinstance(leaf, Stored):
        layer = () if piece.layer is None else (slice(piece.layer, piece.layer + 1),)
        array = leaf.read(layer)[0] if layer else leaf.read()
    else:
        array = np.asarray(leaf if piece.layer is None else leaf[piece.layer])
    array = array.T if piece.transposed else array
    return np.ascontiguousarray(array).reshape(piece.shape)

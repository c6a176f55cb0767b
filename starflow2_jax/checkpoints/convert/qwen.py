"""Convert Qwen2.5-VL folders as published on Hugging Face to our tree and back.

In the published vision tower, q, k and v share one matrix, and the patch embedding is a
convolution. Two styles of names are read, `model.layers...` with `visual...` and
`model.language_model...` with `model.visual...`. The first is written: every release of
transformers reads it.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from starflow2_jax.checkpoints.convert.qwen_options import public_options, read_options
from starflow2_jax.checkpoints.convert.tensor_map import (
    Piece,
    published_shapes,
    read_rows,
    to_published,
)
from starflow2_jax.checkpoints.model_folder import CONFIG_FILE, check, read_config, write_tensors
from starflow2_jax.checkpoints.tensor_files import (
    StoredTensor,
    compare,
    open_source,
    raise_problems,
)
from starflow2_jax.models.qwen import QwenConfig, declare
from starflow2_jax.params import (
    ParamSpec,
    Tree,
    flatten,
    shardings as param_shardings,
    split as split_params,
    unflatten,
)

# Files that the tokenizer, the image processor and the chat template are read from.
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


def table(cfg: QwenConfig) -> list[Piece]:
    """Return the table of names of `cfg`. The pieces of a leaf are neighbors."""
    pieces = []
    for leaf, spec in flatten(declare(cfg)).items():
        stem, _, kind = leaf.rpartition("/")
        tower, layered, inner = stem.rpartition("layers/")
        transposed = kind == "weight" and not leaf.startswith("embed/") and "norm" not in leaf
        if not layered:
            shape = spec.shape[::-1] if transposed else spec.shape
            if cfg.vision is not None and leaf == "vision/patch/weight":
                vision = cfg.vision
                shape = (vision.width, vision.channels, vision.frames, vision.patch, vision.patch)
            pieces.append(Piece(f"{_NAMES[stem]}.{kind}", shape, 0, leaf, None, transposed))
            continue
        is_vision = tower == "vision/"
        names = _VISION_LAYER_NAMES if is_vision else _LAYER_NAMES
        shape = spec.shape[1:] if kind == "bias" else spec.shape[:0:-1]
        first_row = shape[0] * _FUSED.index(inner) if is_vision and inner in _FUSED else 0
        prefix = "visual.blocks" if is_vision else "model.layers"
        for layer in range(spec.shape[0]):
            name = f"{prefix}.{layer}.{names[inner]}.{kind}"
            pieces.append(Piece(name, shape, first_row, leaf, layer, transposed))
    return pieces


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    layout: str = "fsdp",
    dtype: Any = None,
    *,
    only: str | tuple[str, ...] = "",
) -> tuple[QwenConfig, dict[str, Any]]:
    """Load a published Qwen2.5-VL, tensor by tensor straight into arrays on their devices.

    The host never holds more than one tensor in addition to the finished arrays. Names, shapes and
    options are checked before anything is loaded.

    A folder that this package wrote is compared with its digests first.

    Args:
        only: the top-level subtree, or subtrees, to load, such as `vision`; all by default.
    """
    check(folder)
    cfg = read_options(read_config(folder), str(Path(folder) / CONFIG_FILE))
    source = _open(folder, cfg)
    pieces: dict[str, list[Piece]] = {}
    for piece in table(cfg):
        pieces.setdefault(piece.leaf, []).append(piece)
    dtypes = {tensor.dtype for tensor in source.values()}
    if dtype is None and len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{folder} holds tensors of {names}; say which dtype to use")
    dtype = np.dtype(dtypes.pop() if dtype is None else dtype)
    # jax adds the attributes of its configuration at run time.
    if dtype.itemsize == 8 and not jax.config.jax_enable_x64:  # pyright: ignore
        raise ValueError(f"{folder} is {dtype}; enable jax_enable_x64 or give a dtype")
    tree = declare(cfg)
    names = (only,) if isinstance(only, str) else only
    declared = flatten(split_params(tree, names)[0] if only else tree)
    if mesh is None:
        device = SingleDeviceSharding(jnp.zeros(()).device)
        shardings = {leaf: device for leaf in declared}
    else:
        shardings = flatten(param_shardings(unflatten(declared), mesh, layout))
    leaves = {
        leaf: _load_leaf(source, pieces[leaf], spec, shardings[leaf], dtype)
        for leaf, spec in declared.items()
    }
    return cfg, unflatten(leaves)


def _open(folder: str | Path, cfg: QwenConfig) -> dict[str, StoredTensor]:
    """Return the published tensors under the names of the table, with names and shapes checked."""
    source: dict[str, StoredTensor] = {}
    for stored_name, tensor in open_source(folder).items():
        name = re.sub(r"^model\.visual\.", "visual.", stored_name)
        name = re.sub(r"^model\.language_model\.", "model.", name)
        if name in source:
            raise ValueError(f"{folder} holds {name} under two names, one of them {stored_name}")
        source[name] = tensor
    if cfg.tied and {_HEAD, _EMBED} <= set(source):
        _check_tied(folder, source.pop(_HEAD), source[_EMBED])
    shapes = published_shapes(table(cfg))
    floats = ("float16", "bfloat16", "float32", "float64")
    problems = compare(source, shapes)
    problems["not floating point"] = [
        f"{name} is {source[name].dtype}"
        for name in shapes
        if name in source and source[name].dtype.name not in floats
    ]
    raise_problems(f"{folder} does not hold the model of its {CONFIG_FILE}", problems)
    return source


def _check_tied(folder: str | Path, head: StoredTensor, embed: StoredTensor) -> None:
    equal = head.shape == embed.shape
    for first in range(0, head.shape[0] if equal else 0, 4096):
        rows = (slice(first, first + 4096),)
        equal = equal and np.array_equal(head.read(rows), embed.read(rows))
    if not equal:
        raise ValueError(f"{folder}: {CONFIG_FILE} ties the head, but {_HEAD} is not {_EMBED}")


def _load_leaf(
    source: Mapping[str, StoredTensor],
    pieces: list[Piece],
    spec: ParamSpec,
    sharding: Any,
    dtype: Any,
) -> jax.Array:
    """Load one leaf. A stacked leaf is created empty and filled one layer at a time, in place.

    Devices receive rows as they are stored, and transpose and cast them.
    """
    transposed, stacked = pieces[0].transposed, pieces[0].layer is not None
    row_sharding = sharding
    if isinstance(sharding, NamedSharding):
        axes = sharding.spec[1:] if stacked else tuple(sharding.spec)
        axes = axes[::-1] if transposed else axes
        row_sharding = NamedSharding(sharding.mesh, PartitionSpec(*axes))
    convert, empty, fill = _programs(transposed, np.dtype(dtype), sharding)
    if not stacked:
        return convert(_put(read_rows(source, pieces[0]), row_sharding))
    stack = empty(spec.shape)
    for piece in pieces:
        # Without waiting, later layers would be read while this one is still being copied.
        rows = _put(read_rows(source, piece), row_sharding)
        stack = fill(stack, rows, piece.layer).block_until_ready()
    return stack


@functools.lru_cache(maxsize=64)
def _programs(transposed: bool, dtype: np.dtype, sharding: Any) -> tuple[Any, Any, Any]:
    """Return jitted functions that convert a matrix, create a stack, and fill in one layer.

    Each is compiled once for all leaves of one shape, also for folders that are read later.
    """

    def convert(rows: jax.Array) -> jax.Array:
        return (rows.T if transposed else rows).astype(dtype)

    def empty(shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros(shape, dtype)

    def fill(stack: jax.Array, rows: jax.Array, layer: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, convert(rows), layer, 0)

    return (
        jax.jit(convert, out_shardings=sharding),
        jax.jit(empty, static_argnums=0, out_shardings=sharding),
        jax.jit(fill, donate_argnums=0, out_shardings=sharding),
    )


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    """Copy an array to its devices, one device at a time, to need little host memory."""
    parts, last, part = [], None, array
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        if str(index) != last:
            last, part = str(index), np.ascontiguousarray(array[index])
        parts.append(jax.device_put(part, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def export(
    params: Tree,
    cfg: QwenConfig,
    folder: str | Path,
    *,
    processor: str | Path | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that `transformers` and `load` can read.

    Args:
        processor: a folder whose tokenizer, image processor and chat template are copied.
        extra: further entries of config.json, e.g. `eos_token_id`.
    """
    tensors = to_published(table(cfg), params, declare(cfg))
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1:
        raise ValueError(f"params: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    options = {**public_options(cfg), "torch_dtype": str(dtypes.pop()), **(extra or {})}
    texts = {CONFIG_FILE: json.dumps(options, indent=2) + "\n"}
    if processor is not None:
        files = [Path(processor) / name for name in PROCESSOR_FILES]
        texts |= {file.name: file.read_text("utf-8") for file in files if file.exists()}
        if "tokenizer_config.json" not in texts:
            raise FileNotFoundError(f"{processor} holds no tokenizer_config.json")
    write_tensors(folder, tensors, texts, overwrite=overwrite)

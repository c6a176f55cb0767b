"""State dicts of ml-tarflow and ml-starflow to our tree and back, by one table of names.

Theirs: linears (out, in), the rows of q, k and v in one matrix, one tensor a layer. Ours: linears
(in, out), `query`, `key` and `value` apart, layers stacked on the leading axis.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from starflow2_jax.checkpoints.convert import starflow_options
from starflow2_jax.checkpoints.convert.starflow_options import find_family, image_of, read_options
from starflow2_jax.checkpoints.tensor_files import Index, Stored, open_source
from starflow2_jax.models.flow import FlowConfig, declare
from starflow2_jax.params import Tree, flatten, unflatten

# Ours to theirs, within a block; of the gated MLP's names those that differ.
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
_DEAD = re.compile(r"blocks\.\d+\.attn_mask|var|feat_rope\.freqs_(cos|sin)")
_DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float64)))


@dataclass(frozen=True)
class Public:
    """One tensor of theirs: where its rows go in our tree, in order.

    Attributes:
        leaves: names of our leaves, each of which holds some of its rows.
        rows: how many rows each leaf holds.
        layer: index on our leading axis, None outside the layers.
        transposed: whether ours is (in, out).
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[str, ...]
    rows: tuple[int, ...]
    layer: int | None
    transposed: bool


def table(cfg: FlowConfig) -> list[Public]:
    """Every tensor of the public state dict of `cfg`, buffers left out."""
    names = {**_NAMES, **(_GATED_NAMES if cfg.gated_mlp else {})}
    order = {leaf: i for i, leaf in enumerate(names)}
    rows: dict[str, dict[str, tuple[int, ...]]] = {}
    for leaf, weight in flatten(declare(cfg)).items():
        _, block, inner = leaf.split("/", 2)
        stem, _, kind = inner.rpartition("/") if inner not in names else (inner, "", "")
        ending = f"{names[stem]}.{kind}" if kind else names[stem]
        if stem.startswith("layers/"):
            for layer in range(weight.shape[0]):
                public = f"blocks.{block}.attn_blocks.{layer}.{ending}"
                rows.setdefault(public, {})[leaf] = weight.shape[1:]
        else:
            rows[f"blocks.{block}.{ending}"] = {leaf: weight.shape}

    def public(name: str, held: dict[str, tuple[int, ...]]) -> Public:
        def place(leaf: str) -> int:
            inner = leaf.split("/", 2)[2]
            return order[inner if inner in order else inner.rpartition("/")[0]]

        leaves = tuple(sorted(held, key=place))
        shapes = [held[leaf] for leaf in leaves]
        transposed = leaves[0].endswith("/weight") and len(shapes[0]) == 2
        shapes = [shape[::-1] if transposed else shape for shape in shapes]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        if name.endswith("sos_embed"):
            shape = (1, 1, *shape)
        elif name.endswith("class_embed"):
            shape = (shape[0], 1, shape[1])
        layer = re.search(r"attn_blocks\.(\d+)\.", name)
        counts = tuple(s[0] for s in shapes)
        return Public(name, shape, leaves, counts, int(layer[1]) if layer else None, transposed)

    return [public(name, held) for name, held in rows.items()]


def load(
    mapping_or_path: Mapping[str, Any] | str | Path,
    options: Mapping[str, Any] | str | Path,
) -> tuple[FlowConfig, dict[str, Any]]:
    """A public TarFlow or STARFlow.

    Args:
        mapping_or_path: arrays by public name, or what `sources.open_source` reads.
        options: the run's options, as `starflow_options.read_options` takes them.

    Returns:
        the configuration, and parameters as numpy arrays in the file's dtype (float32, bfloat16 or
        float64); tensors are read one at a time.

    Raises:
        ValueError: bad options; or missing, unexpected and misshapen names, listed together; or a
            tensor of another dtype; or a TarFlow whose prior variance is not one.
        FileNotFoundError, ImportError: as `open_source`.
    """
    source = open_source(mapping_or_path)
    cfg, _ = describe(source, options)
    leaves = flatten(tree_view(source, cfg))
    return cfg, unflatten({name: stored.read() for name, stored in leaves.items()})


def describe(
    source: Mapping[str, Stored], options: Mapping[str, Any] | str | Path
) -> tuple[FlowConfig, dict[str, Any]]:
    """(configuration, image) of an opened state dict, whose names and shapes are checked.

    `image` is that of `starflow_options.image_of`.
    """
    given = read_options(options)[0]
    family = find_family(given, set(source))
    shapes = {name: stored.shape for name, stored in source.items()}
    cfg = starflow_options.flow_config(given, family, shapes)
    _check(source, cfg, family)
    return cfg, image_of(given, family)


def _check(source: Mapping[str, Stored], cfg: FlowConfig, family: str) -> None:
    expected = {public.name: public.shape for public in table(cfg)}
    # Of the buffers `var` alone is looked at: with RoPE no weight tells the side of the grid.
    known = {**expected, **({"var": (cfg.tokens, cfg.channels)} if "var" in source else {})}
    denoiser = [name for name in source if name.startswith("learnable_self_denoiser.")]
    if denoiser:
        raise ValueError(f"{denoiser[0]}: the video model's self-denoiser is not converted")
    missing = [name for name in expected if name not in source]
    unexpected = [n for n in source if n not in expected and not _DEAD.fullmatch(n)]
    both = [name for name in expected if name in source]
    misshapen = [
        f"{name} is {list(source[name].shape)}, expected {list(shape)}"
        for name, shape in known.items()
        if name in source and source[name].shape != shape
    ]
    kinds = sorted({source[name].dtype.name for name in both if source[name].dtype in _DTYPES})
    odd = [f"{n} is {source[n].dtype}" for n in both if source[n].dtype not in _DTYPES]
    if not odd and len(kinds) > 1:
        odd = [f"{n} is {source[n].dtype}" for n in both if source[n].dtype.name != kinds[0]]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not of one dtype of float32, bfloat16, float64": odd,
    }
    if any(problems.values()):
        text = "; ".join(f"{len(n)} {kind}: {', '.join(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"the state dict is not the {family} that the options describe. {text}")
    if family == "tarflow" and "var" in source:
        var = source["var"].read()
        if not np.all(var == 1):
            raise ValueError(
                f"var: a prior variance other than one (up to {np.max(np.abs(var - 1)):.3g} off; "
                "nvp was off in training) is not converted"
            )


def tree_view(source: Mapping[str, Stored], cfg: FlowConfig) -> dict[str, Any]:
    """Our tree of a checked state dict, as tensors that are put together when they are read."""
    pieces: dict[str, list[tuple[Public, int, int]]] = {}
    for public in table(cfg):
        first = 0
        for leaf, count in zip(public.leaves, public.rows):
            pieces.setdefault(leaf, []).append((public, first, count))
            first += count

    def stored(leaf: str, shape: tuple[int, ...]) -> Stored:
        dtype = source[pieces[leaf][0][0].name].dtype

        def read(index: Index = ()) -> np.ndarray:
            whole = np.empty(shape, dtype)
            for public, first, count in pieces[leaf]:
                target = whole if public.layer is None else whole[public.layer]
                rows = (slice(first, first + count),) if len(public.leaves) > 1 else ()
                part = source[public.name].read(rows)
                target[...] = part.T if public.transposed else part.reshape(target.shape)
            return whole[index] if index else whole

        return Stored(shape, dtype, "the state dict", read)

    return unflatten({leaf: stored(leaf, w.shape) for leaf, w in flatten(declare(cfg)).items()})


def public_view(params: Tree, cfg: FlowConfig) -> dict[str, Stored]:
    """The public state dict of a tree (arrays or Stored), as tensors made when they are read.

    Raises:
        ValueError: `params` is not a tree of `cfg`; missing, unexpected and misshapen leaves are
            listed together.
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

    def stored(public: Public) -> Stored:
        def read(index: Index = ()) -> np.ndarray:
            parts = [_part(leaves[leaf], public.layer) for leaf in public.leaves]
            parts = [part.T if public.transposed else part for part in parts]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            whole = np.ascontiguousarray(whole).reshape(public.shape)
            return whole[index] if index else whole

        return Stored(public.shape, np.dtype(leaves[public.leaves[0]].dtype), "the tree", read)

    return {public.name: stored(public) for public in table(cfg)}


def _part(leaf: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it."""
    if isinstance(leaf, Stored):
        return leaf.read() if layer is None else leaf.read((slice(layer, layer + 1),))[0]
    return np.asarray(leaf if layer is None else leaf[layer])


def export(params: Tree, cfg: FlowConfig) -> dict[str, np.ndarray]:
    """The public state dict, buffers left out: fused qkv, linears (out, in), the dtype kept.

    Raises:
        ValueError: as `public_view`.
    """
    return {name: stored.read() for name, stored in public_view(params, cfg).items()}


def options(cfg: FlowConfig, image: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The run options of `cfg` in the constructor's vocabulary, as `load` takes them.

    Args:
        image: `{"pixels", "patch", "layout"}`; by default patches of one pixel.

    Raises:
        ValueError: a flow that neither public code can be.
    """
    return starflow_options.public_options(cfg, image)

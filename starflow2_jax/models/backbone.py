"""The interface of models that read and write rows of interleaved text and images.

A model is a config dataclass that implements `BackboneConfig`: `starflow2.PretzelConfig`, or one of
the alternatives in `models.ablations`. Training, scoring and decoding call `cfg.forward` with
`BackboneInputs`. The shallow flow and the heads are those of `models.starflow2` for every model.

Shapes: B rows, T positions, S slots of a cache, D latent channels, V width of the VLM, C width of
the flow. Each position holds one item, a text token or an image patch; heads predict the next item.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.models import layers, qwen, rope
from starflow2_jax.models.flow import BlockConfig, FlowConfig
from starflow2_jax.models.layers import KVCache, LayerConfig
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.params import Tree


@struct.dataclass
class BackboneInputs:
    """The items of interleaved rows."""

    ids: Any  #: int [B, T], token ids; any value at patches
    latents: Any  #: [B, T, D], u of the patch at each position, zeros at text
    #: [B, T, D], the latents as the adapter reads them, detached in training; None leaves the
    #: adapter out, and the VLM reads zeros at patches
    adapter_input: Any
    is_image: Any  #: bool [B, T], True at patches
    positions: Any  #: int [B, T, 3], M-RoPE positions of the VLM
    next_positions: Any  #: int [B, T, 3], (row, column, k) in the deep flow of the items to predict
    #: The same of the items themselves, for `flow.key_positions="own"`; None derives them from
    #: `next_positions` and `segments`, which needs whole rows, without a mask
    item_positions: Any = None
    mask: Any = None  #: as in `attention.grouped_query_attention`
    segments: Any = None  #: int [B, T], the same; attention is causal if both are None
    text_embeddings: Any = None  #: [B, T, V] in place of the VLM's embeddings of `ids`


@struct.dataclass
class BackboneOutputs:
    """The states at every position, from which the heads predict the next item."""

    vlm_states: jax.Array  #: y [B, T, V], after the VLM's final norm
    #: h [B, T, C], before the flow's final norm; None if the flow was left out
    flow_states: jax.Array | None
    #: [B, T], share of the VLM's skip in the flow's input at patches; None without that skip
    vlm_skip_ratio: jax.Array | None = None
    caches: tuple[KVCache, ...] | None = None  #: the extended caches, None without caches


class BackboneConfig(Protocol):
    """The config of a model, with the functions by which models differ.

    Attributes:
        kind: value of `model.kind` in an experiment.
        deep: options of the block that predicts images; its head is that of `flow.head`.
        num_patches: N, patches of an image.
        skips: the skip connections in use, among `vlm` and `deep`.
        stacks: (layer config, number of layers) of every stack that has a KV cache.
        image_subtrees, text_subtrees: subtrees whose training needs the loss of images, of text.
    """

    @property
    def kind(self) -> str: ...
    @property
    def vlm(self) -> QwenConfig: ...
    @property
    def flow(self) -> FlowConfig: ...
    @property
    def deep(self) -> BlockConfig: ...
    @property
    def num_patches(self) -> int: ...
    @property
    def skips(self) -> tuple[str, ...]: ...
    @property
    def stacks(self) -> tuple[tuple[LayerConfig, int], ...]: ...
    @property
    def image_subtrees(self) -> frozenset[str]: ...
    @property
    def text_subtrees(self) -> frozenset[str]: ...

    def declare(self) -> dict[str, Any]:
        """Declare every parameter, in subtrees: `vlm`, and some of `starflow2.SUBTREES`."""
        ...

    def forward(
        self,
        params: Tree,
        inputs: BackboneInputs,
        *,
        caches: tuple[KVCache, ...] | None = None,
        with_flow: bool = True,
        with_skips: bool = True,
    ) -> BackboneOutputs:
        """Apply both streams to interleaved rows.

        Args:
            params: with caches, as `unstack` lays them out.
            caches: of earlier positions (see `empty_caches`); they require `inputs.mask`.
            with_flow, with_skips: False leaves them out; leaving out skips that are zero is exact.
        """
        ...


def text_embeddings(params: Tree, inputs: BackboneInputs, cfg: QwenConfig) -> jax.Array:
    """Return the VLM's token embeddings [B, T, V] of the inputs."""
    if inputs.text_embeddings is not None:
        return inputs.text_embeddings
    return qwen.embed(params["vlm"], inputs.ids, cfg)


def flow_positions(inputs: BackboneInputs, cfg: FlowConfig) -> rope.Positions:
    """Return the positions in the deep flow that the queries and the keys of the inputs carry."""
    if cfg.key_positions == "next":
        return rope.Positions(inputs.next_positions)
    return rope.Positions(inputs.next_positions, item_positions(inputs))


def item_positions(inputs: BackboneInputs) -> jax.Array:
    """Return the (row, column, k) int [B, T, 3] of the items themselves in the deep flow.

    An item stands where the one before it predicts it; the first of each record, a token, at 0.
    """
    if inputs.item_positions is not None:
        return inputs.item_positions
    if inputs.mask is not None:
        raise ValueError(
            "BackboneInputs.item_positions is None, but flow.key_positions='own' with a mask needs "
            "the positions of the items themselves"
        )
    predicted = jnp.pad(inputs.next_positions[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if inputs.segments is None:
        return predicted
    is_first = jnp.pad(inputs.segments[:, 1:] != inputs.segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(is_first[..., None], 0, predicted)


def empty_caches(
    cfg: BackboneConfig, batch_size: int, size: int, dtypes: tuple[Any, ...]
) -> tuple[KVCache, ...]:
    """Return empty caches of `size` slots, of the VLM and the deep flow in these dtypes."""
    return tuple(
        layers.empty_cache(layer, num_layers, batch_size, size, dtype)
        for (layer, num_layers), dtype in zip(cfg.stacks, dtypes)
    )


def unstack(params: Tree) -> dict[str, Any]:
    """Return params with the layers of both streams unstacked, as `forward` with caches needs."""
    vlm = {**params["vlm"], "layers": layers.unstack(params["vlm"]["layers"])}
    deep = {**params["deep"], "layers": layers.unstack(params["deep"]["layers"])}
    return {**params, "vlm": vlm, "deep": deep}

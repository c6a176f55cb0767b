"""Floating-point operations and bytes of the models, counted from their configs and parameters.

A multiply-add counts 2. Norms, activations and the softmax are left out.
"""

from collections.abc import Iterable

from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.params import Tree, count


def matrix_parameters(cfg: FlowConfig, index: int) -> tuple[int, int]:
    """Return the matrix parameters of a block for all positions, and for image tokens only."""
    block = cfg.block(index)
    layer = block.layer
    projections = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    mlp = (3 if layer.gated else 2) * layer.mlp_width
    return block.depth * layer.width * (projections + mlp), 3 * cfg.channels * layer.width


def block_forward(
    cfg: FlowConfig, index: int, tokens: int, text_length: int = 0, causal: bool = False
) -> int:
    """Return the FLOPs of one row's forward pass through one block; arguments as in `forward`."""
    block = cfg.block(index)
    if not block.depth:
        return 0
    text_length = text_length if block.text else 0
    length = tokens + text_length
    everywhere, image_only = matrix_parameters(cfg, index)
    total = 2 * (everywhere * length + image_only * tokens)
    total += 2 * cfg.text_channels * block.layer.width * text_length
    scores = 4 * length**2 * block.layer.heads * block.layer.head_dim * block.depth
    return total + (scores // 2 if causal else scores)


def forward(cfg: FlowConfig, tokens: int, text_length: int = 0, causal: bool = False) -> int:
    """Return the FLOPs of one row's forward pass.

    `causal` counts only the half of the attention scores that a causal mask keeps. The default, the
    full square, is the convention of model FLOPs utilization.
    """
    return sum(block_forward(cfg, i, tokens, text_length, causal) for i in range(len(cfg.layers)))


def train_step(cfg: FlowConfig, batch: int, tokens: int, text_length: int = 0) -> int:
    """Return the FLOPs of a training step: three forward passes, attention over the full square."""
    return 3 * batch * forward(cfg, tokens, text_length)


def pass_bytes(
    cfg: FlowConfig, index: int, rows: int, tokens: int, text_length: int = 0, itemsize: int = 4
) -> int:
    """Return the bytes that one decoding pass of a block reads at least.

    They are its matrices, and keys and values of half of the tokens and all of the text.
    """
    block = cfg.block(index)
    if not block.depth:
        return 0
    cached_positions = tokens // 2 + (text_length if block.text else 0)
    cached = 2 * rows * cached_positions * block.layer.kv_heads * block.layer.head_dim * block.depth
    return itemsize * (sum(matrix_parameters(cfg, index)) + cached)


def interleaved_step(
    cfg: BackboneConfig,
    declared: Tree,
    trainable: Iterable[str],
    *,
    length: int,
    num_images: int,
    num_targets: int,
    vlm_length: int = 0,
) -> int:
    """Return the FLOPs of a training step of one interleaved row.

    A parameter costs 2 FLOPs per position forward, 2 for the gradient of its input and 2 for its
    own; attention counts the full square.

    Args:
        declared: of `cfg.declare()`.
        num_targets: target tokens of the row at most, the positions of the vocabulary's head.
        vlm_length: positions of the row to which the VLM is applied, 0 for `length`.
    """
    vlm_length = vlm_length or length
    names = set(trainable)
    images, text = bool(names & cfg.image_subtrees), bool(names & cfg.text_subtrees)

    def attention_flops(layer, num_layers, length=length):
        return 4 * length**2 * layer.heads * layer.head_dim * num_layers

    def passes(has_backward):
        return 3 if has_backward else 1

    language = count({**declared["vlm"], "embed": {}, "head": {}})
    total = language * vlm_length * (2 + 2 * text + 2 * ("vlm" in names))
    total += attention_flops(cfg.vlm.layer, cfg.vlm.layers, vlm_length) * passes(text)
    # The logits are recomputed in the backward pass.
    total += 6 * text * cfg.vlm.vocab * cfg.vlm.width * num_targets
    shallow = range(len(cfg.flow.layers) - 1)
    shallow_flops = sum(block_forward(cfg.flow, i, cfg.num_patches) for i in shallow)
    total += num_images * passes("shallow" in names) * shallow_flops
    if images:
        total += 6 * count(declared["deep"]) * length
        total += 3 * attention_flops(cfg.deep.layer, cfg.deep.depth)
    if text:
        total += 6 * count(declared.get("adapter", {})) * length
    if text and images:
        # The flow's skip is applied at target tokens alone, every other one at all positions.
        for name, tree in declared.get("skip", {}).items():
            total += 6 * count(tree) * (num_targets if name == "deep" else length)
    return total

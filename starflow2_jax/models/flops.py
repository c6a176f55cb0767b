"""Floating-point operations and bytes of a flow, counted from its configuration.

A multiply-add counts 2. Norms, activations and the softmax are left out.
"""

from collections.abc import Iterable

from starflow2_jax.models.attention import CAUSAL_CHUNKS
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.params import Tree, count


def matrix_parameters(cfg: FlowConfig, index: int) -> tuple[int, int]:
    """Weights that multiply every position of a block, and those only of image tokens."""
    block = cfg.block(index)
    layer = block.layer
    projections = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    mlp = (3 if layer.gated else 2) * layer.mlp_width
    return block.depth * layer.width * (projections + mlp), 3 * cfg.channels * layer.width


def block_forward(
    cfg: FlowConfig, index: int, tokens: int, text_length: int = 0, causal: bool = False
) -> int:
    """FLOPs of one row's forward pass through one block; arguments as in `forward`."""
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
    """FLOPs of one row's forward pass.

    Args:
        tokens: T image tokens; text_length: text positions given to the blocks that read text.
        causal: count only the half of the attention scores that a causal mask keeps; otherwise the
            full square, as model FLOPs utilisation is usually reported.
    """
    each = (block_forward(cfg, i, tokens, text_length, causal) for i in range(len(cfg.layers)))
    return sum(each)


def train_step(cfg: FlowConfig, batch: int, tokens: int, text_length: int = 0) -> int:
    """FLOPs of a training step: three forward passes, attention over the full square."""
    return 3 * batch * forward(cfg, tokens, text_length)


def executed_step(cfg: FlowConfig, batch: int, tokens: int, text_length: int = 0) -> int:
    """FLOPs that a training step really computes by the plain attention path.

    Of the scores those in `CAUSAL_CHUNKS`, and again what the model's `remat` does not keep: with
    `full` all but each layer's last product, with `dots` the attention.
    """
    share = (CAUSAL_CHUNKS + 1) / (2 * CAUSAL_CHUNKS)
    total = 0.0
    for i, depth in enumerate(cfg.layers):
        block = cfg.block(i)
        length = tokens + (text_length if block.text else 0)
        scores = 4 * length**2 * block.layer.heads * block.layer.head_dim * depth * share
        products = block_forward(cfg, i, tokens, text_length) - scores / share
        last = 2 * depth * block.layer.width * block.layer.mlp_width * length
        again = {"none": 0.0, "dots": scores, "full": scores + products - last}[cfg.remat]
        total += 3 * (products + scores) + again if depth else 0.0
    return round(batch * total)


def pass_bytes(
    cfg: FlowConfig, index: int, rows: int, tokens: int, text_length: int = 0, itemsize: int = 4
) -> int:
    """Bytes that one decoding pass of a block reads at least: its matrices, and the keys and values
    of the positions so far, taken as half of the tokens and all of the text.
    """
    block = cfg.block(index)
    if not block.depth:
        return 0
    seen = tokens // 2 + (text_length if block.text else 0)
    cached = 2 * rows * seen * block.layer.kv_heads * block.layer.head_dim * block.depth
    return itemsize * (sum(matrix_parameters(cfg, index)) + cached)


def interleaved_step(
    cfg: BackboneConfig,
    declared: Tree,
    trainable: Iterable[str],
    *,
    length: int,
    num_images: int,
    num_targets: int,
) -> int:
    """Return the FLOPs of a training step of one interleaved row.

    A parameter costs 2 FLOPs per position forward, 2 for the gradient of its input and 2 for its
    own; attention counts the full square.

    Args:
        declared: of `cfg.declare()`.
        trainable: names of the subtrees that are trained.
        length: positions of the row.
        num_images: images of the row at most.
        num_targets: target tokens of the row at most, the positions of the vocabulary's head.
    """
    names = set(trainable)
    images, text = bool(names & cfg.image_subtrees), bool(names & cfg.text_subtrees)

    def attention_flops(layer, num_layers):
        return 4 * length**2 * layer.heads * layer.head_dim * num_layers

    def passes(has_backward):
        return 3 if has_backward else 1

    language = count({**declared["vlm"], "embed": {}, "head": {}})
    total = language * length * (2 + 2 * text + 2 * ("vlm" in names))
    total += attention_flops(cfg.vlm.layer, cfg.vlm.layers) * passes(text)
    # The logits are recomputed in the backward pass.
    total += 6 * text * cfg.vlm.vocab * cfg.vlm.width * num_targets
    shallow = range(len(cfg.flow.layers) - 1)
    shallow_flops = sum(block_forward(cfg.flow, i, cfg.patches) for i in shallow)
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

"""Floating-point operations and bytes of a flow, counted from its configuration.

A multiply-add counts 2. Norms, activations and the softmax are left out.
"""

from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.layers import CAUSAL_PARTS


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

    Of the scores those in `CAUSAL_PARTS`, and again what the model's `remat` does not keep: with
    `full` all but each layer's last product, with `dots` the attention.
    """
    share = (CAUSAL_PARTS + 1) / (2 * CAUSAL_PARTS)
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

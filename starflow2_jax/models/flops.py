"""Floating-point operations of a flow, counted from its configuration (2 per multiply-add)."""

from starflow2_jax.models.flow import FlowConfig


def matrix_parameters(cfg: FlowConfig, index: int) -> tuple[int, int]:
    """Weights that multiply every position of a block, and those only of image tokens."""
    block = cfg.block(index)
    layer = block.layer
    projections = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    mlp = (3 if layer.gated else 2) * layer.mlp_width
    return block.depth * layer.width * (projections + mlp), 3 * cfg.channels * layer.width


def forward(cfg: FlowConfig, tokens: int, text_length: int = 0, causal: bool = False) -> int:
    """FLOPs of one row's forward pass.

    Args:
        tokens: T image tokens; text_length: text positions given to the blocks that read text.
        causal: count only the half of the attention scores that a causal mask keeps; otherwise the
            full square, as model FLOPs utilisation is usually reported.
    """
    total = 0
    for i, depth in enumerate(cfg.layers):
        if not depth:
            continue
        block = cfg.block(i)
        length = tokens + (text_length if block.text else 0)
        everywhere, image_only = matrix_parameters(cfg, i)
        total += 2 * (everywhere * length + image_only * tokens)
        if block.text:
            total += 2 * cfg.text_channels * block.layer.width * text_length
        scores = 4 * length**2 * block.layer.heads * block.layer.head_dim * depth
        total += scores // 2 if causal else scores
    return total


def train_step(cfg: FlowConfig, batch: int, tokens: int, text_length: int = 0) -> int:
    """FLOPs of a training step: three forward passes, attention over the full square."""
    return 3 * batch * forward(cfg, tokens, text_length)

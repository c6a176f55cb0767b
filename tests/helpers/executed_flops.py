"""The FLOPs that a training step really executes, to compare with what is planned."""

from starflow2_jax.models.attention import CAUSAL_CHUNKS
from starflow2_jax.models.flops import block_forward


def executed_step(cfg, batch_size, tokens, text_length=0):
    """Return the FLOPs of a training step on the plain attention path.

    The scores are computed in `CAUSAL_CHUNKS` chunks. The backward pass recomputes what the model's
    `remat` does not keep: `full` all but each layer's last product, `dots` the attention.
    """
    share = (CAUSAL_CHUNKS + 1) / (2 * CAUSAL_CHUNKS)
    total = 0.0
    for i, depth in enumerate(cfg.layers):
        block = cfg.block(i)
        length = tokens + (text_length if block.text else 0)
        scores = 4 * length**2 * block.layer.heads * block.layer.head_dim * depth * share
        products = block_forward(cfg, i, tokens, text_length) - scores / share
        last = 2 * depth * block.layer.width * block.layer.mlp_width * length
        recomputed = {"none": 0.0, "dots": scores, "full": scores + products - last}[cfg.remat]
        total += 3 * (products + scores) + recomputed if depth else 0.0
    return round(batch_size * total)

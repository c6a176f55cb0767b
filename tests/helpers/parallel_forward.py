"""The forward pass over whole rows of message parts, which cached decoding has to equal."""

import jax
import jax.numpy as jnp
import numpy as np

from helpers.tiny_decode_model import CHANNELS, SIDE, TOKENIZER
from starflow2_jax.data import chat_layout
from starflow2_jax.inference import session
from starflow2_jax.inference.image_latents import shallow_forward
from starflow2_jax.models import starflow2
from starflow2_jax.models.attention import segment_mask
from starflow2_jax.models.backbone import BackboneInputs


def build_inputs(model, rows):
    """Return the inputs of whole rows, padded on the right, and which items are real."""
    sequences = [
        session.layout_parts(row, TOKENIZER, model.model_config.num_patches, null, "")
        for row, null in rows
    ]
    latents_of = lambda row: [p.latent for p in row if p.kind == "image"]
    blank = np.zeros((1, SIDE**2, CHANNELS), np.float32)
    u = [
        shallow_forward(model.params, np.array(latents_of(row), np.float32), model.model_config)[0]
        if latents_of(row)
        else blank
        for row, _ in rows
    ]
    fields = [
        {
            "ids": sequence.ids,
            "latents": np.where(
                (sequence.patch_index >= 0)[:, None],
                images[np.maximum(sequence.image_index, 0), np.maximum(sequence.patch_index, 0)],
                0,
            ),
            "is_image": sequence.patch_index >= 0,
            "positions": chat_layout.vlm_positions(sequence, SIDE),
            "next_positions": chat_layout.flow_positions(sequence, SIDE),
            "item_positions": chat_layout.item_flow_positions(sequence, SIDE),
        }
        for sequence, images in zip(sequences, u)
    ]
    length = max(len(row["ids"]) for row in fields)

    def stack(name):
        pad = [(0, 0)] * (fields[0][name].ndim - 1)
        padded = [np.pad(r[name], [(0, length - len(r[name])), *pad]) for r in fields]
        return jnp.asarray(np.stack(padded))

    is_real = np.stack([np.arange(length) < len(row["ids"]) for row in fields])
    stacked_fields = {name: stack(name) for name in fields[0]}
    return BackboneInputs(adapter_input=None, **stacked_fields), is_real


def heads(params, y, h, cfg):
    """Return (scale, mean, logits) of the next item at every position."""
    scale, mean = starflow2.image_head(params, h, cfg)
    logits = starflow2.text_logits(params, starflow2.text_states(params, y, h, cfg), cfg)
    return scale, mean, logits


def parallel(model, inputs, is_real):
    """Return the heads' outputs at every position of the rows, read at once."""
    cfg = model.model_config

    @jax.jit
    def forward(params):
        mask = segment_mask(jnp.asarray(is_real, jnp.int32))
        masked = inputs.replace(adapter_input=inputs.latents, mask=mask)
        states = starflow2.forward(params, masked, cfg)
        return heads(params, states.vlm_states, states.flow_states, cfg)

    return [np.asarray(output) for output in forward(model.params)]

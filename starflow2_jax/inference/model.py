"""A trained STARFlow2 as plain data: configuration, parameters, tokenizer and codec."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from starflow2_jax import config
from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.sampling import SpecialTokens
from starflow2_jax.latents.codec import Codec
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.params import Tree

if TYPE_CHECKING:  # heavy
    from starflow2_jax.data.chat_layout import Tokenizer


@dataclass(frozen=True)
class Model:
    """A trained STARFlow2."""

    cfg: Mapping[str, Any]  #: the resolved configuration of the training run
    model_config: BackboneConfig  #: sizes and options of the network
    params: Mapping[str, Any]  #: every parameter subtree, the VLM's included
    tokenizer: "Tokenizer"
    codec: Codec | None = None  #: the latent codec of images; None to read and return latents only
    source: str = ""  #: the path that the model was loaded from

    @functools.cached_property
    def decode_params(self) -> Tree:
        """The parameters laid out for the decode loop, a copy made on first use."""
        return decode_loop.prepare_params(self.params)

    @property
    def has_clean_copies(self) -> bool:
        """True if images that are targets are read again, clean, before a conversation goes on."""
        return config.context_sigma(self.cfg) is not None

    @functools.cached_property
    def special_tokens(self) -> SpecialTokens:
        """The token ids that the decode loop treats specially."""
        tokenizer, vlm = self.tokenizer, self.model_config.vlm
        delimiters = (tokenizer.vision_end, tokenizer.image, tokenizer.turn_start)
        return SpecialTokens(
            vision_start=tokenizer.vision_start,
            vision_end=tokenizer.vision_end,
            turn_ends=(tokenizer.turn_end, tokenizer.pad),
            banned=(*delimiters, vlm.video_token),
            vocab_size=min(tokenizer.vocab_size, vlm.vocab),
        )


def flow_is_trained(model: Model) -> bool:
    """Return whether the flow was trained: its output layer is initialized to zero."""
    return _any_nonzero(model.params["deep"]["proj_out"])


def adapter_is_trained(model: Model) -> bool:
    """Return whether the VLM can see images: the adapter's last layer is initialized to zero."""
    return "adapter" not in model.params or _any_nonzero(model.params["adapter"]["down"])


def _any_nonzero(tree: Tree) -> bool:
    return any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(tree))

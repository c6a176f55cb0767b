"""Decode a sampled image, in a worker thread while the rows go on.

Shapes: N patches, D latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from starflow2_jax.data.images import encode_png
from starflow2_jax.inference.clean_copies import clean_image
from starflow2_jax.inference.image_latents import shallow_forward, shallow_inverse
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.row_items import ImageValues
from starflow2_jax.inference.session import Session
from starflow2_jax.inference.turn import SampledItem, TurnStart
from starflow2_jax.latents import codec
from starflow2_jax.serving import image_store
from starflow2_jax.serving.image_store import StoredImage


@dataclass(frozen=True, eq=False)
class DrawnImage:
    """An image of an answer."""

    stored: StoredImage
    log_det: float  # nats of the shallow flow
    pixels: np.ndarray  # uint8 [H, W, 3]
    png: bytes
    digest: str  # sha256 of the pixels


@dataclass(frozen=True, eq=False)
class ImageRow:
    """The row that sampled an image, as `RowPool.row_session` returns it, for denoising."""

    session: Session
    start: TurnStart
    items: Sequence[SampledItem]  # of the answer
    first: int  # the item that began the image


def draw(model: Model, u: np.ndarray, row: ImageRow | None, *, denoise: bool) -> DrawnImage:
    """Return the image of sampled patches u [N, D].

    Args:
        row: needed to denoise, and by models that read clean copies; else None.
        denoise: whether the pixels are those of the denoised image.
    """
    cfg = model.model_config
    x = shallow_inverse(model.params, u[None], cfg)
    log_det = float(shallow_forward(model.params, x, cfg)[1][0])
    latent = clean_latent = denoised = x[0]
    clean_u = u
    if row is not None:
        image = clean_image(model, row.session, row.start, 0, row.items, row.first, latent)
        denoised = image.denoised
        if model.has_clean_copies:
            clean_latent = image.copy
            clean_u = shallow_forward(model.params, clean_latent[None], cfg)[0][0]
    pixels = codec.decode(model.codec, np.asarray(denoised if denoise else latent)[None])[0]
    stored = StoredImage(latent, clean_latent, ImageValues(u, clean_u))
    return DrawnImage(stored, log_det, pixels, encode_png(pixels), image_store.digest(pixels))

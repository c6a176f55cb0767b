"""Images by the sha256 of their pixels: those that the model drew, and those that it has read.

An image that a client sends back is read from the latents that were sampled. Other images are
encoded once; their noise depends on the pixels alone, so that a conversation that is sent again is
the same one.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import jax
import numpy as np

from starflow2_jax.inference.image_latents import encode_images, shallow_forward
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.row_items import ImageValues


@dataclass(frozen=True, eq=False)
class StoredImage:
    """The latents of an image, and the values that rows read."""

    latent: np.ndarray  # [N, D], with the noise of a target
    clean_latent: np.ndarray  # [N, D] of its clean copy
    values: ImageValues  # both as u

    def part(self, model: Model, role: str, pixels: np.ndarray | None = None) -> Part:
        """Return the image as a part of a conversation."""
        is_read_clean = model.has_clean_copies and role in ("user", "system")
        return Part(
            "image",
            role,
            image=pixels,
            latent=self.clean_latent if is_read_clean else self.latent,
            clean_latent=self.clean_latent,
        )


def digest(pixels: np.ndarray) -> str:
    """Return the sha256 of the pixels uint8 [H, W, 3] of an image."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def encode(model: Model, pixels: np.ndarray) -> StoredImage:
    """Encode pixels uint8 [H, W, 3] of an image that the model has not drawn."""
    seed = int.from_bytes(bytes.fromhex(digest(pixels))[:4]) >> 1
    keys = jax.random.key(seed)[None]
    part = Part("image", "assistant", image=pixels)
    (latents,), (clean,) = encode_images(model, [[part]], keys, [0])
    u = shallow_forward(model.params, latents, model.model_config)[0]
    clean_u = shallow_forward(model.params, clean, model.model_config)[0]
    return StoredImage(latents[0], clean[0], ImageValues(u[0], clean_u[0]))


class ImageStore:
    """The images that were used last, at most `size` of them. Threads may share it."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._images: OrderedDict[str, StoredImage] = OrderedDict()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, key: str) -> StoredImage | None:
        """Return the image with this sha256, None if it is not there."""
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
            return self._images.get(key)

    def put(self, key: str, image: StoredImage) -> None:
        """Add an image; the one that was used longest ago may go."""
        with self._lock:
            self._images[key] = image
            self._images.move_to_end(key)
            while len(self._images) > self._size:
                self._images.popitem(last=False)

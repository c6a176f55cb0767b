"""Bring the images of prompts to the side that a model reads, and pictures back to their shape.

A model reads squares of one side. A policy says what happens to an image of another size:

    refuse       an error names the image and its size
    pad          scale the long side to the model's, and center the image on gray; no pixel is lost
    center_crop  scale the short side to the model's, and crop the center; the margins are lost

An image of the right size passes unchanged under every policy. `generate` refuses by default.
Benchmarks of understanding pad, since a crop would remove what they ask about. An edit of a padded
image is cropped to the shape of its source; one of a cropped image stays a square.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part, check_image_size, parse_prompt

POLICIES = ("refuse", "pad", "center_crop")
DEFAULT, UNDERSTANDING_DEFAULT = "refuse", "pad"
GRAY = (127, 127, 127)  # of the margins of a padded image


@dataclass(frozen=True)
class Fit:
    """The way in which an image was brought to a square."""

    policy: str  #: `pad`, `center_crop`, or `none` for an image that had the right size
    source: tuple[int, int]  #: height and width in pixels before
    side: int  #: height and width in pixels after
    #: top, left, height and width of the image within its square; the rest is margin
    box: tuple[int, int, int, int]

    def to_json(self) -> dict[str, Any]:
        """Return the fit as the stamp of an output."""
        return {**dataclasses.asdict(self), "source": list(self.source), "box": list(self.box)}


def fit_image(
    pixels: np.ndarray, side: int, policy: str, location: str = "image"
) -> tuple[np.ndarray, Fit]:
    """Return an image as uint8 [side, side, 3], and how it was brought there.

    Args:
        pixels: uint8 [H, W, 3].
        policy: one of `POLICIES`.
        location: the image's name in error messages.

    Raises:
        ValueError: The policy is unknown, or refuses the size.
    """
    from starflow2_jax.data import images  # heavy

    check_policy(policy)
    source = pixels.shape[:2]
    if source == (side, side):
        return pixels, Fit("none", source, side, (0, 0, side, side))
    if policy == "refuse":
        check_image_size(pixels, side, location)
    if policy == "center_crop":
        return images.center_crop(pixels, side), Fit(policy, source, side, (0, 0, side, side))
    scale = side / max(source)
    height, width = (max(1, round(size * scale)) for size in source)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.full((side, side, 3), GRAY, np.uint8)
    canvas[top : top + height, left : left + width] = _scale(pixels, height, width)
    return canvas, Fit(policy, source, side, (top, left, height, width))


def fit_parts(
    parts: Sequence[Part], side: int, policy: str, location: str
) -> tuple[list[Part], list[Fit]]:
    """Return the parts of a prompt with images of one side, and the fits of its images."""
    squares, fits = [], []
    for i, part in enumerate(parts):
        if part.image is not None and part.latent is None:
            pixels, fit = fit_image(part.image, side, policy, f"{location}, part {i}")
            part = dataclasses.replace(part, image=pixels)
            fits.append(fit)
        squares.append(part)
    return squares, fits


def fit_prompts(
    model: Model, prompts: Sequence[Any], policy: str
) -> tuple[list[list[Part]], list[list[Fit]]]:
    """Return the parts of every prompt with images that the model can read, and their fits."""
    rows = [parse_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    if model.codec is None:
        return rows, [[] for _ in rows]
    side = model.codec.model.pixels
    pairs = [fit_parts(row, side, policy, f"prompt {i}") for i, row in enumerate(rows)]
    return [row for row, _ in pairs], [fits for _, fits in pairs]


def restore_image(pixels: np.ndarray, fits: Sequence[Fit]) -> np.ndarray:
    """Return a picture in the shape of the first image of its prompt, without the margins.

    Args:
        pixels: uint8 [side, side, 3].
        fits: those of the prompt's images; a picture of a prompt without images is unchanged.
    """
    if not fits:
        return pixels
    top, left, height, width = fits[0].box
    return pixels[top : top + height, left : left + width]


def restore_parts(parts: Sequence[Part], fits: Sequence[Fit]) -> list[Part]:
    """Return the parts of an answer, with its pictures in the shape of the prompt's first image."""
    return [
        part
        if part.image is None
        else dataclasses.replace(part, image=restore_image(part.image, fits))
        for part in parts
    ]


def check_policy(policy: str) -> None:
    """Raise ValueError for an unknown policy."""
    if policy not in POLICIES:
        raise ValueError(f"resize={policy!r} is not one of {', '.join(POLICIES)}")


def _scale(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 [H, W, 3] in the way of `images.center_crop`: halve it, then resize it."""
    from PIL import Image  # heavy

    image = Image.fromarray(pixels)
    while min(image.width // width, image.height // height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

"""Images of an import drawn again: on other backgrounds, and as squares of one size.

Drawings with transparency, such as emoji, can be laid on white and on random backgrounds.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from PIL import Image

from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record
from starflow2_jax.importers import procedural
from starflow2_jax.importers.tally import ImageError, Tally

BACKGROUNDS = ("white", "random")
_PLAIN = 0.5  # probability that a random background has one color


def redraw(
    rows: Iterator[Record],
    pixels: int | None,
    backgrounds: Sequence[str],
    seed: int,
    tally: Tally | None = None,
) -> Iterator[Record]:
    """Yield every record once per background, with its images drawn on it and stored as PNG.

    Copies after the first have the id `ID#1`, `ID#2`, .... Images without transparency are equal in
    all copies. A random background has one color or is a procedural image; it follows from `seed`,
    the record's number, the copy and the image.

    Args:
        rows: the records, unchanged apart from their images.
        pixels: side of the square that each image is scaled and cropped to, or None to keep the
            sizes.
        backgrounds: "white" or "random" for each copy.
        seed: of the random backgrounds.
        tally: counts images that cannot be decoded, whose records are left out.
    """
    for index, record in enumerate(rows):
        try:
            decoded = [images.decode_rgba(blob.data, record.id) for blob in record.imgs]
        except DatasetError as error:
            (tally or Tally()).leave_out(ImageError(str(error), "image cannot be read"))
            continue
        if pixels is not None:
            decoded = [images.center_crop(image, pixels) for image in decoded]
        for copy, background in enumerate(backgrounds):
            blobs = []
            for number, image in enumerate(decoded):
                rng = procedural.image_rng(seed, index, copy, number)
                side = max(image.shape[:2])
                below = np.full((side, side, 3), 255, np.uint8)
                if background == "random":
                    below = _random_background(rng, side)
                data = images.encode_png(_blend(image, below))
                blobs.append(records.image_blob(data, record.id))
            id = f"{record.id}#{copy}" if copy else record.id
            yield msgspec.structs.replace(record, id=id, imgs=blobs)


def _random_background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return one color or a procedural image: uint8 [side, side, 3]."""
    if rng.random() < _PLAIN:
        return np.full((side, side, 3), procedural.random_color(rng), np.uint8)
    return procedural.draw(rng, side)


def _blend(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Lay an image uint8 [H, W, 4] on a background that is at least as large: uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    canvas = Image.fromarray(background[:height, :width]).convert("RGBA")
    return np.asarray(Image.alpha_composite(canvas, Image.fromarray(image)).convert("RGB"))

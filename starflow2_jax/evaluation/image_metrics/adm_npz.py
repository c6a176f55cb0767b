"""The `.npz` of images that evaluators of ImageNet models exchange since ADM (arXiv 2105.05233).

It holds one array `arr_0`, uint8 [N, H, W, 3], and is not compressed. Other arrays, such as labels
in `arr_1`, are ignored.
"""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from starflow2_jax.runtime import atomic

NAME = "arr_0"


def write(path: str | os.PathLike[str], batches: Iterable[np.ndarray], count: int) -> None:
    """Write `count` images, uint8 [B, H, W, 3] in every batch, one batch at a time.

    Raises:
        ValueError: The batches have other images, or another number of them.
    """
    with atomic.file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # Its size is unknown before all batches are there, and may exceed 4 GiB.
        with archive.open(f"{NAME}.npy", "w", force_zip64=True) as file:
            written, shape = 0, None
            for batch in batches:
                batch = np.asarray(batch)
                shape = shape or batch.shape[1:]
                if batch.dtype != np.uint8 or batch.shape[1:] != shape or batch.shape[3:] != (3,):
                    raise ValueError(
                        f"{path}: {batch.dtype}{list(batch.shape)}, expected uint8 "
                        f"[B, {', '.join(map(str, shape))}]"
                    )
                if not written:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    npy.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != count:
            raise ValueError(f"{path}: {written} images, expected {count}")


def read(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the images uint8 [N, H, W, 3] of a file; nothing in it is executed.

    Raises:
        ValueError: The file has no such array.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as arrays:
            images = arrays[NAME]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no .npz with an array {NAME}: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{path}: {NAME} is {images.dtype}{list(images.shape)}, expected uint8 [N, H, W, 3]"
        )
    return images

"""Encode the images of host batches while a flow is trained, with the codec of `fae.path`.

Latents equal those of `prepare latents` bit for bit: `codec.encode` runs one program of one shape.
Axes: b rows, M image slots of a row, H x W pixels, T patches, D latent channels.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from starflow2_jax.checkpoints import model_folder
from starflow2_jax.latents import codec as codecs, write
from starflow2_jax.latents.codec import Codec

Batch = dict[str, Any]


def open(cfg: Mapping[str, Any], model: Any) -> Codec | None:
    """Return the codec of `fae.path`, checked against the flow `model`, or None without a path."""
    path = cfg["fae"].get("path")
    if not path:
        return None
    if cfg["image"]["pixels"]:
        raise ValueError(
            f"config: fae.path={path!r}, but the model reads pixels "
            f"(image.pixels={cfg['image']['pixels']})"
        )
    codec = codecs.load(path)
    shape = (codec.model.tokens, codec.model.latent)
    if (model.tokens, model.channels) != shape:
        raise ValueError(
            f"config: the model reads {model.tokens} x {model.channels} latents, fae.path={path!r} "
            f"gives {shape[0]} x {shape[1]} (tokens x channels)"
        )
    return codec


def options(data_options: Any, codec: Codec | None) -> Any:
    """Return options of a data pipeline with which it reads images of the codec's size."""
    if codec is None:
        return data_options
    is_mapping = isinstance(data_options, Mapping)
    values = data_options if is_mapping else dataclasses.asdict(data_options)
    stored = [bool(entry.get("latents")) for entry in values.get("mixture") or ()]
    if any(stored) and not all(stored):
        raise ValueError("config: data.mixture: stored latents for all of them or none")
    if is_mapping:
        return {**data_options, "pixels": codec.model.pixels}
    return dataclasses.replace(data_options, pixels=codec.model.pixels)


def describe(description: dict[str, Any], codec: Codec | None, name: str) -> dict[str, Any]:
    """Add the encoder to a pipeline's description, as the manifest of stored latents names it.

    A run can then be resumed from stored latents or by encoding, whichever it started with. `name`
    is the name of the data in errors.
    """
    if codec is None:
        return description
    encoders = [row for row in description["features"] if "fae" in row]
    for row in encoders:
        write.check_encoder(row, codec.sha256, name)
    if encoders:
        return description
    return {
        **description,
        "features": [{"fae": codecs.describe(codec)}, *description["features"]],
    }


def identity(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of the encoder of data, by name, as checkpoints record it."""
    digests = {row["fae"]["sha256"] for row in description["features"] if "fae" in row}
    return {"fae": " ".join(sorted(digests))} if digests else {}


def decoder(description: Mapping[str, Any], codec: Codec | None) -> Codec | None:
    """Return the codec that decodes the latents of data that a pipeline describes, or None.

    That is the codec of `fae.path`, or the one that stored latents were made with if it is still at
    its path.
    """
    encoders = [row["fae"] for row in description["features"] if "fae" in row]
    path = encoders[0].get("path") if encoders else None
    if codec is not None or not path or not model_folder.locate(path).is_dir():
        return codec
    loaded = codecs.load(path)
    return loaded if all(row["sha256"] == loaded.sha256 for row in encoders) else None


def encoded(batches: Iterable[Batch], codec: Codec | None) -> Iterator[Batch]:
    """Yield host batches with latents in place of images; unchanged without a codec."""
    for batch in batches:
        yield batch if codec is None else encode(batch, codec)


def encode(batch: Batch, codec: Codec) -> Batch:
    """Return a batch with `latent_mean` and `latent_logvar` float32 in place of its images.

    Args:
        batch: Either `image` uint8 [b, H, W, 3], which becomes [b, T, D]; or `images` uint8 [b, M,
            H, W, 3] of packed rows, which becomes [b, M, T, D]. In packed rows, `image` int32 [b,
            L] names the patch at each position, and slots without any patch become zeros. A batch
            with stored latents is returned unchanged.
    """
    if "latent_mean" in batch:
        return batch
    if "images" not in batch:
        rest = {name: array for name, array in batch.items() if name != "image"}
        return rest | _named(codecs.encode(codec, batch["image"]))
    rest = {name: array for name, array in batch.items() if name != "images"}
    images, tokens = batch["images"], codec.model.tokens
    used = np.zeros(images.shape[:2], bool)
    for row, patches in enumerate(batch["image"]):
        used[row, np.unique(patches[patches >= 0]) // tokens] = True
    moments = [np.zeros((*used.shape, tokens, codec.model.latent), np.float32) for _ in range(2)]
    if used.any():
        for target, latents in zip(moments, codecs.encode(codec, images[used])):
            target[used] = latents
    return rest | _named(moments)


def _named(moments: Iterable[np.ndarray]) -> Batch:
    return dict(zip(("latent_mean", "latent_logvar"), moments))

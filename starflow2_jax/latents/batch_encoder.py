"""Encoding images while a flow is trained: what `fae.path` names turns host batches into latents.

Latents are those of `prepare latents`, bit for bit: `codec.encode` runs one program of one shape.
Axes: b rows, M places for images, H x W pixels, T patches, D latent channels.
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
    """The codec of `fae.path`, None where there is none.

    Args:
        model: of the flow, with `tokens` and `channels`.

    Raises:
        FileNotFoundError, ValueError: as `codec.load`; a flow of pixels, or of other latents.
    """
    path = cfg["fae"].get("path")
    if not path:
        return None
    if cfg["image"]["pixels"]:
        raise ValueError(
            f"config: fae.path={path!r}, but the model reads pixels "
            f"(image.pixels={cfg['image']['pixels']})"
        )
    codec = codecs.load(path)
    given = (codec.model.tokens, codec.model.latent)
    if (model.tokens, model.channels) != given:
        raise ValueError(
            f"config: the model reads {model.tokens} x {model.channels} latents, fae.path={path!r} "
            f"gives {given[0]} x {given[1]} (tokens x channels)"
        )
    return codec


def options(given: Any, codec: Codec | None) -> Any:
    """Options of a data pipeline, by which it reads images of the codec's size.

    Args:
        given: a mapping or a dataclass with `pixels` and `mixture`.

    Raises:
        ValueError: a mixture in which only some have stored latents.
    """
    if codec is None:
        return given
    plain = given if isinstance(given, Mapping) else dataclasses.asdict(given)
    stored = [bool(entry.get("latents")) for entry in plain.get("mixture") or ()]
    if any(stored) and not all(stored):
        raise ValueError("config: data.mixture: stored latents for all of them or none")
    if isinstance(given, Mapping):
        return {**given, "pixels": codec.model.pixels}
    return dataclasses.replace(given, pixels=codec.model.pixels)


def describe(about: dict[str, Any], codec: Codec | None, where: str) -> dict[str, Any]:
    """What data are, the encoder named as the manifest of stored latents names it.

    So that a run may go on from stored latents or by encoding, alike.

    Args:
        about: of a pipeline's `describe`; where: names the data.

    Raises:
        DatasetError: stored latents of another encoder.
    """
    if codec is None:
        return about
    encoders = [row for row in about["features"] if "fae" in row]
    for row in encoders:
        write.check_encoder(row, codec.sha256, where)
    if encoders:
        return about
    return {**about, "features": [{"fae": codecs.describe(codec)}, *about["features"]]}


def identity(about: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the encoder whose latents the data are, by name, for what a checkpoint keeps."""
    found = {row["fae"]["sha256"] for row in about["features"] if "fae" in row}
    return {"fae": " ".join(sorted(found))} if found else {}


def decoder(about: Mapping[str, Any], codec: Codec | None) -> Codec | None:
    """The codec whose latents the data are: that of `fae.path`, or the one that stored latents were
    made with, where it still is; None where neither is known.

    Args:
        about: of a pipeline's `describe`.
    """
    encoders = [row["fae"] for row in about["features"] if "fae" in row]
    path = encoders[0].get("path") if encoders else None
    if codec is not None or not path or not model_folder.locate(path).is_dir():
        return codec
    found = codecs.load(path)
    return found if all(row["sha256"] == found.sha256 for row in encoders) else None


def encoded(batches: Iterable[Batch], codec: Codec | None) -> Iterator[Batch]:
    """Host batches with the latents of their images in place of these."""
    for batch in batches:
        yield batch if codec is None else encode(batch, codec)


def encode(batch: Batch, codec: Codec) -> Batch:
    """A batch with `latent_mean` and `latent_logvar` float32 in place of its images.

    Args:
        batch: `image` uint8 [b, H, W, 3] gives [b, T, D]; `images` uint8 [b, M, H, W, 3] of rows
            whose `image` int32 says which patch stands where gives [b, M, T, D], zeros in the
            places that no patch is of. A batch with stored latents is given back.
    """
    if "latent_mean" in batch:
        return batch
    if "images" not in batch:
        rest = {name: array for name, array in batch.items() if name != "image"}
        return rest | _named(codecs.encode(codec, batch["image"]))
    rest = {name: array for name, array in batch.items() if name != "images"}
    shown, tokens = batch["images"], codec.model.tokens
    used = np.zeros(shown.shape[:2], bool)
    for row, slots in enumerate(batch["image"]):
        used[row, np.unique(slots[slots >= 0]) // tokens] = True
    full = [np.zeros((*used.shape, tokens, codec.model.latent), np.float32) for _ in range(2)]
    if used.any():
        for place, found in zip(full, codecs.encode(codec, shown[used])):
            place[used] = found
    return rest | _named(full)


def _named(both: Iterable[np.ndarray]) -> Batch:
    return dict(zip(("latent_mean", "latent_logvar"), both))

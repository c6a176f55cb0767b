"""Encode a dataset offline with the user's own SD-VAE and T5 files.

Requires the extra `features` (torch, diffusers, transformers, sentencepiece). Only local
safetensors are read. The result is a parallel dataset of arrays (`data/array_store.py`):
`latent_mean` and `latent_logvar` float32 [T, D] of the scaled posterior, with tokens in raster
order and D = (row, column, channel) of a patch as in STARFlow; and `text` float32 [L, E], which is
zero past the caption's last token.
"""

import functools
import importlib.util
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from starflow2_jax.data import array_store, images, records, shards, untrusted
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest, sha256_file

VERSION = "1"


@dataclass(frozen=True)
class FeatureOptions:
    """Options of an encoding."""

    text_length: int = 128  # L; longer captions are cut, and counted in the log
    pixels: int = 256  # images are scaled and cropped to this side first
    patch: int = 1  # latent pixels on a side of one token; T = (pixels / 8 / patch)^2 for SD-VAE
    batch_size: int = 8  # rows at once; the last batch is padded, so that all have one shape
    device: str = "cpu"  # torch device


def write(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    options: FeatureOptions,
    *,
    vae: str | None,
    t5: str | None,
    overwrite: bool = False,
) -> Manifest:
    """Encode every record of the dataset `data` into the arrays folder `out`.

    The manifest's `features` contains the sha256 of all files used, the scaling, and `null_text`:
    the features [n, E] of the empty caption's tokens.

    Args:
        vae: folder of a diffusers AutoencoderKL, or None for no latents.
        t5: folder of a T5 encoder with its tokenizer, or None for no text features.
    """
    if not vae and not t5:
        raise DatasetError("nothing to compute: give --vae, --t5 or both")
    shards.check_absent(out, overwrite)
    for module in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise DatasetError(f"{module} is not installed: pip install 'starflow2_jax[features]'")
    dataset = records.read(data)
    features: dict[str, Any] = {}
    encode_images = encode_texts = None
    if vae:
        encode_images, features["vae"] = _open_vae(vae, options)
    if t5:
        encode_texts, features["t5"] = _open_t5(t5, options)
        null = encode_texts([""] * options.batch_size)[0][0]
        features["null_text"] = null[: np.flatnonzero(null.any(1))[-1] + 1].tolist()
    return array_store.write(
        out,
        _encode_records(dataset, options, encode_images, encode_texts),
        dataset.manifest,
        importer=Importer("features", VERSION, {"batch_size": options.batch_size}),
        features=features,
        overwrite=overwrite,
    )


def _encode_records(
    dataset: records.Dataset,
    options: FeatureOptions,
    encode_images: Callable | None,
    encode_texts: Callable | None,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield id and arrays of each record."""
    size, num_truncated = options.batch_size, 0
    for start in range(0, len(dataset), size):
        indices = range(start, min(start + size, len(dataset)))
        batch = [dataset[i] for i in indices]
        padded = batch + [batch[-1]] * (size - len(batch))
        arrays: dict[str, np.ndarray] = {}
        if encode_images:
            crops = []
            for i, record in zip(indices, batch):
                location = f"{dataset.location(i)} (id {record.id!r})"
                image = records.target_image(record, location)
                crops.append(images.center_crop(image, options.pixels))
            crops += [crops[-1]] * (size - len(batch))
            arrays["latent_mean"], arrays["latent_logvar"] = encode_images(np.stack(crops))
        if encode_texts:
            arrays["text"], lengths = encode_texts([records.text(r) for r in padded])
            num_truncated += sum(n > options.text_length for n in lengths[: len(batch)])
        for k, record in enumerate(batch):
            yield record.id, {name: values[k] for name, values in arrays.items()}
    if num_truncated:
        message = "%d captions were longer than %d tokens and were cut"
        logging.warning(message, num_truncated, options.text_length)


def to_tokens(latents: np.ndarray, patch: int) -> np.ndarray:
    """Cut latents [B, channels, rows, columns] into tokens [B, T, D].

    Tokens are in raster order, and D = (row, column, channel).
    """
    b, c, h, w = latents.shape
    if h % patch or w % patch:
        raise DatasetError(f"latents of {h} x {w} cannot be cut into patches of {patch}")
    patches = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    tokens = patches.transpose(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)
    return np.ascontiguousarray(tokens, np.float32)


def _open_vae(folder: str, options: FeatureOptions) -> tuple[Callable, dict[str, Any]]:
    import torch
    from diffusers import AutoencoderKL

    _check_folder(folder, "AutoencoderKL")
    model = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    device, patch = options.device, options.patch
    model = model.to(device, torch.float32).eval()
    scale = float(model.config.scaling_factor)
    shift = float(getattr(model.config, "shift_factor", None) or 0.0)

    @torch.inference_mode()
    def encode(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return [B, T, D] mean and log-variance of (latent - shift) * scale of uint8 images."""
        x = torch.from_numpy(batch).to(device, torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = model.encode(x).latent_dist
        mean = (posterior.mean - shift) * scale
        logvar = posterior.logvar + 2 * math.log(scale)
        return to_tokens(mean.cpu().numpy(), patch), to_tokens(logvar.cpu().numpy(), patch)

    spec = {"files": _fingerprints(folder), "scale": scale, "shift": shift, "patch": patch}
    return encode, spec | {"pixels": options.pixels}


def _open_t5(folder: str, options: FeatureOptions) -> tuple[Callable, dict[str, Any]]:
    import torch
    from transformers import AutoTokenizer, T5EncoderModel

    _check_folder(folder, None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, whatever is wrong in the files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DatasetError(f"{folder}: its tokenizer cannot be opened: {reason}") from error
    model = T5EncoderModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    device, length = options.device, options.text_length
    model = model.to(device, torch.float32).eval()

    @torch.inference_mode()
    def encode(texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """Return features [B, L, E], zero past each caption, and the uncut token counts."""
        # The names of special tokens, such as </s>, are ordinary text in a caption.
        tokenize = functools.partial(tokenizer, texts, split_special_tokens=True)
        lengths = [len(ids) for ids in tokenize()["input_ids"]]
        inputs = tokenize(
            max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden * mask[..., None]
        return hidden.float().cpu().numpy(), lengths

    return encode, {"files": _fingerprints(folder), "length": length}


def _check_folder(folder: str, kind: str | None) -> None:
    config = pathlib.Path(folder) / "config.json"
    if not config.is_file():
        raise DatasetError(
            f"{folder}: no config.json; expected a folder as diffusers or transformers save it"
        )
    if kind and kind not in untrusted.read_file(config, 1 << 20).decode("utf-8", "replace"):
        raise DatasetError(f"{config}: not the config of an {kind}")


def _fingerprints(folder: str) -> dict[str, str]:
    """Return the sha256 of every file that affects the result."""
    files = sorted(pathlib.Path(folder).iterdir())
    suffixes = (".safetensors", ".json", ".model")
    return {file.name: sha256_file(file) for file in files if file.suffix in suffixes}

"""Host batches of captioned images from dataset folders; `sampler` decides their order.

A host batch is a dict of numpy arrays with b rows: `image` uint8 [b, H, W, 3], or `latent_mean` and
`latent_logvar` float32 [b, T, D]; `label` int32 [b]; `tokens` int32 [b, L] (UTF-8 bytes + 1, 0 =
padding) or `text` float32 [b, L, E]; and `id`, a list of b strings, which stays on the host.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data import array_store, chat_layout, images, mixture, records, sampler
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.mixture import MixtureOptions, Source

_ENTRY_KEYS = ("path", "weight", "latents", "features")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBatchOptions(MixtureOptions):
    """The keys of `cfg.data` for batches of single images."""

    labels: bool = False  # add `label`, read from `meta.label` of each record
    text: str = "none"  # "bytes" adds `tokens`, "features" adds `text`
    text_length: int = 0  # L; with bytes, a longer text is an error
    features: str = ""  # folder of stored text features (`prepare features`); may equal `latents`


def parse_options(cfg_data: Mapping[str, Any]) -> ImageBatchOptions:
    """Read `cfg.data`; keys that are None keep their defaults."""
    values = {key: value for key, value in cfg_data.items() if value is not None}
    known = [field.name for field in dataclasses.fields(ImageBatchOptions)]
    mixture.refuse_unknown_keys(values, known, "data")
    values["mixture"] = tuple(values.get("mixture") or ())
    options = ImageBatchOptions(**values)
    choices = {"resize": ("none", "center_crop"), "text": ("none", "bytes", "features")}
    for key, allowed in choices.items():
        if getattr(options, key) not in allowed:
            raise ValueError(f"data.{key} is {getattr(options, key)!r}, expected one of {allowed}")
    if options.text == "bytes" and not options.text_length:
        raise ValueError("data.text_length must be given with data.text='bytes'")
    for key in ("threads", "processes", "skip_bad"):
        if getattr(options, key) < 0:
            raise ValueError(f"data.{key} is {getattr(options, key)}, expected 0 or more")
    return options


def batches(
    cfg_data: Mapping[str, Any],
    *,
    batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield training batches without end; see `sampler.training_batches`."""
    options = parse_options(cfg_data)
    return sampler.training_batches(
        functools.partial(_open_training, options),
        options,
        batch_size=batch_size,
        start_step=start_step,
        rows=rows,
    )


def _open_training(options: ImageBatchOptions) -> tuple[Sequence[Source], sampler.ReadExample]:
    return _open_sources(options), functools.partial(_read_example, options)


def eval_batches(
    cfg_data: Mapping[str, Any], *, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield all examples once, in order, with `row` and `mask`; see `sampler.eval_batches`."""
    options = parse_options(cfg_data)
    return sampler.eval_batches(
        _open_sources(options),
        functools.partial(_read_example, options),
        options,
        batch_size=batch_size,
        rows=rows,
    )


def describe(cfg_data: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the data without reading a record: `mixture.describe`, and `classes` or None."""
    sources = _open_sources(parse_options(cfg_data))
    return mixture.describe(sources, classes=sources[0].records.manifest.classes)


def _open_sources(options: ImageBatchOptions) -> list[Source]:
    sources = []
    for entry in mixture.entries(options, _ENTRY_KEYS):
        dataset = records.read(entry["path"])
        latents = text_features = None
        if entry["latents"]:
            latents = _open_arrays(entry["latents"], dataset, "latent_mean", "--vae")
        if options.text == "features":
            if not entry["features"]:
                raise ValueError("data.features must be given with data.text='features'")
            text_features = _open_arrays(entry["features"], dataset, "text", "--t5")
        if options.labels and dataset.manifest.classes is None:
            raise DatasetError(
                f"data.labels: {entry['path']} has no classes; import it again with --label"
            )
        sources.append(Source(dataset, entry["weight"], latents, text_features))
    classes = [source.records.manifest.classes for source in sources]
    if options.labels and any(names != classes[0] for names in classes):
        raise DatasetError("data.labels: the folders of the mixture have different classes")
    return sources


def _open_arrays(
    folder: str, dataset: records.Dataset, name: str, flag: str
) -> array_store.StoredArrays:
    features = array_store.read(folder, dataset.manifest)
    if name not in features.spec:
        raise DatasetError(
            f"{folder}: has the arrays {sorted(features.spec)}, expected {name!r}; make it with "
            f"`prepare features {flag} FOLDER`"
        )
    return features


def _read_example(
    options: ImageBatchOptions, source: Source, index: int, position: sampler.Position
) -> dict[str, Any]:
    example: dict[str, Any] = {}
    ids: list[str] = []
    if source.latents:
        id, row = source.latents[index]
        ids.append(id)
        example |= {name: row[name] for name in ("latent_mean", "latent_logvar")}
        if example["latent_mean"].ndim == 3:  # [images of the record, T, D]
            record, location = source.records[index], source.records.location(index)
            number = records.target_index(record, f"{location} (id {record.id!r})")
            example = {name: array[number] for name, array in example.items()}
    if source.text_features:
        id, row = source.text_features[index]
        ids.append(id)
        example["text"] = row["text"].astype(np.float32, copy=False)
    location = source.records.location(index)
    if not source.latents or options.labels or options.text == "bytes":
        record = source.records[index]
        ids.append(record.id)
        location = f"{location} (id {record.id!r})"
        if not source.latents:
            image = records.target_image(record, location)
            example["image"] = images.square(image, options.pixels, options.resize, location)
        if options.labels:
            example["label"] = _class_number(record, location)
        if options.text == "bytes":
            text = records.text(record)
            example["tokens"] = chat_layout.byte_tokens(text, options.text_length, location)
    if len(set(ids)) != 1:
        raise DatasetError(
            f"{location}: record and arrays have the ids {ids}: the folders do not belong together"
        )
    return {"id": ids[0], **example}


def _class_number(record: records.Record, location: str) -> np.int32:
    number = record.meta.get("label")
    if type(number) is not int:
        raise DatasetError(f"{location}: meta.label is {number!r}, expected a class number")
    return np.int32(number)

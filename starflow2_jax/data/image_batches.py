"""From dataset folders to host batches of captioned images; their order is that of `stream`.

A host batch is a dict of numpy arrays, b rows: `image` uint8 [b, H, W, 3], or `latent_mean` and
`latent_logvar` float32 [b, T, D]; `label` int32 [b]; `tokens` int32 [b, L] (UTF-8 bytes + 1, 0 =
padding) or `text` float32 [b, L, E]; and `id`, a list of b strings, which stays on the host.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data import (
    array_store as arrays_lib,
    chat_layout,
    images,
    manifest as manifest_lib,
    records,
    sampler,
)
from starflow2_jax.data.manifest import DatasetError


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of `cfg.data`.

    Attributes:
      path: one dataset folder, or else
      mixture: several, as mappings `{path, weight, latents, features}`; a weight is a share of the
        examples.
      pixels: side of the square images; any other size is an error, unless
      resize: "center_crop" scales the short side to `pixels` and crops the centre.
      labels: give `label`, from `meta.label` of each record.
      text: "bytes" gives `tokens`, "features" gives `text`.
      text_length: L; with bytes, a longer text is an error.
      latents: folder of arrays made by `prepare features`; its latents are given, no image is read.
      features: the same for text features; may be the same folder.
      shuffle: global shuffle, another order every epoch; without it, the order of the folder.
      seed: of the shuffle, below 2**32.
      threads: reading threads, each making whole batches; 0 reads in the caller's thread.
      skip_bad: how many different bad records each host may replace by their neighbour, logged.
    """

    path: str = ""
    mixture: tuple[Mapping[str, Any], ...] = ()
    pixels: int = 0
    resize: str = "none"
    labels: bool = False
    text: str = "none"
    text_length: int = 0
    latents: str = ""
    features: str = ""
    shuffle: bool = True
    seed: int = 0
    threads: int = 4
    skip_bad: int = 0


def options(cfg_data: Mapping[str, Any]) -> Options:
    """Reads `cfg.data`; ValueError names an unknown key and the nearest one, or a bad value."""
    given = {key: value for key, value in cfg_data.items() if value is not None}
    names = [field.name for field in dataclasses.fields(Options)]
    sampler.refuse_unknown(given, names, "data")
    for entry in given.get("mixture") or ():
        sampler.refuse_unknown(entry, ("path", "weight", "latents", "features"), "data.mixture[]")
    result = Options(**{**given, "mixture": tuple(given.get("mixture") or ())})
    if bool(result.path) == bool(result.mixture):
        raise ValueError("data.path or data.mixture: exactly one of them must be given")
    if result.mixture and (result.latents or result.features):
        raise ValueError("data.latents, data.features: with data.mixture, give them in its entries")
    choices = {"resize": ("none", "center_crop"), "text": ("none", "bytes", "features")}
    for key, allowed in choices.items():
        if getattr(result, key) not in allowed:
            raise ValueError(f"data.{key} is {getattr(result, key)!r}, expected one of {allowed}")
    if result.text == "bytes" and not result.text_length:
        raise ValueError("data.text_length must be given with data.text='bytes'")
    for key in ("threads", "skip_bad"):
        if getattr(result, key) < 0:
            raise ValueError(f"data.{key} is {getattr(result, key)}, expected 0 or more")
    return result


def batches(
    cfg_data: Mapping[str, Any],
    *,
    batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Training batches without end, the first one that of `start_step`.

    Args:
      cfg_data: the keys of `Options`.
      batch_size: examples in the global batch.
      start_step: number of the first batch to give.
      rows: which rows of each global batch this host makes, in order (`mesh.host_rows`); None: all.

    Raises:
      ValueError: a wrong option, or rows that a batch does not have.
      DatasetError: a folder or record that is not as it should be, naming it.
    """
    opts = options(cfg_data)
    sources = _open(opts)
    counts, shares = [len(s) for s in sources], [s.weight for s in sources]
    return sampler.endless(
        sampler.order(counts, shares, shuffle=opts.shuffle, seed=opts.seed),
        _reader(opts, sources),
        batch_size=batch_size,
        threads=opts.threads,
        start_step=start_step,
        rows=rows,
    )


def eval_batches(
    cfg_data: Mapping[str, Any],
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """One pass over all examples in the order of the folders, every batch of full size.

    Adds `mask` float32 [b]: 0 for the rows that fill the last batch (id "") and for bad records
    within the `skip_bad` budget. Arguments and errors as in `batches`; shuffle and weights are
    without effect.
    """
    opts = options(cfg_data)
    sources = _open(opts)
    return sampler.one_pass(
        [len(source) for source in sources],
        _reader(opts, sources),
        batch_size=batch_size,
        threads=opts.threads,
        rows=rows,
    )


def describe(cfg_data: Mapping[str, Any]) -> dict[str, Any]:
    """What the data are, without reading a record.

    Returns:
      `records`: examples in all folders; `classes`: their names or None; `fingerprints`: sha256 of
      each manifest, in order; `features`: the manifests' `features` of the arrays folders.
    """
    sources = _open(options(cfg_data))
    folders = [f for s in sources for f in (s.latents, s.features) if f]
    return {
        "records": sum(len(source) for source in sources),
        "classes": sources[0].records.manifest.classes,
        "fingerprints": [manifest_lib.fingerprint(s.records.manifest) for s in sources],
        "features": [folder.manifest.features for folder in folders],
    }


@dataclasses.dataclass(frozen=True)
class _Source:
    """One dataset folder with the arrays folders that are read beside it."""

    records: records.Dataset
    latents: arrays_lib.Features | None
    features: arrays_lib.Features | None
    weight: float

    def __len__(self) -> int:
        return len(self.records)


def _open(opts: Options) -> list[_Source]:
    entries = opts.mixture or (dataclasses.asdict(opts),)
    sources = []
    for entry in entries:
        dataset = records.read(entry["path"])
        latents = features = None
        if entry.get("latents"):
            latents = _arrays(entry["latents"], dataset, "latent_mean", "--vae")
        elif not opts.pixels:
            raise ValueError("data.pixels must be given where images are read")
        if opts.text == "features":
            folder = entry.get("features") or ""
            if not folder:
                raise ValueError("data.features must be given with data.text='features'")
            features = _arrays(folder, dataset, "text", "--t5")
        weight = float(entry.get("weight", 1.0))
        if not weight > 0:
            raise ValueError(f"data.mixture[]: the weight of {entry['path']} is {weight}, not > 0")
        if opts.labels and dataset.manifest.classes is None:
            raise DatasetError(
                f"data.labels: {entry['path']} has no classes; import it again with --label"
            )
        sources.append(_Source(dataset, latents, features, weight))
    if opts.labels and any(
        s.records.manifest.classes != sources[0].records.manifest.classes for s in sources
    ):
        raise DatasetError("data.labels: the folders of the mixture have different classes")
    return sources


def _arrays(folder: str, dataset: records.Dataset, name: str, flag: str) -> arrays_lib.Features:
    features = arrays_lib.read(folder, dataset.manifest)
    if name not in features.spec:
        raise DatasetError(
            f"{folder}: holds {sorted(features.spec)}, not {name!r}; make it with "
            f"`prepare features {flag} FOLDER`"
        )
    return features


def _reader(opts: Options, sources: list[_Source]) -> sampler.Read:
    example = lambda number, index, at: _example(opts, sources[number], index)
    return sampler.forgiving(example, [len(source) for source in sources], opts.skip_bad)


def _example(opts: Options, source: _Source, index: int) -> dict[str, Any]:
    example: dict[str, Any] = {}
    ids: list[str] = []
    if source.latents:
        id, row = source.latents[index]
        ids.append(id)
        example |= {name: row[name] for name in ("latent_mean", "latent_logvar")}
        if example["latent_mean"].ndim == 3:  # of every image of the record
            record, where = source.records[index], source.records.where(index)
            number = records.target(record, f"{where} (id {record.id!r})")
            example = {name: array[number] for name, array in example.items()}
    if source.features:
        id, row = source.features[index]
        ids.append(id)
        example["text"] = row["text"].astype(np.float32, copy=False)
    where = source.records.where(index)
    if not source.latents or opts.labels or opts.text == "bytes":
        record = source.records[index]
        ids.append(record.id)
        where = f"{where} (id {record.id!r})"
        if not source.latents:
            image = records.target_image(record, where)
            example["image"] = images.square(image, opts.pixels, opts.resize, where)
        if opts.labels:
            example["label"] = _label(record, where)
        if opts.text == "bytes":
            text = records.text(record)
            example["tokens"] = chat_layout.byte_tokens(text, opts.text_length, where)
    if len(set(ids)) != 1:
        raise DatasetError(f"{where}: its arrays are of {ids}: the folders do not belong together")
    return {"id": ids[0], **example}


def _label(record: records.Record, where: str) -> np.int32:
    label = record.meta.get("label")
    if type(label) is not int:
        raise DatasetError(f"{where}: meta.label is {label!r}, expected a class number")
    return np.int32(label)

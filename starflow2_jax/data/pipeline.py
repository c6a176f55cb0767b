"""From dataset folders to host batches, where the position is the step number.

Batch k is a pure function of the options and k: the examples of global batch k are the same, in the
same order, for any number of hosts, and a run resumes at step k by asking for step k. No iterator
state is ever saved. Order: each dataset is shuffled globally with a seed of its own for each epoch,
repeated, then mixed by weight; a host makes the rows of every global batch that it is asked for
and reads nothing else.

A host batch is a dict of numpy arrays, b rows: `image` uint8 [b, H, W, 3], or `latent_mean` and
`latent_logvar` float32 [b, T, D]; `label` int32 [b]; `tokens` int32 [b, L] (UTF-8 bytes + 1, 0 =
padding) or `text` float32 [b, L, E]; and `id`, a list of b strings, which stays on the host.
"""

import dataclasses
import difflib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from starflow2_jax.data import (
    arrays as arrays_lib,
)
from starflow2_jax.data import (
    images,
    records,
    tokens,
)
from starflow2_jax.data import (
    manifest as manifest_lib,
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
    _refuse_unknown(given, names, "data")
    for entry in given.get("mixture") or ():
        _refuse_unknown(entry, ("path", "weight", "latents", "features"), "data.mixture[]")
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
    mine = _checked(rows, batch_size)
    order = _order(opts, sources)
    read = _reader(opts, sources)

    def make(step: int) -> dict[str, Any]:
        return _stack([read(*order[step * batch_size + row])[0] for row in mine])

    # MapDataset.range counts steps, so that threads work on whole batches.
    steps = grain.MapDataset.range(start_step, sys.maxsize)
    return iter(steps.map(make).to_iter_dataset(_read_options(opts)))


def eval_batches(
    cfg_data: Mapping[str, Any],
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """One pass over all examples in the order of the folders, every batch of full size.

    Adds `row` int32 [b], each row's position in the pass, and `mask` float32 [b]: 0 for the rows
    that fill the last batch (id "") and for bad records within the `skip_bad` budget. Arguments and
    errors as in `batches`; shuffle and weights are without effect.
    """
    opts = options(cfg_data)
    sources = _open(opts)
    mine = _checked(rows, batch_size)
    total = sum(len(source) for source in sources)
    read = _reader(opts, sources)

    def place(position: int) -> tuple[int, int]:
        number = 0
        while position >= len(sources[number]):
            position -= len(sources[number])
            number += 1
        return number, position

    def make(step: int) -> dict[str, Any]:
        examples, mask, positions = [], [], [step * batch_size + row for row in mine]
        for position in positions:
            example, good = read(*place(min(position, total - 1)))
            if position >= total:
                example, good = {**example, "id": ""}, False
            examples.append(example)
            mask.append(good)
        found = {"row": np.asarray(positions, np.int32), "mask": np.asarray(mask, np.float32)}
        return _stack(examples) | found

    steps = grain.MapDataset.range(-(-total // batch_size))
    return iter(steps.map(make).to_iter_dataset(_read_options(opts)))


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


def _order(opts: Options, sources: list[_Source]) -> grain.MapDataset:
    """Position in the training stream -> (source number, record index)."""
    streams = []
    for number, source in enumerate(sources):
        stream = grain.MapDataset.range(len(source)).map(functools.partial(_pair, number))
        if opts.shuffle:
            # grain shuffles epoch e with seed + e. Spread the seeds, or run seed 1 would see in its
            # first epoch what run seed 0 sees in its second.
            seed = np.random.SeedSequence((opts.seed, number)).generate_state(1)[0]
            stream = stream.shuffle(seed=int(seed))
        streams.append(stream.repeat())
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, weights=[source.weight for source in sources])


def _pair(number: int, index: int) -> tuple[int, int]:
    return number, index


def _checked(rows: Sequence[int] | None, batch_size: int) -> list[int]:
    mine = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    if not mine or min(mine) < 0 or max(mine) >= batch_size:
        raise ValueError(f"rows {mine[:4]} ... are not of a batch of batch_size={batch_size}")
    return mine


def _reader(
    opts: Options, sources: list[_Source]
) -> Callable[[int, int], tuple[dict[str, Any], bool]]:
    """A function (source number, index) -> (example, whether it is the one asked for)."""
    lock = threading.Lock()
    bad: set[tuple[int, int]] = set()

    def read(number: int, index: int) -> tuple[dict[str, Any], bool]:
        source, good = sources[number], True
        while True:
            try:
                return _example(opts, source, index), good
            except DatasetError as error:
                with lock:
                    new = (number, index) not in bad
                    bad.add((number, index))
                    count = len(bad)
                if count > opts.skip_bad or count >= len(source):
                    if opts.skip_bad:
                        raise DatasetError(
                            f"{count} bad records, more than data.skip_bad={opts.skip_bad}; "
                            f"the last: {error}"
                        ) from error
                    raise
                if new:
                    logging.warning("skipped bad record %d of %d: %s", count, opts.skip_bad, error)
                # The neighbour, so that the batch stays a function of the step alone.
                index, good = (index + 1) % len(source), False

    return read


def _example(opts: Options, source: _Source, index: int) -> dict[str, Any]:
    example: dict[str, Any] = {}
    ids: list[str] = []
    if source.latents:
        id, row = source.latents[index]
        ids.append(id)
        example |= {name: row[name] for name in ("latent_mean", "latent_logvar")}
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
            example["image"] = _image(opts, record, where)
        if opts.labels:
            example["label"] = _label(record, where)
        if opts.text == "bytes":
            text = records.text(record)
            example["tokens"] = tokens.byte_tokens(text, opts.text_length, where)
    if len(set(ids)) != 1:
        raise DatasetError(f"{where}: its arrays are of {ids}: the folders do not belong together")
    return {"id": ids[0], **example}


def _label(record: records.Record, where: str) -> np.int32:
    label = record.meta.get("label")
    if type(label) is not int:
        raise DatasetError(f"{where}: meta.label is {label!r}, expected a class number")
    return np.int32(label)


def _image(opts: Options, record: records.Record, where: str) -> np.ndarray:
    image = records.target_image(record, where)
    if opts.resize == "center_crop" and image.shape[:2] != (opts.pixels, opts.pixels):
        image = images.center_crop(image, opts.pixels)
    if image.shape[:2] != (opts.pixels, opts.pixels):
        raise DatasetError(
            f"{where}: the image is {image.shape[0]} x {image.shape[1]} (h x w), expected "
            f"data.pixels={opts.pixels}; data.resize='center_crop' would bring it to that size"
        )
    return image


def _stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {"id": [row["id"] for row in rows]}
    for name in rows[0]:
        if name != "id":
            batch[name] = np.stack([row[name] for row in rows])
    return batch


def _read_options(opts: Options) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=opts.threads, prefetch_buffer_size=max(2, opts.threads))


def _refuse_unknown(given: Mapping[str, Any], names: Any, what: str) -> None:
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, list(names), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise ValueError(f"{what}.{key}: unknown key{hint}")

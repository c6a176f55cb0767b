"""From dataset folders to host batches of interleaved rows: packed records of text and images.

A row's records are those of the packing plan (`packing.index`), laid out by `tokens.layout` one
after the other; the order of rows is that of `stream`. A host batch is a dict of numpy arrays, with
b rows of T positions and M places for images of N = side^2 patches:

    ids             int32 [b, T]     image slots hold the tokenizer's image id
    segments        int32 [b, T]     1, 2, ... by record; 0 is padding
    image           int32 [b, T]     m N + n, which patch of the row's images stands there; -1 text
    target          bool [b, T]      whether the item is learnt
    positions       int32 [b, T, 3]  Qwen's, counted from 0 in each record
    flow_positions  int32 [b, T, 3]  of the item that each item predicts
    images          uint8 [b, M, H, W, 3], or of stored latents
    latent_mean, latent_logvar       float32 [b, M, N, D]
    region          int32 [b, M, N]  where wanted: which region a patch shows, -1 none
    region_words    int32 [b, M, R, W]  and what that is called, -1 behind
    id              a list of b strings, the ids of a row's records joined by spaces
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data import (
    array_store,
    chat_layout,
    images,
    manifest as manifest_lib,
    packing,
    records,
    sampler,
)
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record
from starflow2_jax.shapes import regions


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of `cfg.data` that rows have, and what the model's shape says.

    Attributes:
      path: one dataset folder, or else
      mixture: several, as mappings `{path, weight, latents}`; a weight is a share of the rows.
      tokenizer: a folder, see `tokens.open_tokenizer`.
      room: what a row holds.
      side: rows (= columns) of an image's patches.
      pixels: side of the square images; any other size is an error, unless
      resize: "center_crop" scales the short side to `pixels` and crops the centre.
      blank: images are grey instead of what they show, to see what text alone can tell.
      regions: R and W, regions of an image that are told (`regions.find`) and words of each.
      latents: folder made by `prepare latents`; its latents are given, no image is read.
      drop, drop_all: share of the records with an image to draw whose user says nothing, and whose
        user neither says nor shows anything; in training, drawn by seed, step and row.
      shuffle, seed, threads, skip_bad: as in `pipeline.Options`.
    """

    tokenizer: str
    room: packing.Room
    side: int
    path: str = ""
    mixture: tuple[Mapping[str, Any], ...] = ()
    pixels: int = 0
    resize: str = "none"
    blank: bool = False
    regions: tuple[int, int] = (0, 0)
    latents: str = ""
    drop: float = 0.0
    drop_all: float = 0.0
    shuffle: bool = True
    seed: int = 0
    threads: int = 4
    skip_bad: int = 0


@dataclasses.dataclass(frozen=True)
class _Source:
    records: records.Dataset
    plan: packing.Plan
    latents: array_store.Features | None
    weight: float


def batches(
    opts: Options,
    *,
    batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Training batches without end, the first one that of `start_step`.

    Raises:
      ValueError: a wrong option, or rows that a batch does not have.
      DatasetError: a folder or record that is not as it should be, naming it.
    """
    sources, read = _open(opts)
    counts, shares = [len(s.plan) for s in sources], [s.weight for s in sources]
    return sampler.endless(
        sampler.order(counts, shares, shuffle=opts.shuffle, seed=opts.seed),
        sampler.forgiving(read, counts, opts.skip_bad),
        batch_size=batch_size,
        threads=opts.threads,
        start_step=start_step,
        rows=rows,
    )


def eval_batches(
    opts: Options, *, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """One pass over all rows; adds `row` and `mask`, see `stream.one_pass`. Nothing is dropped."""
    sources, read = _open(opts)
    counts = [len(s.plan) for s in sources]
    return sampler.one_pass(
        counts,
        sampler.forgiving(read, counts, opts.skip_bad),
        batch_size=batch_size,
        threads=opts.threads,
        rows=rows,
    )


def describe(opts: Options) -> dict[str, Any]:
    """What the data are: `records`, `rows`, `waste`, `classes` (None), `fingerprints` of the
    manifests and `features` of the latents' manifests."""
    sources, _ = _open(opts)
    held = sum(int(s.plan.lengths.sum()) for s in sources)
    rows = sum(len(s.plan) for s in sources)
    return {
        "records": sum(len(s.records) for s in sources),
        "rows": rows,
        "waste": round(1 - held / (rows * opts.room.positions), 4),
        "classes": None,
        "fingerprints": [manifest_lib.fingerprint(s.records.manifest) for s in sources],
        "features": [s.latents.manifest.features for s in sources if s.latents],
    }


def lay_out(
    given: Sequence[chat_layout.Items], room: packing.Room, side: int, pad: int
) -> dict[str, np.ndarray]:
    """The arrays of one row of records, without its images.

    Raises:
      ValueError: more items or images than the row has room for.
    """
    length, patches = room.positions, side * side
    row = {
        "ids": np.full(length, pad, np.int32),
        "segments": np.zeros(length, np.int32),
        "image": np.full(length, -1, np.int32),
        "target": np.zeros(length, bool),
        "positions": np.zeros((length, 3), np.int32),
        "flow_positions": np.zeros((length, 3), np.int32),
    }
    start = before = 0
    for number, items in enumerate(given):
        end = start + len(items.ids)
        images_ = int(items.image.max(initial=-1)) + 1
        if end > length or before + images_ > room.places:
            raise ValueError(
                f"row: {end} positions and {before + images_} images, room is for {length} and "
                f"{room.places}"
            )
        at = slice(start, end)
        row["ids"][at], row["target"][at] = items.ids, items.target
        row["segments"][at] = number + 1
        slots = (before + items.image) * patches + items.patch
        row["image"][at] = np.where(items.patch >= 0, slots, -1)
        row["positions"][at] = chat_layout.vlm_positions(items, side)
        row["flow_positions"][at] = chat_layout.flow_positions(items, side)
        start, before = end, before + images_
    return row


def _open(opts: Options):
    """The sources, and (source number, row, (step, row of the batch) or None) -> example."""
    if bool(opts.path) == bool(opts.mixture):
        raise ValueError("data.path or data.mixture: exactly one of them must be given")
    if opts.mixture and opts.latents:
        raise ValueError("data.latents: with data.mixture, give them in its entries")
    held = chat_layout.open_tokenizer(opts.tokenizer)
    sources = []
    for entry in opts.mixture or ({"path": opts.path, "latents": opts.latents},):
        sampler.refuse_unknown(entry, ("path", "weight", "latents"), "data.mixture[]")
        weight = float(entry.get("weight", 1.0))
        if not weight > 0:
            raise ValueError(f"data.mixture[]: the weight of {entry['path']} is {weight}, not > 0")
        dataset = records.read(entry["path"])
        _, plan = packing.index(entry["path"], opts.tokenizer, opts.room, opts.seed)
        latents = entry.get("latents") or ""
        if not latents and not opts.pixels:
            raise ValueError("image.pixels must be given where images are read")
        found = array_store.read(latents, dataset.manifest) if latents else None
        sources.append(_Source(dataset, plan, found, weight))

    def example(number: int, row: int, at: tuple[int, int] | None) -> dict[str, Any]:
        return _row(opts, held, sources[number], row, at)

    return sources, example


def _row(
    opts: Options, held: Tokenizer, source: _Source, row: int, at: tuple[int, int] | None
) -> dict[str, Any]:
    draw = np.random.default_rng((opts.seed, *at)) if at else None
    laid, shown, ids = [], [], []
    for index in source.plan[row].tolist():
        record, where = source.records[index], source.records.where(index)
        given, blobs = chat_layout.parts(record)
        null = _null(opts, record, draw)
        items = chat_layout.layout(given, held, opts.room.patches, null=null)
        kept = sorted(set(items.image[items.image >= 0].tolist()))
        # Those of the user may have been dropped.
        renumber = np.full(len(blobs) + 1, -1, np.int32)
        renumber[kept] = np.arange(len(kept))
        laid.append(items._replace(image=renumber[items.image]))
        shown += [(index, record, blobs[i], i, where) for i in kept]
        ids.append(record.id)
    example = lay_out(laid, opts.room, opts.side, held.pad)
    if opts.regions[0]:
        example |= _regions(opts, held, shown)
    return {"id": " ".join(ids), **example, **_images(opts, source, shown)}


def _null(opts: Options, record: Record, draw: np.random.Generator | None) -> str:
    if draw is None or not (opts.drop or opts.drop_all):
        return "none"
    if not any(isinstance(s, records.Img) and s.loss for s in record.segs):
        return "none"
    share = draw.random()
    if share < opts.drop_all:
        return "all"
    return "text" if share < opts.drop_all + opts.drop else "none"


def _regions(opts: Options, held: Tokenizer, shown: list[tuple]) -> dict[str, np.ndarray]:
    places = opts.room.places
    region = np.full((places, opts.side**2), -1, np.int32)
    words = np.full((places, *opts.regions), -1, np.int32)
    for place, (_, record, _, number, where) in enumerate(shown):
        found = regions.find(record, number, f"{where} (id {record.id!r})")
        region[place], words[place] = regions.place(found, held, opts.side, *opts.regions)
    return {"region": region, "region_words": words}


def _images(opts: Options, source: _Source, shown: list[tuple]) -> dict[str, np.ndarray]:
    if source.latents is None:
        side = opts.pixels
        given = np.zeros((opts.room.places, side, side, 3), np.uint8)
        for place, (_, record, blob, _, where) in enumerate(shown):
            given[place] = picture(opts, record, blob, where)
        return {"images": given}
    found: dict[str, np.ndarray] = {}
    for place, (index, record, _, number, where) in enumerate(shown):
        id, stored = source.latents[index]
        if id != record.id:
            raise DatasetError(
                f"{where} (id {record.id!r}): its latents are of {id!r}: the folders do not belong "
                f"together"
            )
        for name in ("latent_mean", "latent_logvar"):
            if name not in found:
                shape = (opts.room.places, *stored[name].shape[1:])
                found[name] = np.zeros(shape, np.float32)
            found[name][place] = stored[name][number]
    if not found:
        shape = source.latents.spec["latent_mean"]["shape"][1:]
        blank = np.zeros((opts.room.places, *shape), np.float32)
        found = {"latent_mean": blank, "latent_logvar": blank}
    return found


def picture(opts: Options, record: Record, blob: int, where: str) -> np.ndarray:
    """Image `blob` of a record as `opts` asks for it: uint8 [pixels, pixels, 3]; DatasetError names
    `where` where it cannot be."""
    if opts.blank:
        return np.full((opts.pixels, opts.pixels, 3), 128, np.uint8)
    where = f"{where} (id {record.id!r}), image {blob}"
    image = images.decode(record.imgs[blob].data, where)
    return images.square(image, opts.pixels, opts.resize, where)

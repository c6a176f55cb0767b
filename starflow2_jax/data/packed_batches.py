"""Host batches of interleaved rows from dataset folders: packed records of text and images.

A row holds records of one folder, by its packing plan (`packing`), and `sampler` decides the order
of the rows; or, in training with `packing_over="mixture"`, records of any folder
(`mixture_packing`). Each record is laid out by `chat_layout.apply_chat_template`. A host batch is a
dict of numpy arrays, with b rows of T positions and M slots for images of N = grid_side^2 patches:

    ids             int32 [b, T]     image slots have the tokenizer's image id
    segments        int32 [b, T]     1, 2, ... by record; 0 is padding
    image           int32 [b, T]     m N + n for patch n in image slot m of the row; -1 for text
    target          bool [b, T]      true where the item is a training target
    positions       int32 [b, T, 3]  Qwen's M-RoPE, counted from 0 in each record
    flow_positions  int32 [b, T, 3]  position of the item that each item predicts
    images          uint8 [b, M, H, W, 3], or with stored latents
    latent_mean, latent_logvar       float32 [b, M, N, D]
    region          int32 [b, M, N]  with an annotator: the region of each patch, -1 for none
    region_words    int32 [b, M, R, W]  token ids of each region's description, padded with -1
    id              a list of b strings, the ids of a row's records joined by line feeds
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from starflow2_jax.data import array_store, chat_layout, images, mixture, records, sampler
from starflow2_jax.data.chat_layout import Tokenizer, TokenSequence
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.mixture import MixtureOptions, Source
from starflow2_jax.data.mixture_packing import MixtureRows
from starflow2_jax.data.packing import PackingSpec, load_or_make_plan
from starflow2_jax.data.records import Record

_ENTRY_KEYS = ("path", "weight", "latents")


class RegionAnnotator(Protocol):
    """A source of grounded descriptions, which maps the patches of an image to regions."""

    max_regions: int  # R
    max_words: int  # W, token ids of a region's description

    def __call__(
        self, record: Record, image: int, tokenizer: Tokenizer, grid_side: int, location: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `region` int32 [N] and `region_words` int32 [R, W] of an image of a record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatchOptions(MixtureOptions):
    """The keys of `cfg.data` for interleaved rows, and the sizes that the model determines."""

    tokenizer: str  # tokenizer folder, see `chat_layout.open_tokenizer`
    packing: PackingSpec  # size of a row
    model_vocab_size: int = 0  # ids of the model, which the tokenizer must not exceed; 0: any
    # "dataset": a row is of one folder, and weights are shares of rows. "mixture": a row of the
    # training holds records of any folder, and weights are shares of records.
    packing_over: str = "dataset"
    grid_side: int  # rows (= columns) of an image's patches
    blank_images: bool = False  # replace all images by gray, to measure what text alone can tell
    annotator: RegionAnnotator | None = None  # adds `region` and `region_words`
    # Share of the records with a target image whose user texts are emptied. In training only; seed,
    # step and row decide which records these are.
    drop_text: float = 0.0
    drop_all: float = 0.0  # the same share for records that lose the user's texts and images


class _RowImage(NamedTuple):
    """An image of a row, and its record."""

    record: Record
    record_index: int  # in the dataset
    index: int  # in `record.imgs`
    location: str  # of the record, for error messages
    latents: array_store.StoredArrays | None  # of the record's folder


@dataclasses.dataclass(frozen=True)
class _MixedRows:
    """The rows of all folders together, in place of a `Source` of one folder."""

    sources: Sequence[Source]
    rows: MixtureRows  # numbers the records that the folders' plans have, in order
    packed: Sequence[np.ndarray]  # those records of each folder

    def __len__(self) -> int:
        return sys.maxsize // 2  # endless; grain repeats finite datasets only


def batches(
    options: PackedBatchOptions,
    *,
    batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield training batches without end; see `sampler.training_batches`."""
    is_mixed = options.packing_over == "mixture"
    return sampler.training_batches(
        functools.partial(_open_training, options),
        # Mixed rows have an order of their own.
        dataclasses.replace(options, shuffle=False) if is_mixed else options,
        batch_size=batch_size,
        start_step=start_step,
        rows=rows,
    )


def _open_training(
    options: PackedBatchOptions,
) -> tuple[Sequence[Source | _MixedRows], sampler.ReadExample]:
    sources: Sequence[Source | _MixedRows] = _open_sources(options)
    if options.packing_over == "mixture":
        sources = [_MixedRows(sources, _mix(sources, options), _packed_records(sources))]
    return sources, functools.partial(_read_row, options, open_tokenizer(options))


def eval_batches(
    options: PackedBatchOptions, *, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield all rows once, in order, with `row` and `mask`; see `sampler.eval_batches`."""
    return sampler.eval_batches(
        _open_sources(options),
        functools.partial(_read_row, options, open_tokenizer(options)),
        options,
        batch_size=batch_size,
        rows=rows,
    )


def describe(options: PackedBatchOptions) -> dict[str, Any]:
    """Describe the data: `mixture.describe`, with the number of rows and the share of padding.

    `rows` and `waste` are of one pass of `eval_batches`. `training_waste` and `records_per_row` are
    means over training, which draws the folders by weight.
    """
    open_tokenizer(options)  # only to check it, before anything is compiled
    sources = _open_sources(options)
    rows = sum(len(source) for source in sources)
    used = sum(int(source.plan.lengths[source.plan.items].sum()) for source in sources)
    waste = round(1 - used / (rows * options.packing.seq_len), 4)
    left_out = sum(source.plan.num_left_out for source in sources)
    if options.packing_over == "mixture":
        training_waste, records_per_row = _mix(sources, options).fill()
    else:
        weights = np.asarray([source.weight for source in sources])
        shares = weights / weights.sum()
        training_waste = float(shares @ [source.plan.waste for source in sources])
        records_per_row = float(shares @ [len(s.records) / len(s) for s in sources])
    return mixture.describe(
        sources,
        rows=rows,
        waste=waste,
        training_waste=round(training_waste, 4),
        records_per_row=round(records_per_row, 3),
        classes=None,
        **({"records_too_long": left_out} if left_out else {}),
    )


def open_tokenizer(options: PackedBatchOptions) -> Tokenizer:
    """Open the tokenizer of the options; DatasetError if the model has fewer ids."""
    return chat_layout.open_tokenizer(options.tokenizer, options.model_vocab_size)


def build_packed_row(
    sequences: Sequence[TokenSequence], spec: PackingSpec, grid_side: int, pad: int
) -> dict[str, np.ndarray]:
    """Build the arrays of one row of records, without its images, with id `pad` after the last."""
    length, patches = spec.seq_len, grid_side * grid_side
    row = {
        "ids": np.full(length, pad, np.int32),
        "segments": np.zeros(length, np.int32),
        "image": np.full(length, -1, np.int32),
        "target": np.zeros(length, bool),
        "positions": np.zeros((length, 3), np.int32),
        "flow_positions": np.zeros((length, 3), np.int32),
    }
    start = first_image = 0
    for number, sequence in enumerate(sequences):
        end = start + len(sequence.ids)
        is_patch = sequence.patch_index >= 0
        end_image = first_image + len(chat_layout.image_slots(sequence))
        if end > length or end_image > spec.image_slots:
            raise ValueError(
                f"row: {end} positions and {end_image} images, room is for {length} and "
                f"{spec.image_slots}"
            )
        span = slice(start, end)
        row["ids"][span] = sequence.ids
        row["target"][span] = sequence.is_target
        row["segments"][span] = number + 1
        slots = first_image + np.cumsum(sequence.patch_index == 0) - 1
        row["image"][span] = np.where(is_patch, slots * patches + sequence.patch_index, -1)
        row["positions"][span] = chat_layout.vlm_positions(sequence, grid_side)
        row["flow_positions"][span] = chat_layout.flow_positions(sequence, grid_side)
        start, first_image = end, end_image
    return row


def read_image(
    options: PackedBatchOptions, record: Record, index: int, location: str
) -> np.ndarray:
    """Decode image `index` of `record.imgs`, or make the gray one: uint8 [pixels, pixels, 3]."""
    if options.blank_images:
        return np.full((options.pixels, options.pixels, 3), 128, np.uint8)
    location = f"{location} (id {record.id!r}), image {index}"
    image = images.decode(record.imgs[index].data, location)
    return images.square(image, options.pixels, options.resize, location)


def _open_sources(options: PackedBatchOptions) -> list[Source]:
    sources = []
    for entry in mixture.entries(options, _ENTRY_KEYS):
        dataset = records.read(entry["path"])
        _, plan = load_or_make_plan(
            entry["path"], options.tokenizer, options.packing, options.seed, options.skip_long
        )
        latents = None
        if entry["latents"]:
            latents = array_store.read(entry["latents"], dataset.manifest)
        sources.append(Source(dataset, entry["weight"], latents, plan=plan))
    stored = [source.latents is not None for source in sources]
    if options.packing_over == "mixture" and any(stored) and not all(stored):
        raise ValueError(
            "data.mixture: stored latents for all of them or none, as rows hold records of several"
        )
    return sources


def _mix(sources: Sequence[Source], options: PackedBatchOptions) -> MixtureRows:
    packed = _packed_records(sources)
    return MixtureRows(
        [np.stack([s.plan.lengths, s.plan.images], -1)[k] for s, k in zip(sources, packed)],
        [source.weight for source in sources],
        options.packing,
        seed=options.seed,
        shuffle=options.shuffle,
        folder=options.mixture[0]["path"] if options.mixture else options.path,
    )


def _packed_records(sources: Sequence[Source]) -> list[np.ndarray]:
    """Return the records of each folder that fit into a row, int32, in order."""
    return [np.sort(source.plan.items) for source in sources]


def _row_records(source: Source | _MixedRows, row: int) -> list[tuple[Source, int]]:
    """Return the folder and the index in it of each record of a row."""
    if isinstance(source, Source):
        return [(source, index) for index in source.plan[row].tolist()]
    pairs = source.rows[row].tolist()
    return [(source.sources[n], int(source.packed[n][index])) for n, index in pairs]


def _read_row(
    options: PackedBatchOptions,
    tokenizer: Tokenizer,
    source: Source | _MixedRows,
    row: int,
    position: sampler.Position,
) -> dict[str, Any]:
    rng = np.random.default_rng((options.seed, *position)) if position else None
    sequences, row_images, ids = [], [], []
    for folder, index in _row_records(source, row):
        record, location = folder.records[index], folder.records.location(index)
        parts, image_indices = chat_layout.message_parts(record, options.packing.clean_copies)
        null = _drop_condition(options, record, rng)
        sequence = chat_layout.apply_chat_template(
            parts, tokenizer, options.packing.image_tokens, null=null
        )
        sequences.append(sequence)
        row_images += [
            _RowImage(record, index, image_indices[i], location, folder.latents)
            for i in chat_layout.image_slots(sequence).tolist()
        ]
        ids.append(record.id)
    example = build_packed_row(sequences, options.packing, options.grid_side, tokenizer.pad)
    if options.annotator is not None:
        example |= _read_regions(options, tokenizer, row_images)
    stored = folder.latents
    if stored is None:
        example["images"] = _read_images(options, row_images)
    else:
        example |= _read_latents(options, stored.spec, row_images)
    return {"id": "\n".join(ids), **example}


def _drop_condition(
    options: PackedBatchOptions, record: Record, rng: np.random.Generator | None
) -> str:
    """Choose the `null` of a record for classifier-free guidance."""
    if rng is None or not (options.drop_text or options.drop_all):
        return "none"
    if not any(isinstance(segment, records.Img) and segment.loss for segment in record.segs):
        return "none"
    share = rng.random()
    if share < options.drop_all:
        return "all"
    return "text" if share < options.drop_all + options.drop_text else "none"


def _read_regions(
    options: PackedBatchOptions, tokenizer: Tokenizer, row_images: Sequence[_RowImage]
) -> dict[str, np.ndarray]:
    annotate, slots = options.annotator, options.packing.image_slots
    region = np.full((slots, options.grid_side**2), -1, np.int32)
    words = np.full((slots, annotate.max_regions, annotate.max_words), -1, np.int32)
    for slot, image in enumerate(row_images):
        location = f"{image.location} (id {image.record.id!r})"
        region[slot], words[slot] = annotate(
            image.record, image.index, tokenizer, options.grid_side, location
        )
    return {"region": region, "region_words": words}


def _read_images(options: PackedBatchOptions, row_images: Sequence[_RowImage]) -> np.ndarray:
    pixels = np.zeros((options.packing.image_slots, options.pixels, options.pixels, 3), np.uint8)
    for slot, image in enumerate(row_images):
        pixels[slot] = read_image(options, image.record, image.index, image.location)
    return pixels


def _read_latents(
    options: PackedBatchOptions, spec: Mapping[str, Any], row_images: Sequence[_RowImage]
) -> dict[str, np.ndarray]:
    slots = options.packing.image_slots
    arrays = {
        name: np.zeros((slots, *spec[name]["shape"][1:]), np.float32)
        for name in ("latent_mean", "latent_logvar")
    }
    for slot, image in enumerate(row_images):
        id, stored = image.latents[image.record_index]
        if id != image.record.id:
            raise DatasetError(
                f"{image.location} (id {image.record.id!r}): its latents have the id {id!r}: the "
                "folders do not belong together"
            )
        for name, array in arrays.items():
            array[slot] = stored[name][image.index]
    return arrays

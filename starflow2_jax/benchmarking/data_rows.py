"""Time the reading of interleaved rows: packing, tokenizing, decoding and resizing.

The records are written here: JPEGs of `SOURCE_SIDE` pixels on the short side with captions, in
WebDataset tars, which are imported. Rows are those of stage 1 at paper size. The step of a plan
(docs/planning.md) says how many images a host has to read per second.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from starflow2_jax.benchmarking import stages
from starflow2_jax.benchmarking.timing import Result
from starflow2_jax.data import chat_layout, images, packed_batches, records
from starflow2_jax.data.mixture_packing import best_fit
from starflow2_jax.data.packed_batches import PackedBatchOptions
from starflow2_jax.data.packing import PackingSpec
from starflow2_jax.importers import procedural, tars
from starflow2_jax.importers.tally import Tally

TOKENIZER = os.path.join(os.path.dirname(__file__), "../pretrained/vlm_tiny")
SOURCE_SIDE = 256  # short side of the stored images, of 3:4
DISTINCT_IMAGES = 64
ROWS = 8  # of a host's batch
_WORDS = (
    "a the red blue small large circle cat dog on of with near photo bright under wooden table "
    "green old man woman riding city street sky night day two three many flowers painting"
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of accelerators and its step by the plan."""

    step_ms: float = 306.0  # `hybrid`, v5p:4x4x8, stage 1: the lower end, so the most images/s
    rows: int = 256  # of the global batch
    hosts: int = 32  # of four chips


def captions(count: int, seed: int = 0) -> Iterator[str]:
    """Yield captions of 5 to 59 words."""
    rng, words = np.random.default_rng(seed), _WORDS.split()
    for _ in range(count):
        yield " ".join(words[k] for k in rng.integers(0, len(words), rng.integers(5, 60)))


@functools.cache
def jpegs(side: int, count: int = DISTINCT_IMAGES) -> list[bytes]:
    """Return JPEGs of procedural images, 4 side / 3 wide and `side` high."""
    files = []
    for index in range(count):
        pixels = procedural.draw(procedural.image_rng(0, index), -(-4 * side // 3))
        file = io.BytesIO()
        Image.fromarray(pixels[:side]).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_tar(path: pathlib.Path, count: int, side: int = SOURCE_SIDE) -> None:
    """Write a WebDataset tar of captioned JPEGs."""
    pictures = jpegs(side)
    with tarfile.open(path, "w") as archive:
        for index, caption in enumerate(captions(count)):
            key = f"{index:09d}"
            for name, data in (
                (f"{key}.jpg", pictures[index % len(pictures)]),
                (f"{key}.txt", caption.encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def import_tar(tar: pathlib.Path, out: pathlib.Path) -> None:
    """Import a WebDataset tar to a dataset folder."""
    records.write(out, tars.webdataset([tar], Tally()))


@contextlib.contextmanager
def dataset(count: int, side: int = SOURCE_SIDE) -> Iterator[str]:
    """Yield a temporary dataset folder of `count` captioned JPEGs."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tar(folder / "images.tar", count, side)
        import_tar(folder / "images.tar", folder / "data")
        (folder / "images.tar").unlink()
        yield str(folder / "data")


def row_options(folder: str, **changes: Any) -> PackedBatchOptions:
    """Return the options of rows of stage 1 at paper size."""
    size = stages.STAGES["stage1"]
    options = PackedBatchOptions(
        path=folder,
        tokenizer=TOKENIZER,
        packing=PackingSpec(size["length"], 256, size["images"]),
        packing_over="mixture",
        grid_side=16,
        pixels=256,
        resize="center_crop",
    )
    return dataclasses.replace(options, **changes)


def measure_rows(
    count: int, batches: int, loaders: tuple[tuple[int, int], ...], target: Slice
) -> Result:
    """Time one thread's work on an image, and loaders of (processes, threads) each.

    Args:
        count: records to write.
        batches: of `ROWS` rows, to time.
        loaders: the first reads in one core.

    Returns:
        `us_...`, microseconds of one core per image and kind of work;
        `images_per_s_N_processes_M_threads` of each loader, and `images_per_s_core` of the first;
        `images_per_s_host` that a host of `target` needs, and `cores_per_host` for it.
    """
    with dataset(count) as folder:
        return _measure_folder(folder, batches, loaders, target)


def _measure_folder(
    folder: str, batches: int, loaders: tuple[tuple[int, int], ...], target: Slice
) -> Result:
    row: Result = {f"us_{name}": 1e6 * s for name, s in _seconds_of_work(folder, batches).items()}
    images_per_row, rates = 0.0, []
    for processes, threads in loaders:
        speed, images_per_row = _loader_speed(folder, batches, processes, threads)
        row[f"images_per_s_{processes}_processes_{threads}_threads"] = speed
        rates.append(speed)
    needed = 1000 * target.rows * images_per_row / target.step_ms / target.hosts
    row |= {"images_per_row": images_per_row, "images_per_s_host": needed}
    return row | {"images_per_s_core": rates[0], "cores_per_host": needed / rates[0]}


def _seconds_of_work(folder: str, batches: int) -> dict[str, float]:
    """Return processor seconds per image: of reading, decoding, resizing, and making rows."""
    options = row_options(folder, threads=0)
    tokenizer, stored = packed_batches.open_tokenizer(options), records.read(folder)
    count = min(len(stored), 4 * ROWS * batches)
    indices = np.random.default_rng(0).permutation(len(stored))[:count].tolist()
    seconds: dict[str, float] = {}

    def timed(name: str, values: Iterator[Any], keep: bool = True) -> list[Any]:
        # Arrays that are kept would add the kernel's time to provide their pages.
        start = time.thread_time()
        result = list(values) if keep else collections.deque(values, maxlen=1)
        seconds[name] = (time.thread_time() - start) / count
        return list(result)

    read = timed("read", (stored[index] for index in indices))
    pictures = itertools.cycle([images.decode(r.imgs[0].data, r.id) for r in read[:8]])
    timed("decode", (images.decode(r.imgs[0].data, r.id) for r in read), keep=False)
    timed("resize", (images.square(next(pictures), 256, "center_crop", "") for _ in read), False)
    sequences = timed(
        "tokenize",
        (
            chat_layout.apply_chat_template(
                chat_layout.message_parts(record)[0], tokenizer, options.packing.image_tokens
            )
            for record in read
        ),
    )

    def rows() -> Iterator[dict[str, np.ndarray]]:
        lengths = [len(sequence.ids) for sequence in sequences]
        for row in best_fit(lengths, [1] * count, options.packing):
            members = [sequences[number] for number in row]
            yield packed_batches.build_packed_row(members, options.packing, 16, tokenizer.pad)

    timed("pack", rows(), keep=False)
    return seconds


def _loader_speed(folder: str, batches: int, processes: int, threads: int) -> tuple[float, float]:
    """Return the images per second of a loader, and the images of a row."""
    options = row_options(folder, processes=processes, threads=threads)
    stream = packed_batches.batches(options, batch_size=ROWS)
    # What was read ahead is used up first.
    for _ in range(2 + 3 * max(1, processes) * max(1, threads)):
        next(stream)
    start, count = time.perf_counter(), 0
    for batch in itertools.islice(stream, batches):
        count += int((batch["image"] >= 0).sum()) // options.packing.image_tokens
    seconds = time.perf_counter() - start
    stream.close()
    return count / seconds, count / (batches * ROWS)

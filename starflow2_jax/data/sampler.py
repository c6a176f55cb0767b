"""From a numbered stream of examples to host batches, where the position is the step number.

Batch k is a pure function of the data and k: the examples of global batch k are the same, in the
same order, for any number of hosts, and a run resumes at step k by asking for step k. No iterator
state is ever saved. Order: each source is shuffled globally with a seed of its own for each epoch,
repeated, then mixed by weight; a host makes the rows of every global batch that it is asked for
and reads nothing else.
"""

import difflib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from starflow2_jax.data.manifest import DatasetError

Example = dict[str, Any]
# (source number, index in it, (step, row) or None outside training) -> (example, whether it is the
# one asked for).
Read = Callable[[int, int, tuple[int, int] | None], tuple[Example, bool]]


def order(
    counts: Sequence[int], weights: Sequence[float], *, shuffle: bool, seed: int
) -> grain.MapDataset:
    """Position in the training stream -> (source number, index in it).

    Args:
      counts, weights: examples of each source, and its share of the stream.
    """
    streams = []
    for number, count in enumerate(counts):
        stream = grain.MapDataset.range(count).map(functools.partial(_pair, number))
        if shuffle:
            # grain shuffles epoch e with seed + e. Spread the seeds, or run seed 1 would see in its
            # first epoch what run seed 0 sees in its second.
            own = np.random.SeedSequence((seed, number)).generate_state(1)[0]
            stream = stream.shuffle(seed=int(own))
        streams.append(stream.repeat())
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, weights=list(weights))


def _pair(number: int, index: int) -> tuple[int, int]:
    return number, index


def endless(
    order: grain.MapDataset,
    read: Read,
    *,
    batch_size: int,
    threads: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Example]:
    """Training batches without end, the first one that of `start_step`.

    Args:
      batch_size: examples in the global batch; threads: reading threads, each making whole batches;
        0 reads in the caller's thread.
      rows: which rows of each global batch this host makes, in order (`mesh.host_rows`); None: all.

    Raises:
      ValueError: rows that a batch does not have.
    """
    mine = _checked(rows, batch_size)

    def make(step: int) -> Example:
        return stack([read(*order[step * batch_size + row], (step, row))[0] for row in mine])

    # MapDataset.range counts steps, so that threads work on whole batches.
    steps = grain.MapDataset.range(start_step, sys.maxsize)
    return iter(steps.map(make).to_iter_dataset(_read_options(threads)))


def one_pass(
    counts: Sequence[int],
    read: Read,
    *,
    batch_size: int,
    threads: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Example]:
    """All examples in order, every batch of full size.

    Adds `row` int32 [b], each row's position in the pass, and `mask` float32 [b]: 0 for the rows
    that fill the last batch (id "") and for examples that are not those asked for. Arguments and
    errors as in `endless`.
    """
    mine, total = _checked(rows, batch_size), sum(counts)

    def place(position: int) -> tuple[int, int]:
        number = 0
        while position >= counts[number]:
            position -= counts[number]
            number += 1
        return number, position

    def make(step: int) -> Example:
        examples, mask, positions = [], [], [step * batch_size + row for row in mine]
        for position in positions:
            example, good = read(*place(min(position, total - 1)), None)
            if position >= total:
                example, good = {**example, "id": ""}, False
            examples.append(example)
            mask.append(good)
        found = {"row": np.asarray(positions, np.int32), "mask": np.asarray(mask, np.float32)}
        return stack(examples) | found

    steps = grain.MapDataset.range(-(-total // batch_size))
    return iter(steps.map(make).to_iter_dataset(_read_options(threads)))


def _checked(rows: Sequence[int] | None, batch_size: int) -> list[int]:
    mine = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    if not mine or min(mine) < 0 or max(mine) >= batch_size:
        raise ValueError(f"rows {mine[:4]} ... are not of a batch of batch_size={batch_size}")
    return mine


def forgiving(
    example: Callable[[int, int, tuple[int, int] | None], Example],
    counts: Sequence[int],
    budget: int,
) -> Read:
    """`example` with a budget of bad ones, counted and logged, that their neighbours replace.

    Args:
      example: (source number, index, (step, row) or None) -> example; DatasetError for a bad one.
      budget: `data.skip_bad`, how many different bad ones each host may replace.
    """
    lock = threading.Lock()
    bad: set[tuple[int, int]] = set()

    def read(number: int, index: int, at: tuple[int, int] | None) -> tuple[Example, bool]:
        good = True
        while True:
            try:
                return example(number, index, at), good
            except DatasetError as error:
                with lock:
                    new = (number, index) not in bad
                    bad.add((number, index))
                    count = len(bad)
                if count > budget or count >= counts[number]:
                    if budget:
                        raise DatasetError(
                            f"{count} bad records, more than data.skip_bad={budget}; "
                            f"the last: {error}"
                        ) from error
                    raise
                if new:
                    logging.warning("skipped bad record %d of %d: %s", count, budget, error)
                # The neighbour, so that the batch stays a function of the step alone.
                index, good = (index + 1) % counts[number], False

    return read


def stack(rows: list[Example]) -> Example:
    """Examples as a batch; their ids as a list."""
    batch: Example = {"id": [row["id"] for row in rows]}
    for name in rows[0]:
        if name != "id":
            batch[name] = np.stack([row[name] for row in rows])
    return batch


def refuse_unknown(given: Mapping[str, Any], names: Any, what: str) -> None:
    """ValueError for a key that is not among `names`, with the nearest one."""
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, list(names), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise ValueError(f"{what}.{key}: unknown key{hint}")


def _read_options(threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))

"""From a numbered stream of examples to host batches, where the position is the step number.

Batch k is a pure function of the data and k: the examples of global batch k are the same, in the
same order, for any number of hosts, and a run resumes at step k by asking for step k. No iterator
state is ever saved. Each source is shuffled globally with its own seed for each epoch, repeated,
then mixed by weight. A host reads only the rows that it contributes to each global batch.
"""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.mixture import MixtureOptions, Source

Example = dict[str, Any]
# (step, row of the global batch) of an example in training; None in evaluation.
Position = tuple[int, int] | None
ReadExample = Callable[[Source, int, Position], Example]
# Opens the sources, and returns them with the function that reads their examples.
OpenReader = Callable[[], tuple[Sequence[Source], ReadExample]]
# (source number, index in the source, position) -> (example, whether it is the requested one).
_Read = Callable[[int, int, Position], tuple[Example, bool]]


def training_batches(
    open_reader: OpenReader,
    options: MixtureOptions,
    *,
    batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Example]:
    """Yield training batches without end, starting with that of `start_step`.

    With `options.processes`, grain starts these processes and takes a batch from each in turn. Each
    of them opens the sources for itself.

    Args:
        open_reader: returns the sources, and the function that reads one example of a source and
            raises DatasetError for a bad one. It can be pickled.
        batch_size: examples in the global batch.
        rows: rows of each global batch that this host makes, in order (`mesh.host_rows`); None for
            all of them.
    """
    host_rows = _check_rows(rows, batch_size)
    make_batch = _TrainingBatch(open_reader, options, batch_size, host_rows)
    make_batch.open()  # also with processes: what cannot be opened is reported here
    return _iterate(make_batch, start_step, sys.maxsize, options)


class _TrainingBatch:
    """The batch of a step. A copy in another process opens the sources when it is first called."""

    def __init__(
        self,
        open_reader: OpenReader,
        options: MixtureOptions,
        batch_size: int,
        host_rows: Sequence[int],
    ):
        self._arguments = open_reader, options, batch_size, host_rows
        self._lock = threading.Lock()
        self._make_batch: Callable[[int], Example] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _TrainingBatch, self._arguments

    def __call__(self, step: int) -> Example:
        return self.open()(step)

    def open(self) -> Callable[[int], Example]:
        """Return the function from a step to its batch."""
        with self._lock:
            if self._make_batch is None:
                self._make_batch = _batch_function(*self._arguments)
            return self._make_batch


def _batch_function(
    open_reader: OpenReader, options: MixtureOptions, batch_size: int, host_rows: Sequence[int]
) -> Callable[[int], Example]:
    sources, read_example = open_reader()
    read = _with_skip_budget(sources, read_example, options.skip_bad)
    order = _example_order(sources, options)

    def make_batch(step: int) -> Example:
        first = step * batch_size
        return _stack([read(*order[first + row], (step, row))[0] for row in host_rows])

    return make_batch


def eval_batches(
    sources: Sequence[Source],
    read_example: ReadExample,
    options: MixtureOptions,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Example]:
    """Yield all examples once, in order, in batches of full size.

    Adds `row` int32 [b], the position of each row in the pass, and `mask` float32 [b], which is 0
    for the rows that fill the last batch (id "") and for bad examples within the `skip_bad`
    budget. Shuffle and weights have no effect, and one process reads.

    Args:
        read_example: reads one example of a source; DatasetError marks a bad one.
        batch_size, rows: as in `training_batches`.
    """
    host_rows = _check_rows(rows, batch_size)
    read = _with_skip_budget(sources, read_example, options.skip_bad)
    starts = np.cumsum([0, *(len(source) for source in sources)])
    total = int(starts[-1])

    def make_batch(step: int) -> Example:
        positions = [step * batch_size + row for row in host_rows]
        examples, mask = [], []
        for position in positions:
            clipped = min(position, total - 1)
            number = int(np.searchsorted(starts, clipped, side="right")) - 1
            example, is_requested = read(number, clipped - int(starts[number]), None)
            if position >= total:
                example, is_requested = {**example, "id": ""}, False
            examples.append(example)
            mask.append(is_requested)
        row, mask = np.asarray(positions, np.int32), np.asarray(mask, np.float32)
        return {**_stack(examples), "row": row, "mask": mask}

    options = dataclasses.replace(options, processes=0)
    return _iterate(make_batch, 0, -(-total // batch_size), options)


def _example_order(sources: Sequence[Source], options: MixtureOptions) -> grain.MapDataset:
    """Return the training order: position in the stream -> (source number, index in it)."""
    streams = []
    for number, source in enumerate(sources):
        stream = grain.MapDataset.range(len(source)).map(functools.partial(_pair, number))
        if options.shuffle:
            # grain shuffles epoch e with seed + e. Spread the seeds, or the first epoch of run
            # seed 1 would equal the second epoch of run seed 0.
            seed = np.random.SeedSequence((options.seed, number)).generate_state(1)[0]
            stream = stream.shuffle(seed=int(seed))
        streams.append(stream.repeat())
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, weights=[source.weight for source in sources])


def _pair(number: int, index: int) -> tuple[int, int]:
    return number, index


def _with_skip_budget(sources: Sequence[Source], read_example: ReadExample, budget: int) -> _Read:
    """Return a reader that replaces up to `budget` different bad examples by their neighbors.

    Bad examples are counted and logged; the one after the budget is an error.
    """
    lock = threading.Lock()
    bad: set[tuple[int, int]] = set()

    def read(number: int, index: int, position: Position) -> tuple[Example, bool]:
        source, is_requested = sources[number], True
        while True:
            try:
                return read_example(source, index, position), is_requested
            except DatasetError as error:
                with lock:
                    is_new = (number, index) not in bad
                    bad.add((number, index))
                    count = len(bad)
                if count > budget or count >= len(source):
                    if budget:
                        raise DatasetError(
                            f"{count} bad records, more than data.skip_bad={budget}; "
                            f"the last: {error}"
                        ) from error
                    raise
                if is_new:
                    logging.warning("skipped bad record %d of %d: %s", count, budget, error)
                # The neighbor, so that the batch stays a function of the step alone.
                index, is_requested = (index + 1) % len(source), False

    return read


def _check_rows(rows: Sequence[int] | None, batch_size: int) -> list[int]:
    host_rows = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    if not host_rows or min(host_rows) < 0 or max(host_rows) >= batch_size:
        raise ValueError(f"rows {host_rows[:4]} ... are not of a batch of batch_size={batch_size}")
    return host_rows


def _stack(examples: list[Example]) -> Example:
    """Stack the arrays of examples; their ids stay a list."""
    batch: Example = {"id": [example["id"] for example in examples]}
    for name in examples[0]:
        if name != "id":
            batch[name] = np.stack([example[name] for example in examples])
    return batch


def _iterate(
    make_batch: Callable[[int], Example], start: int, stop: int, options: MixtureOptions
) -> Iterator[Example]:
    # MapDataset.range counts steps, so that threads and processes work on whole batches.
    steps = grain.MapDataset.range(start, stop).map(make_batch)
    threads = options.threads
    read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    dataset = steps.to_iter_dataset(read_options)
    if options.processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # a program without absl flags: grain reads its own
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=options.processes, per_worker_buffer_size=2)
        )
    return iter(dataset)

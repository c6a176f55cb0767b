"""Latents of a dataset by Apache Beam: the same function for each shard, on any runner.

Needs the extra `beam`. Workers must see the folders under the same paths.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starflow2_jax.data import records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.latents import write as latents

# A path -> how to encode, and what the manifest says of the encoder.
Open = Callable[[str], tuple[latents.Encode, Mapping[str, Any]]]


def write(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    open_encoder: Open,
    fae: str,
    *,
    options: Sequence[str] = (),
) -> dict[str, int]:
    """Makes every shard that is missing, then the manifest. Counts and errors as `latents.write`.

    Args:
      open_encoder: a function of a module, called on every worker with `fae`, a path.
      options: of the pipeline, such as `--runner=DataflowRunner`.

    Raises:
      DatasetError: apache_beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise DatasetError(
            "apache_beam is not installed: pip install 'starflow2_jax[beam]'"
        ) from error
    folder, data = pathlib.Path(os.path.abspath(out)), os.path.abspath(data)
    parent, encoder = records.read(data).manifest, open_encoder(fae)[1]
    count = len(parent.shards)
    if latents.complete(folder, parent, encoder):
        return {"shards": count, "made": 0, "kept": count, "missing": 0}
    latents.begin(folder, parent, encoder)
    there = sum((folder / latents.shard_name(n, count)).exists() for n in range(count))
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbers = pipeline | beam.Create(range(count)) | beam.Reshuffle()
        _ = numbers | beam.Map(make, str(folder), data, open_encoder, fae)
    missing = latents.finish(folder, parent, encoder)
    return {"shards": count, "made": count - there, "kept": there, "missing": missing}


def make(number: int, folder: str, data: str, open_encoder: Open, fae: str) -> bool:
    """One shard on a worker."""
    encode, encoder = _opened(open_encoder, fae)
    return latents.make_shard(pathlib.Path(folder), records.read(data), number, encode, encoder)


@functools.lru_cache(maxsize=1)
def _opened(open_encoder: Open, fae: str) -> tuple[latents.Encode, Mapping[str, Any]]:
    """Once for all shards of a worker."""
    return open_encoder(fae)

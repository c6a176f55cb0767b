"""Encode a dataset of images with Apache Beam, on any runner.

Every shard is made by the same function as in `latents/write.py`. Requires the extra `beam`. All
workers must see the folders under the same paths.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starflow2_jax.data import records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.latents import write as latents

# From a path to the encode function and its description in the manifest.
OpenEncoder = Callable[[str], tuple[latents.Encode, Mapping[str, Any]]]


def write(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    open_encoder: OpenEncoder,
    fae: str,
    *,
    options: Sequence[str] = (),
) -> dict[str, int]:
    """Make every missing shard, then the manifest. Return counts as `latents.write.write` does.

    Args:
        open_encoder: a module-level function that every worker calls with `fae`.
        options: options of the pipeline, such as `--runner=DataflowRunner`.
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
    existing = sum((folder / latents.shard_name(n, count)).exists() for n in range(count))
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbers = pipeline | beam.Create(range(count)) | beam.Reshuffle()
        _ = numbers | beam.Map(make, str(folder), data, open_encoder, fae)
    missing = latents.finish(folder, parent, encoder)
    return {"shards": count, "made": count - existing, "kept": existing, "missing": missing}


def make(number: int, folder: str, data: str, open_encoder: OpenEncoder, fae: str) -> bool:
    """Make one shard on a worker."""
    encode, encoder = _open_cached(open_encoder, fae)
    return latents.make_shard(pathlib.Path(folder), records.read(data), number, encode, encoder)


@functools.lru_cache(maxsize=1)
def _open_cached(open_encoder: OpenEncoder, fae: str) -> tuple[latents.Encode, Mapping[str, Any]]:
    """Open the encoder once for all shards of a worker."""
    return open_encoder(fae)

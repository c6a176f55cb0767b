"""Rows of parquet, Arrow and JSON files, with a few in memory at a time, checked before use."""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from starflow2_jax.data import untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers.tally import RowError

SCHEMA = "row of another schema"


def convert(value: Any, type: Any, location: str) -> Any:
    """Return a value of a row checked against a msgspec type; RowError names the wrong field."""
    try:
        return untrusted.convert(value, type, location)
    except DatasetError as error:
        raise RowError(str(error), SCHEMA) from error


def decode_json(text: str | bytes | None, type: Any, location: str) -> Any:
    """Return the JSON value in a row checked against a msgspec type."""
    if not isinstance(text, str | bytes):
        raise RowError(f"{location}: {text.__class__.__name__}, expected a text of JSON", SCHEMA)
    try:
        data = text.encode("utf-8") if isinstance(text, str) else text
        return untrusted.decode_json(data, location, type)
    except UnicodeEncodeError as error:
        raise RowError(f"{location}: not valid Unicode: {error}", SCHEMA) from error
    except DatasetError as error:
        raise RowError(str(error), SCHEMA) from error


def parquet_rows(
    files: Sequence[str | os.PathLike[str]], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name:row and the values of parquet files with these columns."""
    from pyarrow import parquet

    for file in files:
        name, index = os.path.basename(os.fspath(file)), 0
        untrusted.check_regular(file)
        try:
            with parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                missing = [column for column in columns if column not in names]
                if missing:
                    raise DatasetError(
                        f"{name}: another schema: no column {missing[0]!r}; expected "
                        f"{', '.join(columns)}, found {', '.join(names)}"
                    )
                for batch in table.iter_batches(batch_size=16, columns=list(columns)):
                    # Offsets beyond a buffer would be followed out of it.
                    batch.validate(full=True)
                    for row in batch.to_pylist():
                        yield f"{name}:{index}", row
                        index += 1
        except (DatasetError, GeneratorExit):
            raise
        except Exception as error:  # of many kinds, whatever bytes are damaged
            message = f"{name}: not a complete parquet file (row {index}): {_line(error)}"
            raise DatasetError(message) from error


def has_columns(file: pathlib.Path, columns: Sequence[str]) -> bool:
    """Return whether a parquet file has these columns."""
    from pyarrow import parquet

    untrusted.check_regular(file)
    try:
        with parquet.ParquetFile(file) as table:
            return all(column in table.schema_arrow.names for column in columns)
    except Exception as error:
        raise DatasetError(f"{file}: not a parquet file: {_line(error)}") from error


def arrow_rows(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name:row and the values of an Arrow stream, the format of `datasets`."""
    import pyarrow

    index = 0
    untrusted.check_regular(file)
    try:
        with (
            pyarrow.memory_map(os.fspath(file)) as source,
            pyarrow.ipc.open_stream(source) as table,
        ):
            for batch in table:
                # Reading a row of damaged offsets would end the process by a signal.
                batch.validate(full=True)
                for number in range(batch.num_rows):
                    yield f"{file.name}:{index}", batch.slice(number, 1).to_pylist()[0]
                    index += 1
    except (DatasetError, GeneratorExit):
        raise
    except Exception as error:  # of many kinds, whatever bytes are damaged
        message = f"{file}: not a complete Arrow file (row {index}): {_line(error)}"
        raise DatasetError(message) from error


def json_rows(files: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[str, bytes]]:
    """Yield name:number and the JSON of every row of files of jsonl, or of one JSON list each.

    Rows are numbered from 0, by line in jsonl.
    """
    for file in files:
        name, size = os.path.basename(os.fspath(file)), untrusted.check_regular(file)
        lines = untrusted.read_lines(file)
        first = next(lines, None)
        if first is None:
            raise DatasetError(f"{file}: the file is empty")
        if first[1].startswith(b"["):
            if size > untrusted.MAX_JSON_BYTES:
                raise DatasetError(f"{file}: {size} bytes, at most {untrusted.MAX_JSON_BYTES}")
            data = untrusted.read_file(file, untrusted.MAX_JSON_BYTES)
            rows = untrusted.decode_json(data, name, list[msgspec.Raw])
            yield from ((f"{name}:{number}", bytes(row)) for number, row in enumerate(rows))
            continue
        yield f"{name}:{first[0]}", first[1]
        yield from ((f"{name}:{number}", line) for number, line in lines)


def _line(error: Exception) -> str:
    """Return the first line of an error's text; Arrow adds lines about its own source."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else error.__class__.__name__

"""Reading of files and texts that others wrote: sizes, kinds and encodings are checked first.

Only regular files are read, so that a pipe cannot hang a command and a device cannot fill its
memory. Text is valid Unicode without NUL, and its lines end in a line feed alone.
"""

import os
import re
import stat
from collections.abc import Iterator
from typing import Any

import msgspec
from etils import epath

from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.runtime import atomic

MAX_JSON_BYTES = 8 << 30  # of a file that is one JSON value
MAX_LINE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_regular(path: str | os.PathLike[str], location: str = "") -> int:
    """Return the size in bytes of a regular file.

    Raises:
        DatasetError: There is no such file, or it is a folder, a pipe, a socket or a device.
    """
    location = location or os.fspath(path)
    try:
        if atomic.is_remote(path):
            return epath.Path(path).stat().length
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{location}: cannot be read: {reason}") from error
    if stat.S_ISDIR(status.st_mode):
        raise DatasetError(f"{location}: a folder, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(f"{location}: not a regular file")
    return status.st_size


def read_file(path: str | os.PathLike[str], max_bytes: int, location: str = "") -> bytes:
    """Return the bytes of a regular file, whose size is checked before they are read.

    Raises:
        DatasetError: Not a regular file, or one of more than `max_bytes`; names `location`, by
            default the path.
    """
    location = location or os.fspath(path)
    size = check_regular(path, location)
    if size > max_bytes:
        raise DatasetError(f"{location}: {size} bytes, at most {max_bytes} allowed")
    try:
        with epath.Path(path).open("rb") as file:
            # Not of `max_bytes`, for which Python would allocate all the memory at once.
            return file.read(size)
    except OSError as error:
        raise DatasetError(f"{location}: cannot be read: {error.strerror or error}") from error


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 0, and the bytes of every line of a regular file that is not blank.

    Only a line feed ends a line: U+2028 and the like may stand within a JSON text.
    """
    check_regular(path)
    with epath.Path(path).open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise DatasetError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes")
            line = (line.removeprefix(_BOM) if number == 0 else line).strip(b" \t\r\n")
            if line:
                yield number, line
            number += 1


def decode_json(data: bytes, location: str, type: Any = Any) -> Any:
    """Return a JSON value, checked against a msgspec type; a byte order mark is left out.

    Raises:
        DatasetError: Not JSON, nested too deeply, not valid Unicode, or of another type.
    """
    try:
        return msgspec.json.decode(data.removeprefix(_BOM), type=type)
    except msgspec.ValidationError as error:
        raise DatasetError(f"{location}: {error}") from error
    except (ValueError, RecursionError) as error:
        # The decoder reports half of a surrogate pair as an invalid or a truncated text.
        is_surrogate = _SURROGATE.search(data) is not None
        hint = "; half of a surrogate pair, such as \\ud800, is no Unicode" if is_surrogate else ""
        raise DatasetError(f"{location}: not JSON: {error}{hint}") from error


def read_json(path: str | os.PathLike[str], type: Any = Any) -> Any:
    """Return the JSON value of a file, checked against a msgspec type; errors name the file."""
    return decode_json(read_file(path, MAX_JSON_BYTES), os.fspath(path), type)


def convert(value: Any, type: Any, location: str) -> Any:
    """Return a value checked against a msgspec type.

    Raises:
        DatasetError: Names `location`, the path of the wrong field and its type.
    """
    try:
        # Without `builtin_types`, a text would be read as base64 where bytes are expected.
        return msgspec.convert(value, type, builtin_types=(bytes,))
    except (ValueError, TypeError, RecursionError) as error:
        raise DatasetError(f"{location}: {error}") from error


def decode_text(data: bytes, location: str) -> str:
    """Decode UTF-8, with or without a byte order mark, and check it as `clean_text` does."""
    try:
        text = data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{location}: not UTF-8: {error}") from error
    return clean_text(text, location)


def clean_text(text: str, location: str) -> str:
    """Return a text whose lines end in a line feed.

    Raises:
        DatasetError: The text has a lone surrogate, which no tokenizer and no file can hold, or a
            NUL character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{location}: not valid Unicode (lone surrogate at {error.start}); expected UTF-8 text"
        ) from error
    if "\0" in text:
        raise DatasetError(f"{location}: a NUL character at {text.index(chr(0))}")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text

"""Counts of what an import leaves out, by reason, and the number that it may leave out.

Faults of a row, an image or a caption have budgets; the first one beyond its budget stops the
import. What is no part of the source (files of other kinds, hidden files) is counted alone.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from absl import logging

from starflow2_jax.data import images, records, untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import ImageBlob, Record

_INVALID = "not a valid record"
_MAX_LOGGED = 20  # lines per reason; the counts go on


class LeftOutError(DatasetError):
    """A fault of one record that an import can leave out."""

    budget: ClassVar[str] = "bad_rows"  # the field of `Tally` that limits its number

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason  # a few words, for the counts


class RowError(LeftOutError):
    """A row without the parts of a record, or with parts of other types."""


class ImageError(LeftOutError):
    """An image that is missing in its row, damaged, or over the limits."""

    budget = "bad_images"


class CaptionError(LeftOutError):
    """An image without a caption."""

    budget = "missing_captions"


@dataclasses.dataclass
class Tally:
    """Counts of what an import left out, and the budgets of each kind of fault."""

    missing_captions: int = 0  # images without a caption that may be left out
    bad_images: int = 0  # images that cannot be read that may be left out
    bad_rows: int = 0  # rows that are no records that may be left out
    check_pixels: bool = False  # decode every image, which finds truncated ones
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    budgets: Counter[str] = dataclasses.field(default_factory=Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)  # an example of each reason

    def clear(self) -> None:
        """Forget the counts, before the source is read again."""
        for counts in (self.reasons, self.budgets, self.first):
            counts.clear()

    def pass_over(self, reason: str, location: str) -> None:
        """Count something that is no part of the source."""
        self.reasons[reason] += 1
        self.first.setdefault(reason, location)

    def leave_out(self, error: LeftOutError) -> None:
        """Count a fault; raise it again if that exceeds the budget of its kind."""
        self.budgets[error.budget] += 1
        self.pass_over(error.reason, str(error))
        count, allowed = self.budgets[error.budget], getattr(self, error.budget)
        if count > allowed:
            suffix = f" ({count} {error.budget.replace('_', ' ')}, {allowed} allowed)"
            hint = f"; --{error.budget} N leaves out up to N, counted"
            # Of no kind that can be left out, so that no caller counts it again.
            raise DatasetError(f"{error}{suffix if allowed else ''}{hint}") from error
        if self.reasons[error.reason] <= _MAX_LOGGED:
            logging.warning("%s; left out (%d so far)", error, count)

    def leave_out_record(self, error: DatasetError) -> None:
        """Count a record that `records.write` refused."""
        self.leave_out(error if isinstance(error, LeftOutError) else RowError(str(error), _INVALID))

    def parse_rows(
        self, rows: Iterable[tuple[str, Any]], parse: Callable[[str, Any], list[Record]]
    ) -> Iterator[Record]:
        """Yield the records of rows, each with its location; leave out those with a fault."""
        for location, row in rows:
            try:
                parsed = parse(location, row)
            except LeftOutError as error:
                self.leave_out(error)
                continue
            yield from parsed

    def image(self, data: Any, location: str) -> ImageBlob:
        """Return the image of a file's bytes; ImageError if it is none or over the limits."""
        reason = "image cannot be read"
        if data is None:
            raise ImageError(f"{location}: the image is null", "image is null")
        if not isinstance(data, bytes):
            kind = type(data).__name__
            raise ImageError(f"{location}: {kind}, expected the bytes of an image", reason)
        try:
            blob = records.image_blob(data, location)
            if self.check_pixels:
                images.decode(data, location)
        except DatasetError as error:
            raise ImageError(str(error), reason) from error
        return blob

    def read_image(self, path: str | os.PathLike[str]) -> bytes:
        """Return the bytes of a regular file of an image; ImageError if it has too many."""
        try:
            return untrusted.read_file(path, images.MAX_BYTES)
        except DatasetError as error:
            raise ImageError(str(error), "image cannot be read") from error

    def counts(self) -> dict[str, Any]:
        """Return the counts for the result of an import."""
        budgets = ("missing_captions", "bad_images", "bad_rows")
        return {name: self.budgets[name] for name in budgets} | {"left_out": dict(self.reasons)}

    def summary(self) -> str:
        """Return the reasons with their counts and an example of each, for an error message."""
        counts = self.reasons.most_common()
        return "; ".join(f"{reason}: {n} (such as {self.first[reason]})" for reason, n in counts)


def text_of(value: str, location: str) -> str:
    """Return a text with line feeds alone; RowError if it is not valid Unicode or has NUL."""
    try:
        return untrusted.clean_text(value, location)
    except DatasetError as error:
        raise RowError(str(error), "text is not valid") from error


def captions_of(value: Any, location: str) -> list[str]:
    """Return the captions of a value, a text or a list of texts.

    Raises:
        CaptionError: The value is null or empty.
        RowError: The value is neither a text nor a list of texts.
    """
    values = value if isinstance(value, list | tuple) else [value]
    captions = []
    for text in values:
        if isinstance(text, bytes):
            try:
                text = untrusted.decode_text(text, location)
            except DatasetError as error:
                raise RowError(str(error), "text is not valid") from error
        if text is not None and not isinstance(text, str):
            raise RowError(
                f"{location}: the caption is {type(text).__name__} {text!r:.80}, expected a text; "
                "choose another column or convert it",
                "caption is no text",
            )
        text = text_of(text or "", location)
        if text.strip():
            captions.append(text)
    if not captions:
        raise CaptionError(f"{location}: no caption: it is empty or null", "caption missing")
    return captions

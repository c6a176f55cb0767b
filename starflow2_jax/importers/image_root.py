"""Images of a dataset that contains only their names or URLs, looked up in a folder."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import posixpath
from urllib.parse import urlsplit

from absl import logging

from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import ImageBlob
from starflow2_jax.importers import folders, tables
from starflow2_jax.importers.captioned import IMAGE_SUFFIXES
from starflow2_jax.importers.tally import Tally

_DOWNLOADED = "success"  # img2dataset's status


@dataclasses.dataclass
class ImageRoot:
    """A folder with the images of a dataset that contains only their names or URLs.

    An image is found by its path in the folder. With only a URL, it is the file of img2dataset's
    key, if one of img2dataset's tables (`*.parquet`) has the URL. Otherwise it is found by the stem
    of a file: its name in the dataset, the sha256 of the URL, or, without tables, the last part of
    the URL. A stem that two files or two URLs share finds an image for one of them at most.
    """

    path: str = ""
    keep_text: bool = False  # leave out a missing image only, not its whole record
    tally: Tally = dataclasses.field(default_factory=Tally)
    missing: int = 0  # number of missing images
    left_out: int = 0  # number of records left out because of them

    def __post_init__(self):
        self._files: dict[str, pathlib.Path] = {}
        self._stems: dict[str, pathlib.Path | None] = {}
        self._keys: dict[str, tuple[str, str]] = {}  # URL -> table and key, empty if it failed
        self._urls: dict[pathlib.Path, str] = {}  # the URL that each file was found for
        if not self.path:
            return
        root = pathlib.Path(self.path).resolve()
        if not root.is_dir():
            raise DatasetError(f"--image_root {self.path}: no such folder")
        # What else is in the folder is no part of the source, so it is not counted.
        for file in folders.list_files(root, IMAGE_SUFFIXES, Tally(), strict=False):
            self._files[file.relative_to(root).as_posix()] = file
            self._stems[file.stem] = None if file.stem in self._stems else file
        for table in sorted(root.glob("*.parquet")):
            if not folders.is_hidden(table.name) and tables.has_columns(table, ("url", "key")):
                self._read_table(table)

    def _read_table(self, table: pathlib.Path) -> None:
        has_status = tables.has_columns(table, ("status",))
        columns = ("url", "key", *(("status",) if has_status else ()))
        for _, row in tables.parquet_rows([table], columns):
            url, key = row["url"], row["key"]
            if isinstance(url, str):
                is_there = isinstance(key, str) and row.get("status", _DOWNLOADED) == _DOWNLOADED
                self._keys[url] = (table.stem, key if is_there else "")

    def clear(self) -> None:
        """Forget the counts, before the source is read again."""
        self.missing = self.left_out = 0
        self._urls.clear()

    def by_path(self, path: str) -> ImageBlob | None:
        """Return the image at a path in the folder; None, counted as missing, if there is none."""
        return self._read(self._files.get(path))

    def by_url(self, url: str, name: str = "") -> ImageBlob | None:
        """Return the image of a URL, also called `name`; None, counted as missing, without one."""
        if url in self._keys:
            return self._read(self._by_key(*self._keys[url]))
        sha = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        stems = [posixpath.splitext(name)[0], sha]
        if not self._keys:
            with contextlib.suppress(ValueError):  # a bad URL has no last part
                stems.append(posixpath.splitext(posixpath.basename(urlsplit(url).path))[0])
        file = next((self._stems[s] for s in stems if s and self._stems.get(s)), None)
        if file is not None and self._urls.setdefault(file, url) != url:
            logging.warning("%s: two URLs have this name: %s and %s", file, self._urls[file], url)
            file = None
        return self._read(file)

    def _by_key(self, table: str, key: str) -> pathlib.Path | None:
        if not key:
            return None
        in_folder = (self._files.get(f"{table}/{key}{suffix}") for suffix in IMAGE_SUFFIXES)
        return next((file for file in in_folder if file), None) or self._stems.get(key)

    def _read(self, file: pathlib.Path | None) -> ImageBlob | None:
        if file is None:
            self.missing += 1
            return None
        return self.tally.image(self.tally.read_image(file), os.fspath(file))

    def counts(self) -> dict[str, int]:
        """Return the counts for the result of an import."""
        return {"missing_images": self.missing, "records_left_out": self.left_out}

    def skip(self, location: str) -> None:
        """Count and log a record that is left out because of a missing image."""
        self.left_out += 1
        self.tally.pass_over("image missing", location)
        logging.warning("%s: an image is missing, left out (%d so far)", location, self.left_out)

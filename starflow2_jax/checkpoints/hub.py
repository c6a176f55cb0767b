"""Read model folders from the Hugging Face Hub: `hf://user/name[@revision][/folder]`.

Files are kept in the cache of `huggingface_hub` (`HF_HOME`), which `HF_HUB_OFFLINE=1` makes the
only source. Code and pickles of a repository are not downloaded. The contents of every file are
compared with the digest that the Hub recorded when it was uploaded.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from starflow2_jax import __version__
from starflow2_jax.checkpoints import digest

PREFIX = "hf://"
LIBRARY = "starflow2_jax"
# Everything that model folders, tokenizers and published models consist of, and no code.
FILE_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.yaml", "*.md")
_NAME = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(
    rf"hf://(?:models/(?={_NAME}/{_NAME}))?(?P<repo>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/(?:pr/\d+|convert/[\w.-]+)|[\w.%+-]+))?"
    r"(?:/(?P<folder>[\w.-]+(?:/[\w.-]+)*))?/?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Address:
    """A folder or file of a model repository on the Hub, at a revision."""

    repo: str  # `user/name`
    revision: str = ""  # a branch, tag or commit; empty: the default branch
    folder: str = ""  # path inside the repository; empty: all of it

    @property
    def is_pinned(self) -> bool:
        """Return True if the revision is a commit, so that the files never change."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        is_ref = self.revision.startswith("refs/")
        revision = self.revision if is_ref else quote(self.revision, safe="")
        parts = (PREFIX, self.repo, revision and f"@{revision}", self.folder and f"/{self.folder}")
        return "".join(parts)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return True if `path` begins with `hf://`."""
    return os.fspath(path).startswith(PREFIX)


def parse(text: str) -> Address:
    """Return the parts of an address.

    Raises:
        ValueError: It has another form, or is that of a dataset or space.
    """
    match = _ADDRESS.fullmatch(text)
    folder = match["folder"] or "" if match else ""
    is_model = match is not None and match["repo"].split("/")[0] not in ("datasets", "spaces")
    if match is None or not is_model or {"..", "."} & set(folder.split("/")):
        raise ValueError(
            f"{text}: not a model on the Hugging Face Hub; expected hf://USER/NAME, "
            "hf://USER/NAME@REVISION or hf://USER/NAME@REVISION/FOLDER"
        )
    return Address(match["repo"], unquote(match["revision"] or ""), folder)


def join(path: str, name: str) -> str:
    """Return the path of a file or folder inside `path`, which may be an address."""
    if not is_address(path):
        return str(Path(path, name))
    address = parse(path)
    return str(dataclasses.replace(address, folder=f"{address.folder}/{name}".lstrip("/")))


def pin(path: str) -> str:
    """Return an address with the commit that its revision is now; other paths are unchanged.

    All processes of a run pin before they compare configurations, so that they read the same files.
    """
    if not is_address(path):
        return path
    address = parse(path)
    return str(address if address.is_pinned else pull(str(address))[0])


def is_same_model(path: str, pinned: str) -> bool:
    """Return True if an address and one with a commit differ in the revision at most.

    An address with a commit is the same as that commit only.
    """
    first, second = parse(path), parse(pinned)
    return first == second or (
        not first.is_pinned and (first.repo, first.folder) == (second.repo, second.folder)
    )


@functools.cache
def pull(address: str) -> tuple[Address, Path]:
    """Download what an address names, unless it is in the cache.

    An address means the same commit until the process ends.

    Returns:
        The address with its commit, and the local copy.

    Raises:
        FileNotFoundError: There is no such repository, revision or folder, or no access to it.
        OSError: The Hub cannot be reached and the cache lacks files.
        ValueError: A file is damaged.
    """
    import huggingface_hub  # heavy

    parsed = parse(address)
    inside = parsed.folder and f"{parsed.folder}/"
    patterns = [f"{inside}{pattern}" for pattern in FILE_PATTERNS]
    try:
        snapshot = huggingface_hub.snapshot_download(
            parsed.repo,
            revision=parsed.revision or None,
            allow_patterns=[*patterns, parsed.folder] if parsed.folder else patterns,
            library_name=LIBRARY,
            library_version=__version__,
        )
    except Exception as error:  # of many kinds, those of its HTTP library included
        raise explain(address, error) from error
    pinned = dataclasses.replace(parsed, revision=Path(snapshot).name)
    local = Path(snapshot, parsed.folder)
    if not local.exists():
        raise FileNotFoundError(f"{pinned}: the repository has no {parsed.folder}")
    for name, problem in damaged_files(local):
        raise ValueError(f"{pinned}: {name} is damaged: {problem}")
    return pinned, local


def damaged_files(path: Path) -> Iterator[tuple[str, str]]:
    """Compare files of the cache with the digests of the Hub, which are the names of their blobs.

    Yields:
        Name and problem of each damaged file in a folder, or of the file `path`.
    """
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        blob = Path(os.path.realpath(file))
        expected = blob.name
        if file.is_dir():
            continue
        if _SHA256.fullmatch(expected):
            kind, actual = "sha256", digest.sha256_file(blob)
        elif _COMMIT.fullmatch(expected):
            kind, actual = "git's sha1", git_sha1(blob.read_bytes())
        else:
            continue  # a cache without links has no blobs
        if actual != expected:
            name = file.name if file == path else file.relative_to(path).as_posix()
            yield (
                name,
                f"{kind} {actual}, the Hub recorded {expected}; delete {blob} and run the same "
                "command again, which downloads it",
            )


def git_sha1(data: bytes) -> str:
    """Return the hex digest by which git, and the Hub, name a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def explain(address: str, error: Exception) -> OSError:
    """Return an error of one line for one of `huggingface_hub`."""
    from huggingface_hub import errors  # heavy

    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        reason = f"access is granted on request: ask for it on the model's page, and {login}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = f"there is no such repository, or it is private: {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "the repository has no such revision"
    elif status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        reason = f"the Hub refused access ({status}): {login}, with a token that may do this"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        return OSError(f"{address}: {why}, and the cache does not have all of its files")
    else:
        return OSError(f"{address}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
    is_absent = isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError)
    return (FileNotFoundError if is_absent else OSError)(f"{address}: {reason}")

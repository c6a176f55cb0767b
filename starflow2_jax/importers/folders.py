"""The files of a folder of images: hidden files, links and files of other kinds are told apart."""

import os
import pathlib

from starflow2_jax.data import untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers.tally import Tally

_HIDDEN_FOLDERS = ("__MACOSX",)


def is_hidden(path: str) -> bool:
    """Return whether a relative path names a hidden file or lies in a hidden folder.

    macOS writes `._name` and `__MACOSX` beside the files of others, and Jupyter keeps old copies in
    `.ipynb_checkpoints`.
    """
    parts = path.replace("\\", "/").split("/")
    return any(
        (part.startswith(".") and part not in (".", "..")) or part in _HIDDEN_FOLDERS
        for part in parts
    )


def list_files(
    root: pathlib.Path, suffixes: tuple[str, ...], tally: Tally, *, strict: bool = True
) -> list[pathlib.Path]:
    """Return the regular files of a folder with these suffixes, in the order of relative paths.

    Hidden files and files of other kinds are counted in `tally`.

    Args:
        root: the folder, resolved.
        suffixes: lower-case suffixes, such as `.png`; files may have them in upper case.
        tally: receives the counts.
        strict: links out of the folder and links to folders are errors; otherwise they are counted
            and not followed.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    files: list[pathlib.Path] = []

    def refuse(message: str, reason: str) -> None:
        if strict:
            raise DatasetError(message)
        tally.pass_over(reason, message)

    def cannot_list(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=cannot_list):
        for name in sorted(subfolders):
            path = pathlib.Path(folder, name)
            if is_hidden(name):
                tally.pass_over("hidden files", str(path))
                subfolders.remove(name)
            elif path.is_symlink():
                subfolders.remove(name)
                refuse(
                    f"{path}: a link to a folder, which is not followed; put the folder itself "
                    "there, or import it by a --source of its own",
                    "links",
                )
        for name in names:
            path = pathlib.Path(folder, name)
            if is_hidden(name):
                tally.pass_over("hidden files", str(path))
            elif path.is_symlink() and not path.exists():
                refuse(f"{path}: a link to nothing", "links")
            elif path.suffix.lower() not in suffixes:
                kind = f"{path.suffix.lower()} files" if path.suffix else "files without a suffix"
                tally.pass_over(kind, str(path))
            elif not path.resolve().is_relative_to(root):
                refuse(f"{path}: a link that leads out of {root}", "links")
            else:
                untrusted.check_regular(path)
                files.append(path)
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())

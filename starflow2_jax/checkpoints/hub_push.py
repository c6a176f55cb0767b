"""Upload a model folder to the Hugging Face Hub, with a model card, in one commit.

Nothing is uploaded unless every file of the folder has its digest. After the commit, the digests
that the Hub has recorded are compared with those of the folder.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from starflow2_jax.checkpoints import digest, hub, model_folder
from starflow2_jax.checkpoints.model_card import CARD_FILE
from starflow2_jax.runtime import atomic

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Files of a repository that a push removes if the folder has none of that name: those of an earlier
# model. Pictures and other texts stay.
_MODEL_SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class Upload:
    """The files of a repository."""

    folder: Path
    names: tuple[str, ...]  # relative to `folder`, without the card
    card: str


def prepare(folder: str | Path, card: str) -> Upload:
    """Return the upload of a model folder after comparing every file with its digest.

    Only files with a digest are uploaded, so nothing else that lies in the folder becomes public.

    Args:
        card: text of the model card. A `README.md` in the folder takes its place.

    Raises:
        ValueError, FileNotFoundError: The folder is damaged or incomplete.
    """
    folder = Path(folder)
    model_folder.read_digests(folder)  # a model folder has them
    model_folder.check(folder)
    own_card = folder / CARD_FILE
    text = own_card.read_text("utf-8") if own_card.exists() else card
    return Upload(folder, tuple(sorted(_listed_files(folder))), text)


def _listed_files(folder: Path) -> set[str]:
    """Return the files with digests, those of inner folders with lists of their own included."""
    names = {*model_folder.read_digests(folder), model_folder.DIGEST_FILE} - {CARD_FILE}
    for inner in folder.glob(f"*/{model_folder.DIGEST_FILE}"):
        names |= {f"{inner.parent.name}/{name}" for name in _listed_files(inner.parent)}
    return names


def write(upload: Upload, out: str | Path, *, overwrite: bool = False) -> None:
    """Write the files of an upload to the folder `out` instead."""
    path = Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(f"--out {path} exists already; --overwrite replaces it")
    if path.exists() and not (path / model_folder.DIGEST_FILE).exists():
        raise FileExistsError(f"--out {path} is no model folder and is not replaced")
    with atomic.folder(path, overwrite=overwrite) as temporary:
        for name in upload.names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(upload.folder / name, temporary / name)
        (temporary / CARD_FILE).write_text(upload.card, "utf-8")


def push(upload: Upload, repo: str, *, private: bool = False) -> hub.Address:
    """Upload to a repository, which is created if it does not exist; return its new address.

    Raises:
        ValueError: The repository is public and `private` is set, or its files differ afterwards.
        OSError: The Hub refused access, or was not reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    address = hub.Address(repo)
    api = HfApi(library_name=hub.LIBRARY)
    present, is_public = _open_repo(api, repo, private)
    if private and is_public:
        raise ValueError(
            f"--private: {repo} exists and is public; nothing was uploaded. Make it private in its "
            "settings, or choose another --repo"
        )
    additions = [
        *(CommitOperationAdd(name, str(upload.folder / name)) for name in upload.names),
        CommitOperationAdd(CARD_FILE, upload.card.encode()),
    ]
    deletions = [
        CommitOperationDelete(name)
        for name in sorted(present - {*upload.names, CARD_FILE})
        if name.endswith(_MODEL_SUFFIXES)
    ]
    try:
        commit = api.create_commit(
            repo,
            [*additions, *deletions],
            commit_message=f"Upload {upload.folder.resolve().name} with starflow2_jax",
        )
        pinned = hub.Address(repo, commit.oid)
        files = api.model_info(repo, revision=commit.oid, files_metadata=True).siblings or ()
    except Exception as error:  # of many kinds, those of its HTTP library included
        raise hub.explain(str(address), error) from error
    if problems := differences(upload, files):
        raise ValueError(f"{pinned}: the upload is damaged, push again: {'; '.join(problems)}")
    return pinned


def _open_repo(api: "HfApi", repo: str, private: bool) -> tuple[set[str], bool]:
    """Return the files of a repository, which is created if necessary, and True if it is public."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private)
            info = api.model_info(repo)
    except Exception as error:  # of many kinds, those of its HTTP library included
        raise hub.explain(str(hub.Address(repo)), error) from error
    return {file.rfilename for file in info.siblings or ()}, not info.private


def differences(upload: Upload, files: Iterable[Any]) -> list[str]:
    """Return a line for every file whose digest on the Hub is another one.

    Args:
        files: `RepoSibling`s with metadata.
    """
    remote: Mapping[str, Any] = {file.rfilename: file for file in files}
    local = digest.compute(epath.Path(upload.folder), upload.names)
    problems = []
    for name in [*upload.names, CARD_FILE]:
        file = remote.get(name)
        if file is None:
            problems.append(f"{name} is missing")
        elif file.lfs is not None:
            data = upload.card.encode()
            expected = local.get(name) or hashlib.sha256(data).hexdigest()
            if file.lfs.sha256 != expected:
                problems.append(f"{name} has sha256 {file.lfs.sha256}, expected {expected}")
        else:
            data = upload.card.encode() if name == CARD_FILE else None
            expected = hub.git_sha1(data or (upload.folder / name).read_bytes())
            if file.blob_id != expected:
                problems.append(f"{name} has git's sha1 {file.blob_id}, expected {expected}")
    return problems

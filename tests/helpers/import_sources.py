"""Small sources of an import, and a run of `prepare import` on one."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow
import pytest
from absl import flags

from starflow2_jax import prepare
from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.importers import interleaved
from starflow2_jax.importers.image_root import ImageRoot
from starflow2_jax.importers.tally import Tally


def png(number=0):
    return images.encode_png(np.full((4, 5, 3), number, np.uint8))


def run(tmp_path, *argv):
    """Import to a new folder; return the result and the records."""
    values = flags.FlagValues()
    prepare.define(values)
    out = tmp_path / f"out{len(os.listdir(tmp_path))}"
    values(["prepare", *map(str, argv), "--out", str(out)])
    return prepare.import_(values), list(records.read(out))


def refused(tmp_path, *argv):
    """Return the message of an import that ends in one error and writes nothing."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DatasetError) as error:
        run(tmp_path, *argv)
    assert sorted(os.listdir(tmp_path)) == before
    return str(error.value)


def make_folder(root, *names):
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
        file.with_suffix(".txt").write_text(f"caption of {name}")
    return root


def make_tar(path, members, mode="w"):
    """Write a tar of members, each (name, bytes) or a TarInfo."""
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def stored(folder, **columns):
    """Write a folder as `datasets.save_to_disk` does."""
    folder.mkdir()
    table = pyarrow.table(columns)
    with pyarrow.ipc.new_stream(folder / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def talk(*values, **keys):
    speakers = ("human", "gpt")
    turns = [{"from": speakers[n % 2], "value": value} for n, value in enumerate(values)]
    return {"conversations": turns, **keys}


def llava(tmp_path, *rows, root=None, tally=None):
    file = tmp_path / "THE.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(interleaved.llava([file], ImageRoot(root or "", tally=tally or Tally())))

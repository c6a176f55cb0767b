"""Files and folders appear complete or not at all, whenever a process is killed."""

import ast
import errno
import os
import pathlib
import time

import pytest
from helpers.kills import contents, kill_everywhere
from helpers.paths import ROOT

from starflow2_jax.runtime import atomic

pytestmark = pytest.mark.fast

FILE = """
from helpers.kills import contents
from starflow2_jax.runtime import atomic
target = pathlib.Path(sys.argv[1])
new = {name: b"new " * 1000 + name.encode() for name in ("a", "b")}
def prepare():
    target.mkdir(exist_ok=True)
    for name in new:
        (target / name).write_bytes(b"old")
def write():
    for name in new:
        atomic.write_file(target / name, [b"new " * 1000, name.encode()])
def check_killed():
    for name, data in new.items():
        assert (target / name).read_bytes() in (b"old", data)
def check_finished():
    assert contents(target) == new, contents(target).keys()
"""
FOLDER = """
from helpers.kills import contents
from starflow2_jax.runtime import atomic
target, has_exchange = pathlib.Path(sys.argv[1]), int(sys.argv[2])
new = {name: b"new " * 1000 + name.encode() for name in ("a", "inner/b")}
old = {"a": b"old", "c": b"old"}
if not has_exchange:
    atomic._exchange = lambda *paths: False
def put(files):
    with atomic.folder(target, overwrite=True) as temporary:
        for name, data in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(data)
def prepare():
    put(old)
def write():
    put(new)
def check_killed():
    if not has_exchange:
        atomic.recover(target)  # as the next start does
    assert contents(target) in (old, new), contents(target).keys()
def check_finished():
    assert contents(target) == new and os.listdir(target.parent) == ["out"]
"""


def test_a_file_is_old_or_new_at_every_kill(tmp_path):
    assert kill_everywhere(FILE, tmp_path / "out") > 20


@pytest.mark.parametrize("exchange", [1, 0])
def test_a_replaced_folder_is_old_or_new_at_every_kill(tmp_path, exchange):
    assert kill_everywhere(FOLDER, tmp_path / "out", exchange) > 20


def test_an_error_leaves_what_was_there(tmp_path):
    atomic.write_file(tmp_path / "f", "old\n")
    with pytest.raises(ZeroDivisionError):
        atomic.write_file(tmp_path / "f", (bytes([1 // k]) for k in (1, 0)))
    with pytest.raises(ZeroDivisionError), atomic.folder(tmp_path / "d") as temporary:
        (temporary / "x").write_text(str(1 // 0))
    assert contents(tmp_path) == {"f": b"old\n"} and os.listdir(tmp_path) == ["f"]


def test_only_overwrite_replaces_a_folder(tmp_path):
    (tmp_path / "d").mkdir()
    with atomic.folder(tmp_path / "d") as temporary:  # it is empty
        (temporary / "x").write_text("1")
    with pytest.raises(OSError, match="/d"), atomic.folder(tmp_path / "d") as temporary:
        (temporary / "x").write_text("2")
    assert contents(tmp_path) == {"d/x": b"1"}


def test_leftovers_of_earlier_releases(tmp_path):
    def make(name, age):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
        for path in (tmp_path / name / "x", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)

    day = 24 * 3600
    for name in (".out.building-7", ".out.8.tmp", ".outer.building-9", ".out.building-x"):
        make(name, 2 * day)
    make(".out.building-70", 60)  # it may still be written
    make(".out.old-7", 2 * day)
    atomic.recover(tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == ".out.old-7"
    make(".out.9.old", 2 * day)
    atomic.recover(tmp_path / "out")
    rest = [".out.building-70", ".out.building-x", ".outer.building-9", "out"]
    assert sorted(os.listdir(tmp_path)) == rest


def test_two_writers_at_once(tmp_path):
    with atomic.file(tmp_path / "f") as first, atomic.file(tmp_path / "f") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    with atomic.folder(tmp_path / "d") as first:
        (first / "x").write_text("1")
        with atomic.folder(tmp_path / "d") as second:
            (second / "x").write_text("2")
            atomic.remove_leftovers(tmp_path)
            assert (first / "x").exists()
        (tmp_path / "d" / "x").unlink()  # so that the first may take the place of an empty folder
    assert contents(tmp_path) == {"f": b"1", "d/x": b"1"}
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


def test_leftovers_without_locks_are_told_by_their_age(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    for name in (".new.partial", ".old.partial", ".old.0123abcd.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    for path in tmp_path.rglob("*old*"):
        for entry in (path / "x", path):
            os.utime(entry, (1, 1))
    atomic.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".new.partial"]
    atomic.write_file(tmp_path / "new", "1")  # under another temporary name
    assert (tmp_path / "new").read_text() == "1" and (tmp_path / ".new.partial").exists()


def test_links_devices_and_long_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic.write_file(tmp_path / "link", "1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "1"
    atomic.write_file("/dev/null", "1")
    assert pathlib.Path("/dev/null").is_char_device()
    name = "ü" * 126 + "n"
    atomic.write_file(tmp_path / name, "1")
    assert (tmp_path / name).read_text() == "1"


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"/f could not be written: the disk is full: No space"):
        atomic.write_file(tmp_path / "f", "1")
    assert os.listdir(tmp_path) == []


# Functions that write into folders of `atomic.folder`, append, or write no file that stays.
OTHER_WRITERS = {
    "runtime/atomic.py",
    "checkpoints/model_folder.py:_write",
    "data/tokenizer.py:write",
    "checkpoints/steps.py:remove",
    "data/shards.py:write",
    "data/shards.py:_write_shards",
    "training/logging/run_log.py:open",
    "benchmarking/timing.py:reset_peak",
    "benchmarking/data_rows.py:jpegs",
    "benchmarking/data_rows.py:write_tar",
    "benchmarking/growth.py:plot",
    "planning/report.py:chart",
    "evaluation/report/plots.py:_png",
    "data/images.py:encode_png",
    "data/plan_files.py:store",
    "training/logging/run_log.py:dump_batch",
    "training/logging/image_grid.py:png",
    "evaluation/report/html.py:shrink_png",
    "inference/output.py:encode_png",
    "checkpoints/hub_push.py:write",
    "evaluation/benchmarks/tree.py:_jpeg",
    "evaluation/image_metrics/adm_npz.py:write",
    "evaluation/image_metrics/networks.py:open_inception",
    "evaluation/judges/protocol.py:encode",
    "evaluation/judges/replies.py:add",
    "generate.py:_generate_images",
    "experiments/ablations/run.py:_start",
}
WRITERS = {"write_text", "write_bytes", "tofile", "savez", "savefig", "save", "copytree",
           "copyfile", "copy", "copy2", "move", "rename", "replace", "dump", "rmtree"}  # fmt: skip


def writers(path):
    """Yield the functions of a module that call something that writes files."""
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in ast.walk(function):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            owner = getattr(getattr(call.func, "value", None), "id", "")
            texts = [a.value for a in call.args if isinstance(a, ast.Constant)]
            writes = name == "open" and any(
                isinstance(text, str) and len(text) < 4 and set(text) & set("wax+")
                for text in texts
            )
            is_file_call = name in WRITERS and owner not in ("dataclasses", "json", "orbax")
            is_file_call &= isinstance(call.func, ast.Attribute)
            # str.replace and the like have a text as their argument.
            if name in ("replace", "copy", "dump") and owner not in ("os", "shutil", "json"):
                is_file_call = False
            if writes or is_file_call:
                yield function.name


def test_every_writer_is_atomic():
    package = ROOT / "starflow2_jax"
    modules = [*package.rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    functions = set()
    for path in modules:
        base = package if path.is_relative_to(package) else ROOT
        name = path.relative_to(base).as_posix()
        functions |= {f"{name}:{function}" for function in writers(path)}
    functions = {name for name in functions if name.split(":")[0] not in OTHER_WRITERS}
    unlisted = sorted(functions - OTHER_WRITERS)
    assert not unlisted, f"they write files and do not use runtime/atomic.py: {unlisted}"
    unused = OTHER_WRITERS - functions - {"runtime/atomic.py"}
    assert not unused, f"remove from OTHER_WRITERS: {sorted(unused)}"

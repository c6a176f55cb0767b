"""Datasets and tokenizers are complete or absent at every kill, and the same call ends them."""

import pytest
from helpers.kills import kill_everywhere

pytestmark = pytest.mark.fast

TOKENIZER = """
import shutil
from helpers.kills import contents
from starflow2_jax.data import tokenizer
target = pathlib.Path(sys.argv[1])
def prepare():
    shutil.rmtree(target, ignore_errors=True)
def write():
    tokenizer.write('{"model": {}}', target, patch=4, merge=2, frames=2)
def check_killed():
    assert not target.exists() or len(contents(target)) == 4, contents(target).keys()
def check_finished():
    assert len(contents(target)) == 4 and os.listdir(target.parent) == ["out"]
"""
DATASET = """
from helpers.kills import contents
from starflow2_jax.data import manifest, shards
target = pathlib.Path(sys.argv[1])
def put(payloads, overwrite=True):
    def make_manifest(entries):
        return manifest.make("records", entries, manifest.Importer("test", "1"))
    shards.write(target, payloads, make_manifest, shard_bytes=8, overwrite=overwrite)
def prepare():
    put([b"old record"] * 3)
def write():
    put([b"new record", b"another"])
def check_killed():
    stored = manifest.load(target)
    assert stored.records in (2, 3) and not list(manifest.verify(target, stored))
def check_finished():
    assert manifest.load(target).records == 2 and os.listdir(target.parent) == ["out"]
"""


@pytest.mark.parametrize(
    ("program", "every"), [(TOKENIZER, 3), (DATASET, 5)], ids=["tokenizer", "dataset"]
)
def test_a_kill_leaves_nothing_half_written(program, every, tmp_path):
    assert kill_everywhere(program, tmp_path / "out", every=every) > 20

"""Model folders round trip, shard, and survive damage and full disks."""

import errno
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from starflow2_jax.checkpoints import model_folder, tensor_files
from starflow2_jax.checkpoints.convert import teacher
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import flow
from starflow2_jax.params import flatten, shardings as param_shardings, unflatten

CFG = flow.FlowConfig(
    side=4, channels=4, width=64, layers=(1, 0, 2), head_dim=32, classes=3, final_norm=True
)
TREE = flow.declare(CFG)
CONFIG = {"model": {"side": 4, "layers": [1, 0, 2]}, "name": "tiny"}


def random_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    declared = flatten(TREE)
    arrays = {n: rng.normal(size=w.shape).astype(np.float32) for n, w in declared.items()}
    return unflatten({n: jnp.asarray(a, dtype) for n, a in arrays.items()})


def same(a, b):
    a, b = flatten(a), flatten(b)
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and np.array_equal(np.asarray(a[n]), np.asarray(b[n])) for n in a
    )


def test_the_packages_own_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_folder, "ROOT", tmp_path / "package")
    model = tmp_path / "package" / "pretrained" / "tiny"
    model.parent.mkdir(parents=True)
    model_folder.write_folder(model, {"a": np.ones(3)}, CONFIG)
    assert model_folder.locate("pretrained/tiny") == model and model_folder.is_folder(model)
    # The same name in the working directory is another one.
    (tmp_path / "pretrained").mkdir()
    assert model_folder.locate("pretrained/tiny") == model
    for other in ("./pretrained/tiny", str(model), "runs/pretrained/tiny"):
        assert str(model_folder.locate(other)) == str(pathlib.Path(other))
    assert teacher.identity("pretrained/tiny") == teacher.identity(str(model))
    with pytest.raises(FileNotFoundError, match=r"package/pretrained/nothing"):
        group = {"kind": "qwen", "path": "pretrained/nothing", "pixels": 64}
        teacher.teacher_config({"teacher": group}, None)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_folder_round_trips(tmp_path, dtype):
    path, params = tmp_path / "deep" / "model", random_params(dtype)
    model_folder.write_folder(path, params, CONFIG)
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "sha256.json",
    ]
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    assert model_folder.read_config(path) == CONFIG
    assert model_folder.is_folder(path) and not model_folder.verify(path)
    assert same(model_folder.read_folder(path, TREE), params)
    # The library reads the file that we wrote.
    stored = load_file(path / "model.safetensors")
    np.testing.assert_array_equal(
        stored["blocks.2.layers.query.weight"],
        np.asarray(params["blocks"]["2"]["layers"]["query"]["weight"]),
    )
    assert len(stored) == len(flatten(params))


def test_reads_into_another_dtype(tmp_path):
    params = random_params()
    model_folder.write_folder(tmp_path / "m", params, CONFIG)
    read = model_folder.read_folder(tmp_path / "m", TREE, dtype=jnp.bfloat16)
    assert same(read, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))


def test_float64_needs_x64_or_a_dtype(tmp_path, x64):
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), random_params())
    model_folder.write_folder(tmp_path / "m", params, CONFIG)
    assert same(model_folder.read_folder(tmp_path / "m", TREE), params)
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ValueError, match="is float64; enable jax_enable_x64"):
        model_folder.read_folder(tmp_path / "m", TREE)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_shards_under_a_limit(tmp_path, dtype):
    params = jax.tree.map(lambda a: np.asarray(a).astype(dtype), random_params())
    limit = 100_000
    model_folder.write_folder(tmp_path / "m", params, CONFIG, shard_bytes=limit)
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(params))
    for shard in shards:
        stored = load_file(tmp_path / "m" / shard)
        assert len(stored) == 1 or sum(a.nbytes for a in stored.values()) <= limit
    assert same(model_folder.read_folder(tmp_path / "m", TREE), params)


@pytest.mark.parametrize(
    ("layout", "sizes"), [("dp", "data=8"), ("fsdp", "fsdp=8"), ("fsdp_tp", "fsdp=4,tensor=2")]
)
def test_sharded_reads_equal(tmp_path, layout, sizes):
    params = random_params()
    model_folder.write_folder(tmp_path / "m", params, CONFIG, shard_bytes=100_000)
    mesh = make_mesh(sizes)
    read = model_folder.read_folder(tmp_path / "m", TREE, mesh, layout)
    assert same(read, params)
    shardings = flatten(param_shardings(TREE, mesh, layout))
    for name, leaf in flatten(read).items():
        assert leaf.sharding == shardings[name], name
    # Written from there, the files are the same.
    model_folder.write_folder(tmp_path / "again", read, CONFIG, shard_bytes=100_000)
    assert (tmp_path / "again" / "sha256.json").read_text() == (
        tmp_path / "m" / "sha256.json"
    ).read_text()


def test_sharded_reads_touch_only_the_slices(tmp_path):
    model_folder.write_folder(tmp_path / "m", random_params(), CONFIG)
    device_mesh, requests = make_mesh("fsdp=8"), []
    name = "blocks/2/layers/query/weight"
    tensor = flatten(model_folder.open_folder(tmp_path / "m", TREE))[name]

    def read(index=()):
        requests.append(index)
        return tensor.read(index)

    watched = tensor_files.StoredTensor(tensor.shape, tensor.dtype, "", read)
    sharding = flatten(param_shardings(TREE, device_mesh, "fsdp"))[name]
    tensor_files.to_device(watched, sharding, tensor.dtype)
    assert len(requests) == 8 and {i[1].stop - i[1].start for i in requests} == {8}


def test_nothing_is_written_over(tmp_path):
    params = random_params()
    model_folder.write_folder(tmp_path / "m", params, CONFIG)
    before = (tmp_path / "m" / "sha256.json").read_text()
    with pytest.raises(FileExistsError, match="m exists already; nothing was written over"):
        model_folder.write_folder(tmp_path / "m", params, {"name": "other"})
    assert (tmp_path / "m" / "sha256.json").read_text() == before
    model_folder.write_folder(tmp_path / "m", params, {"name": "other"}, overwrite=True)
    assert model_folder.read_config(tmp_path / "m") == {"name": "other"}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"home is there and has no sha256\.json"):
        model_folder.write_folder(tmp_path / "home", params, CONFIG, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, overwrite):
    params = random_params()
    if overwrite:
        model_folder.write_folder(tmp_path / "m", params, {"name": "old"})
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"/m could not be written \(\d+ bytes.*the disk is full"):
        model_folder.write_folder(tmp_path / "m", params, CONFIG, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["m"] if overwrite else [])
    if overwrite:
        assert model_folder.read_config(tmp_path / "m") == {"name": "old"}
        assert not model_folder.verify(tmp_path / "m")


def flip(path, index=-1):
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)


@pytest.mark.fast
def test_damage_is_named(tmp_path):
    path = tmp_path / "m"
    model_folder.write_folder(path, random_params(), CONFIG, shard_bytes=100_000)
    victim = sorted(path.glob("model-00002-of-*.safetensors"))[0]
    flip(victim)
    with pytest.raises(ValueError, match=r"model-00002-of-\d+\.safetensors has sha256"):
        model_folder.read_folder(path, TREE)
    model_folder.read_folder(path, TREE, check_digests=False)
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model-00002-of-\d+\.safetensors is truncated"):
        model_folder.read_folder(path, TREE, check_digests=False)
    victim.unlink()
    for check in (True, False):
        with pytest.raises(FileNotFoundError, match=r"model-00002-of-\d+\.safetensors"):
            model_folder.read_folder(path, TREE, check_digests=check)


def test_a_damaged_config_or_digest_list_is_refused(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        model_folder.read_folder(path, TREE)
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        model_folder.read_config(path)
    model_folder.write_folder(path, random_params(), CONFIG)
    flip(path / "config.json", 0)
    assert model_folder.verify(path)[0].startswith("config.json has sha256")
    with pytest.raises(ValueError, match=r"config\.json has sha256 .* one of the two is damaged"):
        model_folder.read_config(path)
    digests = (path / "sha256.json").read_text()
    (path / "sha256.json").unlink()  # as a model of another package
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        model_folder.read_config(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="Expected `object`, got `array`"):
        model_folder.read_config(path)
    (path / "sha256.json").write_text(digests)
    save_file({"a": np.zeros(2)}, path / "other.safetensors")
    assert "other.safetensors is not in sha256.json" in model_folder.verify(path)
    (path / "sha256.json").write_text("{")
    with pytest.raises(ValueError, match=r"sha256\.json is not a list of digests"):
        model_folder.read_folder(path, TREE)
    (path / "sha256.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"sha256\.json: no such file"):
        model_folder.read_folder(path, TREE)


def test_a_missing_list_of_digests_is_named(tmp_path, caplog):
    config = {**CONFIG, model_folder.EXPERIMENT_KEY: {"task": "vlm"}}
    model_folder.write_folder(tmp_path / "m", random_params(), config)
    model_folder.read_config(tmp_path / "m")
    assert not caplog.records
    (tmp_path / "m" / "sha256.json").unlink()
    model_folder.read_config(tmp_path / "m")
    assert "m has no sha256.json" in caplog.text


def test_another_model_is_refused(tmp_path):
    params = random_params()
    block = dict(params["blocks"]["0"], extra=np.zeros(3, np.float32))
    block["final_norm"] = {"weight": np.zeros(3, np.float32)}
    del block["start"]
    model_folder.write_folder(tmp_path / "m", {"blocks": {**params["blocks"], "0": block}}, CONFIG)
    with pytest.raises(ValueError, match="does not hold the declared model") as error:
        model_folder.read_folder(tmp_path / "m", TREE)
    for part in (
        "1 missing: blocks.0.start",
        "1 unexpected: blocks.0.extra",
        "1 misshapen: blocks.0.final_norm.weight is [3], expected [64]",
    ):
        assert part in str(error.value)


def test_tensors_are_read_one_at_a_time(tmp_path):
    alive, counts = [], []

    def stored(name, array):
        def read(index=()):
            alive.append(name)
            counts.append(len(alive))
            return _Counted(array, lambda: alive.remove(name))

        return tensor_files.StoredTensor(array.shape, array.dtype, "", read)

    params = flatten(jax.tree.map(np.asarray, random_params()))
    tree = unflatten({n: stored(n, a) for n, a in params.items()})
    model_folder.write_folder(tmp_path / "m", tree, CONFIG)
    assert max(counts) <= 2
    assert same(model_folder.read_folder(tmp_path / "m", TREE), unflatten(params))


class _Counted(np.ndarray):
    """An array that says when it goes."""

    def __new__(cls, array, gone):
        view = array.copy().view(cls)
        view.gone = gone
        return view

    def __del__(self):
        if getattr(self, "gone", None):
            self.gone()

"""Tensor files are read exactly, and broken ones are refused."""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from starflow2_jax.checkpoints import tensor_files

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.linspace(0, 1, 4).reshape(2, 2),
}


def check(tensors, arrays=ARRAYS):
    assert set(tensors) == set(arrays)
    for name, stored in tensors.items():
        assert stored.shape == arrays[name].shape and stored.dtype == arrays[name].dtype
        np.testing.assert_array_equal(stored.read(), arrays[name])
        assert stored.read().dtype == arrays[name].dtype
        rows = (slice(1, 2),)
        np.testing.assert_array_equal(stored.read(rows), arrays[name][rows])


def test_a_file_a_folder_and_a_mapping_are_read_alike(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    check(tensor_files.open_source(tmp_path / "x.safetensors"))
    check(tensor_files.open_source(str(tmp_path)))
    check(tensor_files.open_source(ARRAYS))


def test_a_sharded_folder_is_read_and_checked(tmp_path):
    names = sorted(ARRAYS)
    for i, name in enumerate(names):
        save_file({name: ARRAYS[name]}, tmp_path / f"s{i}.safetensors")
    index = {"weight_map": {name: f"s{i}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / tensor_files.INDEX_FILE).write_text(json.dumps(index))
    check(tensor_files.open_source(tmp_path))
    (tmp_path / "s1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names missing shards s1\.safetensors"):
        tensor_files.open_source(tmp_path)


def test_a_wrong_index_is_refused(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    index = tmp_path / tensor_files.INDEX_FILE
    index.write_text("{")
    with pytest.raises(ValueError, match="not a safetensors index"):
        tensor_files.open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "../x.safetensors"}}))
    with pytest.raises(ValueError, match=r"b is said to be in '\.\./x\.safetensors'"):
        tensor_files.open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "x.safetensors", "d": "x.safetensors"}}))
    with pytest.raises(ValueError, match=r"do not agree about a\.weight, c, d"):
        tensor_files.open_source(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 40, -3])
def test_truncated_safetensors_are_refused(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated or not a safetensors"):
        tensor_files.open_source(path)


def test_missing_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        tensor_files.open_source(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="found none"):
        tensor_files.open_source(tmp_path)
    (tmp_path / "x.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"read from a folder or from \.safetensors, \.pth"):
        tensor_files.open_source(tmp_path / "x.pkl")
    with pytest.raises(ValueError, match="epoch is a int; expected an array"):
        tensor_files.open_source({"epoch": 3})
    (tmp_path / ".metadata").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"torch\.distributed checkpoint.*dcp_to_torch"):
        tensor_files.open_source(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    state = {
        "a.weight": torch.from_numpy(ARRAYS["a.weight"].copy()),
        "b": torch.arange(5).to(torch.bfloat16),
        "c": torch.nn.Parameter(torch.from_numpy(ARRAYS["c"].copy())),
    }
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    check(tensor_files.open_source(path))
    check(tensor_files.open_source(tmp_path))
    check(tensor_files.open_source(state))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"x\.pth is damaged"):
        tensor_files.open_source(path)


class _Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_run_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    path, mark = tmp_path / "x.pth", tmp_path / "mark"
    torch.save({"a": torch.zeros(2), "b": _Attack(mark)}, path)
    with pytest.raises(ValueError, match=r"x\.pth is damaged, or holds more than tensors"):
        tensor_files.open_source(path)
    assert not mark.exists()


def test_a_pickle_that_ends_early_is_damaged(tmp_path):
    pytest.importorskip("torch")
    # A file of before torch 1.6 whose first opcode takes from an empty stack.
    (tmp_path / "x.pth").write_bytes(b"\x80\x020.")
    with pytest.raises(ValueError, match=r"x\.pth is damaged"):
        tensor_files.open_source(tmp_path / "x.pth")


def test_torch_files_without_a_state_dict_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    torch.save({"model": {"a": torch.zeros(2)}, "step": 3}, path)
    with pytest.raises(ValueError, match=r"'model' is a dict; expected a state_dict of tensors"):
        tensor_files.open_source(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(ValueError, match="holds a Tensor; expected a state_dict"):
        tensor_files.open_source(path)


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"pip install 'starflow2_jax\[torch\]'"):
        tensor_files.open_source(tmp_path / "x.pth")


@pytest.mark.parametrize("read_bytes", [1, 60, 1 << 20])
def test_every_slice_of_a_safetensors_file_is_read_exactly(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(tensor_files, "READ_BYTES", read_bytes)
    rng = np.random.default_rng(0)
    arrays = {
        "cube": rng.normal(size=(5, 7, 6)).astype(np.float32),
        "scalar": np.array(3.0, np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    tensors = tensor_files.open_safetensors(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].read(), array)
    for index in itertools.product(
        [slice(None), slice(1, 3), slice(2, 2), slice(3, None)], repeat=3
    ):
        for some in (index, index[:2], index[:1]):
            np.testing.assert_array_equal(tensors["cube"].read(some), arrays["cube"][some])
    with pytest.raises(ValueError, match="cube: slices must have step 1"):
        tensors["cube"].read((slice(None, None, 2),))
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"x\.safetensors ended within cube"):
        tensors["cube"].read()


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    entries = ", ".join(f'"{name}": "x.safetensors"' for name in [*ARRAYS, "b"])
    (tmp_path / tensor_files.INDEX_FILE).write_text(f'{{"weight_map": {{{entries}}}}}')
    with pytest.raises(ValueError, match=r"index\.json is not a safetensors index: .*twice: b"):
        tensor_files.open_source(tmp_path)

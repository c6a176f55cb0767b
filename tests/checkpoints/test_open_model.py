"""`open_model` reads a run, one of its steps and a model folder through one interface."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax import mesh, params
from starflow2_jax.checkpoints import model_folder, orbax, tensor_files
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.params import ParamSpec

pytestmark = pytest.mark.fast

DECLARED = {
    "flow": {"matrix": ParamSpec((4, 2), (None, None))},
    "text": {"table": ParamSpec((3, 2), (None, None))},
}
CONFIG = {"task": "flow", "name": "tiny", "seed": 0}


@pytest.fixture
def run(tmp_path):
    """Return a run with the steps 1 and 2, whose checkpoints hold `flow` only."""
    writer = orbax.open(tmp_path / "run")
    for step in (1, 2):
        flow = params.init(jax.random.key(step), {"flow": DECLARED["flow"]})
        state = {"params": flow, "ema": jax.tree.map(jnp.negative, flow)}
        meta = {"config": CONFIG, "classes": ["cat"], "null_text": None, "frozen": {"fae": "f1"}}
        orbax.save(writer, step, state, meta)
    orbax.close(writer)
    return tmp_path / "run"


def matrix(step):
    return params.init(jax.random.key(step), {"flow": DECLARED["flow"]})["flow"]["matrix"]


def test_the_newest_step_of_a_run_is_opened_and_a_named_step_if_asked(run):
    newest, first = open_model(run), open_model(run / "checkpoints" / "1")
    assert (newest.step, first.step, newest.is_folder) == (2, 1, False)
    assert newest.path == first.path == str(run)
    assert newest.config == CONFIG and newest.task == "flow"
    assert newest.class_names == ("cat",) and newest.frozen == {"fae": "f1"}
    for saved in (newest, first):
        weights = saved.read_params(DECLARED, subtrees=("flow",))
        assert np.array_equal(weights["flow"]["matrix"], -matrix(saved.step))
        weights = saved.read_params({"flow": DECLARED["flow"]}, ema=False, dtype=jnp.bfloat16)
        expected = matrix(saved.step).astype(jnp.bfloat16)
        assert np.array_equal(weights["flow"]["matrix"], expected)
        weights = saved.open_params({"flow": DECLARED["flow"]})
        assert weights["flow"]["matrix"].devices() <= set(jax.devices("cpu"))


def test_a_model_folder_is_opened_like_a_run(tmp_path):
    weights = params.init(jax.random.key(0), DECLARED)
    config = {**CONFIG, "classes": ["cat"], "frozen": {"vlm": "v1"}}
    model_folder.write_folder(tmp_path / "model", weights, config)
    saved = open_model(tmp_path / "model")
    assert saved.is_folder and saved.step is None and saved.config == config
    assert saved.class_names == ("cat",) and saved.frozen == {"vlm": "v1"}
    device_mesh = mesh.make_mesh("data=1", jax.devices()[:1])
    read = saved.read_params(DECLARED, device_mesh, "fsdp", subtrees=("text",))
    assert list(read) == ["text"]
    assert np.array_equal(read["text"]["table"], weights["text"]["table"])
    stored = saved.open_params(DECLARED)["flow"]["matrix"]
    assert isinstance(stored, tensor_files.StoredTensor)
    assert np.array_equal(stored.read(), weights["flow"]["matrix"])


def test_a_folder_for_transformers_tells_its_experiment(tmp_path):
    config = {"model_type": "qwen2_5_vl", "starflow2_jax": {**CONFIG, "task": "vlm"}}
    model_folder.write_folder(tmp_path / "vlm", {"x": np.zeros(2, np.float32)}, config)
    assert open_model(tmp_path / "vlm").task == "vlm"


def test_a_path_without_a_model_is_refused(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="no committed checkpoint in"):
        open_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; .*\[1, 2\]"):
        open_model(run / "checkpoints" / "7")
    with pytest.raises(ValueError, match="no subtree 'text'"):
        open_model(run).read_params({"flow": DECLARED["flow"]}, subtrees=("text",))
    with pytest.raises(ValueError, match=r"1 missing: ema\.text\.table"):
        open_model(run).read_params(DECLARED)

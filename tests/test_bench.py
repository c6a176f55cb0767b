"""bench: what a row says, on tiny work; no time is judged here."""

import json
import os
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from helpers.paths import ROOT

from starflow2_jax import bench, mesh
from starflow2_jax.benchmarking import breakdown, data_rows, growth, stages, timing
from starflow2_jax.inference.inverse import Jacobi
from starflow2_jax.models import flow
from starflow2_jax.runtime import allocator
from starflow2_jax.training.tasks import registry

RATES = {"matmul_float32_gflops": 100.0, "copy_gb_per_s": 10.0, "sum_gb_per_s": 20.0}


@pytest.fixture
def tiny(monkeypatch):
    text = dict(text_channels=5, text_length=3)
    presets = {
        "peer_tarflow": flow.tarflow(4, 3, 64, (1, 1)),
        "peer_starflow": flow.FlowConfig(side=4, channels=3, width=64, layers=(1, 2), **text),
    }
    monkeypatch.setattr(bench, "PRESETS", presets)
    return presets


@pytest.mark.fast
def test_timed_waits_for_the_result_and_takes_the_median():
    calls = []

    def run():
        calls.append(1)
        return jnp.ones(3)

    row = timing.measure(run, 5, warm_up=1)
    assert len(calls) == 6 and row["repeats"] == 5
    assert row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert row["peak_mb"] > 10


@pytest.mark.fast
def test_shares_are_work_over_time():
    row = timing.utilization(1000.0, RATES, flops=50e9, num_bytes=10e9)
    assert row["gflops"] == pytest.approx(50) and row["share_of_matmul_rate"] == pytest.approx(0.5)
    assert row["machine_gb_per_s"] == 20.0 and row["bound_ms"] == pytest.approx(500)
    assert row["share_of_bound"] == pytest.approx(0.5)
    assert "bound_ms" not in timing.utilization(1000.0, RATES, flops=1e9)


def test_machine_gives_every_rate():
    row = timing.machine_rates(repeats=1, side=64, pairs=1)
    rates = [name for name in row if name.endswith(("gflops", "gb_per_s"))]
    assert len(rates) == 5 and all(row[name] > 0 for name in rates)


@pytest.mark.parametrize("name", ["peer_tarflow", "peer_starflow"])
def test_train_row(tiny, name):
    row = bench.train_preset(name, 2, "float32", 1, RATES)
    assert row["batch"] == 2 and row["tokens_per_s"] == pytest.approx(2 * 16 * 1000 / row["ms"])
    assert row["gflop"] > 0 and row["compile_s"] > 0


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("jacobi", [None, Jacobi(4, 0.0, 4)])
def test_sample_row(tiny, guidance, jacobi):
    rows = [
        bench.sample_preset("peer_starflow", rows, guidance, jacobi, "float32", 1, RATES)
        for rows in (1, 2)
    ]
    assert rows[0]["passes"] == rows[1]["passes"] == 32
    assert rows[1]["gflop"] == pytest.approx(2 * rows[0]["gflop"])
    assert rows[0]["gb"] < rows[1]["gb"] < 2 * rows[0]["gb"]  # the weights are read once


def test_the_presets_are_the_peers_work():
    sizes = {name: flow.declare(cfg) for name, cfg in bench.PRESETS.items()}
    count = lambda tree: sum(int(np.prod(w.shape)) for w in jax.tree.leaves(tree))
    assert {name: count(tree) for name, tree in sizes.items()} == {
        "peer_tarflow": 12_936_288,
        "peer_starflow": 44_629_696,
    }


def values(*words):
    parsed = flags.FlagValues()
    bench.define(parsed)
    parsed(["bench", *words])
    return parsed


def test_command_prints_json_and_lines(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "machine_rates", lambda repeats=1: RATES)
    words = ("--preset", "peer_tarflow", "--repeats", "1")
    bench.main("sample", [], values(*words, "--json"))
    assert json.loads(capsys.readouterr().out)["row"] == "sample peer_tarflow"
    bench.main("sample", [], values(*words))
    assert "share_of_bound" in capsys.readouterr().out


@pytest.mark.fast
@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("train", (), "--preset is needed"),
        ("sample", ("--preset=stage3", "--guidance=2"), "apply to the peer presets only"),
        ("growth", (), "--out is needed"),
        ("growth", ("--only=all", "--out=x"), "'all' is not one of train, sample"),
        ("load", (), "--model is needed"),
        ("sample", ("--preset=peer_tarflow", "--jacobi=16"), "expected BLOCK,THRESHOLD"),
    ],
)
def test_bad_input_names_the_flag(verb, words, message, monkeypatch):
    monkeypatch.setattr(bench, "machine_rates", lambda repeats=1: RATES)
    with pytest.raises(ValueError, match=message):
        bench.main(verb, [], values(*words))


def test_rows_are_read_from_synthetic_records():
    target = data_rows.Slice(step_ms=500.0, rows=64, hosts=4)
    row = data_rows.measure_rows(60, 1, ((0, 0), (0, 2)), target)
    assert row["images_per_row"] > 2 and row["images_per_s_0_processes_2_threads"] > 0
    assert row["images_per_s_host"] == pytest.approx(32 * row["images_per_row"])
    assert all(row[f"us_{name}"] > 0 for name in ("read", "decode", "resize", "tokenize", "pack"))
    assert row["images_per_s_core"] == row["images_per_s_0_processes_0_threads"]
    assert row["cores_per_host"] == row["images_per_s_host"] / row["images_per_s_core"]


def test_growth_is_measured_plotted_and_has_exponents(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(growth, "CHECKPOINT_MB", (1, 2))
    monkeypatch.setattr(growth, "RESUMED_STEP", 20)
    words = ("--only", "checkpoints", "--repeats", "1", "--out", str(tmp_path), "--json")
    bench.main("growth", [], values(*words))
    assert '"save_s by MB of a checkpoint"' in capsys.readouterr().out
    sizes = []
    for count in (40, 80):
        (tmp_path / str(count)).mkdir()
        sizes.append(growth._data_costs(tmp_path / str(count), count))
    assert all(row["import_s"] > 0 and row["resume_s"] > 0 for row in sizes)
    quadratic = [{**row, "plan_s": row["size"] ** 2} for row in sizes]
    assert growth.write(str(tmp_path), "data", quadratic)["plan_s by records"] == 2
    stored = json.loads((tmp_path / "growth.json").read_text())
    assert [row["part"] for row in stored] == ["checkpoints"] * 2 + ["data"] * 2
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


# A machine with little more than jax: anything else that is imported is an error.
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ImportError(name + " is not on this machine")

sys.meta_path.insert(0, Blocked())
"""
BARE = (
    BLOCKED
    + """
import dataclasses
from absl import flags
from starflow2_jax import bench
from starflow2_jax.benchmarking import timing
from starflow2_jax.models import starflow2

def least():
    few = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 48}
    vlm = dataclasses.replace(starflow2.tiny().vlm, **few, sections=(1, 3, 4))
    sizes = {"side": 8, "channels": 4, "width": 40, "head_dim": 20, "layers": (1, 1)}
    return starflow2.PretzelConfig(vlm, starflow2.flow_config(32, **sizes))

starflow2.PRESETS["tiny"] = least
bench.machine_rates = lambda repeats=1: timing.machine_rates(1, 64, 1)
values = flags.FlagValues()
bench.define(values)
values("bench --preset stage3 --size tiny --batch 2 --repeats 1 --json".split())
bench.main("VERB", [], values)
"""
)
# The steps of the stages at paper size, lowered for GPUs. jax asks for the version of cuDNN and for
# the GPU while it traces; everything else of the lowering needs neither.
CUDA = (
    BLOCKED
    + """
import jax
from jax._src.cudnn import fused_attention_stablehlo as fused
from starflow2_jax.benchmarking import stages
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import layers
from starflow2_jax.training.tasks import registry

layers.CPU_UNROLL = 1  # as on a GPU
fused.check_cudnn_version = lambda: 91300
fused.check_compute_capability = lambda capability: True
fused.is_cuda_compute_capability_equal = lambda capability: False
jax.config.update("jax_num_cpu_devices", 4)
for stage, trainable, sizes in (
    ("stage1", None, "data=1"),
    ("stage3", ("adapter",), "data=1"),  # stage 2
    ("stage3", None, "fsdp=2,tensor=2"),
):
    cfg = stages.experiment(stage, "paper", 4, "bfloat16")
    cfg |= {"layout": "fsdp_tp", "frozen_layout": "tp", "attention": "cudnn"}
    cfg["train"]["trainable"] = trainable or cfg["train"]["trainable"]
    device_mesh = make_mesh(sizes, None if "," in sizes else jax.devices()[:1])
    program = registry.build(cfg, device_mesh)
    with jax.set_mesh(device_mesh):
        traced = program.step.trace(
            program.abstract_state, program.abstract_frozen, program.abstract_batch
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    partitioned = text.count("@CustomSPMDPartitioning")
    print(text.count("__cudnn$fmha"), text.count("SoftmaxBackward"), partitioned)
"""
)
MISSING = (
    *("grain", "ml_collections", "msgspec", "array_record", "transformers", "tokenizers"),
    *("tensorflow_datasets", "PIL", "pyarrow", "safetensors", "matplotlib", "jinja2", "torch"),
)


def run_where_little_more_than_jax_is(code):
    done = subprocess.run(
        [sys.executable, "-c", code.replace("MISSING", repr(MISSING))],
        cwd=ROOT, capture_output=True, text=True,
        # It is compiling that takes time.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def timed_where_little_more_than_jax_is(verb):
    return json.loads(run_where_little_more_than_jax_is(BARE.replace("VERB", verb)))


def test_the_steps_of_all_stages_lower_for_gpus_where_little_more_than_jax_is():
    """With cuDNN's attention in every stack, also sharded over four devices."""
    lines = run_where_little_more_than_jax_is(CUDA).splitlines()
    # Forward passes, with those of rematerialization; backward passes; partitioned ones. The two
    # shallow blocks and the deep block train in stage 1, the VLM conducts gradients in the others.
    assert lines == ["10 3 0", "5 1 0", "0 0 12"]


def test_a_stages_decoding_is_timed_where_little_more_than_jax_is():
    row = timed_where_little_more_than_jax_is("sample")
    for name, items in (("image", 64), ("text", stages.TEXT_TOKENS)):
        rate, ms = row[f"{name}_tokens_per_s"], row[f"{name}_ms"]
        assert rate == pytest.approx(2 * items * 1000 / ms)
        assert row[f"{name}_bound_ms"] > 0 and row[f"{name}_share_of_bound"] > 0
    assert row["image_peak_mb"] > 0


@pytest.mark.slow
def test_a_stages_step_is_timed_where_little_more_than_jax_is():
    trained = timed_where_little_more_than_jax_is("train")
    assert trained["row"] == "train stage3 tiny" and trained["dtype"] == "bfloat16"
    assert np.isfinite(trained["loss"]) and trained["mfu"] > 0 and trained["needs_gib"] > 0
    assert trained["tokens_per_s"] == pytest.approx(2 * 256 * 1000 / trained["ms"])


def test_rows_of_a_stage_fit_its_step():
    """Check the rows only; compiling the timed step takes too long."""
    cfg = stages.experiment("stage3", "tiny", 2, "bfloat16")
    program = registry.build(cfg, mesh.make_mesh("fsdp=-1", jax.devices()[:1]))
    rows = stages.rows_of_images(cfg, program.task.model_config, 2)
    expected = {name: (a.shape, a.dtype) for name, a in program.abstract_batch.items()}
    assert {name: (rows[name].shape, rows[name].dtype) for name in expected} == expected
    for image in range(cfg["text"]["images"]):
        positions = np.flatnonzero(
            rows["image"][0] // program.task.model_config.num_patches == image
        )
        assert np.array_equal(
            positions, positions[0] + np.arange(program.task.model_config.num_patches)
        )
        assert rows["image"][0, positions[0] - 1] == rows["image"][0, positions[-1] + 1] == -1


@pytest.mark.parametrize("name, file", [("stage1", "stage1_t2i"), ("stage3", "stage3_joint")])
def test_timed_stages_are_those_of_the_experiments(name, file):
    experiment = runpy.run_path(str(ROOT / "experiments" / f"{file}.py"))["get_config"]
    for size in ("tiny", "paper"):
        cfg, timed = experiment(size), stages.experiment(name, size, 8, "bfloat16")
        for group, key in (
            *(("text", key) for key in ("length", "images", "max_targets")),
            *(("train", "trainable"), ("noise", "sigma")),
        ):
            assert timed[group][key] == cfg[group][key], (size, key)
        assert timed["model"] == cfg.model.to_dict()


@pytest.mark.fast
def test_bytes_of_a_decoding_step():
    """7.07 B weights of the VLM's layers, 2.76 B of the deep flow's: 19.7 GB in bfloat16."""
    num_bytes = stages.step_bytes(stages.starflow2.paper(), 1, 448, 2)
    assert num_bytes["image"] == pytest.approx(2 * (6.525e9 + 2.75e9 + 0.05e9), rel=0.02)
    assert num_bytes["text"] - num_bytes["image"] == 2 * 152064 * 3584


FAULTS = """
import resource, sys
import numpy as np
from starflow2_jax.runtime import allocator
is_kept = sys.argv[1] == "keep" and allocator.keep_freed_memory()
for turn in range(6):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**25, 1.0)
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_not_asked_for_again():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        is_kept, count = subprocess.run(command, capture_output=True, text=True).stdout.split()
        return is_kept, int(count)

    is_kept, count = faults("keep")
    if is_kept == "False":
        pytest.skip("not glibc, or an accelerator is there")
    assert count < 1000
    assert faults("leave")[1] > 10 * max(count, 1)


def test_an_accelerators_host_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert allocator.keep_freed_memory() is False


@pytest.mark.fast
def test_a_busy_machines_rate_is_corrected_by_the_run():
    row = timing.utilization(1.0, RATES, flops=0.2e9)
    assert row["share_of_matmul_rate"] == 1.0 and row["machine_gflops"] == pytest.approx(200)
    assert timing.utilization(4.0, RATES, flops=0.2e9)["machine_gflops"] == 100.0


@pytest.mark.fast
def test_parts_add_up_to_the_step_within_five_percent():
    parts = breakdown.differences({"forward": 10.0, "backward": 30.0}) | {"optimizer": 6.0}
    assert parts == {"forward": 10.0, "backward": 20.0, "optimizer": 6.0}
    row = breakdown.table(parts, 37.0)
    assert row["backward_ms"] == 20.0 and row["sum_ms"] == 36.0 and row["adds_up"]
    assert not breakdown.table(parts, 34.0)["adds_up"]


def test_breakdown_of_a_preset(tiny):
    row = bench.train_preset("peer_starflow", 2, "float32", 1, RATES, with_parts=True)
    names = ("forward", "backward", "optimizer")
    assert sum(row[f"{name}_ms"] for name in names) == pytest.approx(row["sum_ms"])
    assert row["forward_ms"] > 0 and row["optimizer_ms"] > 0 and row["step_ms"] > 0


@pytest.mark.parametrize("name", ["stage1", "stage3"])
def test_the_forward_parts_of_a_stage_end_in_its_loss(name):
    """Trace only; compiling them takes too long."""
    cfg = stages.experiment(name, "tiny", 2, "float32")
    program = registry.build(cfg, mesh.make_mesh("fsdp=-1", jax.devices()[:1]))
    functions = breakdown.forward_functions(program)
    assert list(functions) == ["shallow_forward", "vlm_forward", "deep_forward_and_loss"]
    inputs = (program.abstract_state, program.abstract_frozen, program.abstract_batch)
    with jax.set_mesh(program.mesh):
        shapes = [jax.eval_shape(run, *inputs) for run in functions.values()]
    assert shapes[1][0].shape == (2, 256, 128) and "count" in shapes[2]

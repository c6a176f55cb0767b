"""The command: topologies, tables, errors; with libtpu also programs for TPUs."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest
from helpers import pretzel_batch
from helpers.executed_flops import executed_step
from helpers.pretzel_training import experiment as joint
from helpers.tiny_starflow import ROWS, experiment

from starflow2_jax import params, plan
from starflow2_jax.models import flops, starflow2
from starflow2_jax.planning import estimate, partial_compile, report, topology
from starflow2_jax.training.tasks.flow import model_config

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed (extra `plan`)")


# ------------------------------------------------------------------------------------- topologies


@pytest.mark.fast
@pytest.mark.parametrize(
    "name, words",
    [
        ("v5p:4x4x7", "does not exist; similar ones are v5p:4x4x4, v5p:4x4x8, v5p:4x8x8"),
        ("v5e:16x17", "v5e:16x16"),
        ("v5e", "does not exist; similar ones are v5e:1x1"),
        ("v5q:4x4", r"unknown machine 'v5q'; did you mean 'v5[ep]'\? \(there are v5e, v6e, v5p"),
        ("v5e:4x4*0", "expected at least one slice"),
        ("tpu v5e 4x4", "unknown machine"),
        ("cpu:2x2", "expected cpu or cpu:N"),
        ("cpu:9", "this machine has 8 cpu devices"),
        ("gpu", "this machine has no gpu"),
    ],
)
def test_a_topology_that_does_not_exist(name, words):
    with pytest.raises(ValueError, match=f"topology: '{name.replace('*', '.')}'.*{words}"):
        topology.find(name)


@pytest.mark.fast
def test_local_devices_are_a_topology():
    local = topology.find("cpu:4")
    assert local.devices == tuple(jax.devices()[:4]) and local.chip.memory > 2**28
    assert topology.parse("v5e:16x16*2") == ("v5e", "16x16", 2)
    assert len(topology.find("cpu").devices) == 8


@pytest.mark.fast
def test_bandwidth_of_a_ring():
    """Both ways round a closed dimension, one link over an open one, and between slices none."""
    device = lambda *coords, part=0: SimpleNamespace(coords=coords, slice_index=part)
    chip = topology.TPUS["v5p"]
    machine = lambda shape: topology.Topology("", "v5p", (), chip, 1, shape)
    line = [device(0, 0, z) for z in range(8)]
    plane = [device(0, y, z) for z in range(8) for y in range(4)]
    assert machine((4, 4, 8)).bandwidth(line) == 2 * chip.link
    assert machine((4, 4, 8)).bandwidth(line[:4]) == chip.link
    assert machine((4, 4, 8)).bandwidth(plane) == 4 * chip.link
    assert machine((2, 2, 1)).bandwidth([device(0, 0, 0), device(1, 0, 0)]) == chip.link
    assert machine((4, 4, 8)).bandwidth([device(0, 0, 0), device(0, 0, 0, part=1)]) == chip.network


# ---------------------------------------------------------------------------------------- command


def test_a_plan_of_all_layouts_on_these_devices(tmp_path):
    cfg = experiment()
    rows = plan.plan(cfg, "cpu", ["fsdp", "tp"])
    result = plan.result(cfg, rows, "cpu", "train")
    plan.write(tmp_path / "out", result)
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    first, second = written["rows"]
    assert first["mesh"] == {"fsdp": 8} and second["mesh"] == {"tensor": 8}
    assert first["fits"] and first["parameters"]["trained"] > 100_000
    assert first["memory"]["declared"]["params"] < second["memory"]["declared"]["params"] * 1.1
    assert 0 < first["model_flops"] < 8 * first["flops"]  # full remat does some of them twice
    assert first["model_flops"] == second["model_flops"]
    assert {c["kind"] for c in first["collectives"]} >= {"all-gather", "all-reduce"}
    assert (tmp_path / "out" / "plan.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "out" / "plan.md").read_text().splitlines()
    assert lines[0] == "small, train, cpu" and lines[2].startswith("| layout")
    assert sum(line.startswith("| fsdp ") for line in lines) == 1


def test_rates_and_what_is_said_of_a_row_that_does_not_fit():
    chip = topology.TPUS["v5e"]
    machine = topology.Topology("v5e:2x2", "v5e", (None,) * 4, chip, 1, (2, 2, 1))
    row = {"layout": "dp", "mesh": {"data": 4}, "batch": 8, "devices": 4, "fits": True}
    row |= {"device_s": 0.2, "network_s": 0.3, "collectives": [], "flops": 1e12, "bytes": 1e9}
    row |= {"compile_s": 1.0, "memory": _memory(0.0)}
    rates = estimate._rates(row, 4 * chip.flops * 0.15, 3000, machine)
    assert rates["step_s"] == 0.3 and rates["step_without_overlap_s"] == 0.5
    assert rates["mfu_bound"] == pytest.approx(0.5) and rates["tokens_per_s"] == 10_000
    large = {**row, "fits": False, "memory": _memory(2.5 * 2**30), "advice": ["twice the chips"]}
    text = "\n".join(report.lines([rates, large, {**row, "error": "layout 'tp': no"}]))
    assert "dp data=4 does not fit by 2.50 GiB a chip; this would help:\n  twice the chips" in text
    assert "dp data=4: layout 'tp': no" in text and "300 to 500 ms" in text


def _memory(over):
    parts = dict.fromkeys(("params", "ema", "optimizer", "frozen", "batch"), 2**30)
    return {"declared": parts, "peak": 6 * 2**30, "capacity": 8 * 2**30, "over": over}


def test_a_program_that_jax_cannot_read_names_the_remedy():
    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands\n\tstack")

    compiled = SimpleNamespace(as_text=as_text)
    lowered = SimpleNamespace(compile=lambda: compiled)
    words = r"cannot read the program compiled for cpu:8 \(INTERNAL: .* operands\); pip install"
    with pytest.raises(RuntimeError, match=words):
        estimate._compile(lowered, None, topology.find("cpu:8"), {}, 0.0)


def test_generate_is_planned_too():
    cfg = experiment(**{"sample.guidance": 0.0})
    (row,) = plan.plan(cfg, "cpu", ["fsdp"], program="generate")
    assert row["batch"] == 8 and row["tokens"] == 8 * 64 and not row["unknown_loops"]
    # There is one row on a device: every token passes every matrix, and looks at the whole cache.
    matrices = sum(flops.matrix_parameters(model_config(cfg), 0))
    assert row["flops"] == pytest.approx(64 * (2 * matrices + 2 * 4 * 64 * 256), rel=0.02)
    with pytest.raises(ValueError, match="task='fae_pixels' is not planned"):
        plan.plan({**cfg, "task": "fae_pixels"}, "cpu", ["fsdp"], program="generate")


def test_generation_of_starflow2_is_planned_too():
    """Each patch of 4 passes both streams: their matrices, and the caches of 64 slots."""
    cfg = joint(**{"text.length": 40})
    (row,) = plan.plan(cfg, "cpu", ["fsdp"], program="generate")
    assert row["batch"] == 8 and row["tokens"] == 8 * 4 and not row["unknown_loops"]
    model = pretzel_batch.model()
    matrices = sum(
        math.prod(weight.shape)
        for name, weight in params.flatten(starflow2.declare(model)).items()
        if len(weight.shape) > 1 and name.endswith("weight") and "norm" not in name
        and not name.startswith(("shallow", "vlm/embed"))
    )  # fmt: skip
    attention = 4 * 64 * (2 * model.vlm.width + 2 * model.flow.width)
    assert row["flops"] == pytest.approx(4 * (2 * matrices + attention), rel=0.1)
    guided = plan.plan({**cfg, "sample": {**cfg["sample"], "guidance": 2.0}}, "cpu", ["fsdp"],
                       program="generate")[0]  # fmt: skip
    assert 1.8 < guided["flops"] / row["flops"] < 2.05


def test_whole_heads_go_to_a_device():
    machine = topology.find("cpu")
    assert estimate.default_mesh("tp", machine) == "data=-1,tensor=8"
    model = {"vlm": {"heads": 28, "kv_heads": 4}, "flow": {"heads": 0}, "skips": ("vlm",)}
    assert estimate.default_mesh("tp", machine, model) == "data=-1,tensor=4"


@pytest.mark.parametrize(
    "layouts, options, words",
    [
        (["fsdp"], {"mesh": "fsdp=6"}, "needs 6 devices, 8 are there"),
        (["fsdp_tp"], {"mesh": "fsdp=2,tensor=2"}, "needs 4 devices, 8 are there"),
        (["dp"], {"rows": 36}, "train.batch_size=36 is not divisible by data x fsdp = 8 x 1 = 8"),
        (["dp", "tp"], {"mesh": "data=8"}, "--mesh applies to a single --layout"),
        (["tp"], {"mesh": "tensor=8", "heads": 3}, "does not divide"),
    ],
)
def test_what_does_not_fit_together_is_one_error(layouts, options, words):
    cfg = experiment()
    cfg["train"]["batch_size"] = options.get("rows", 40)
    cfg["model"] |= {"heads": 3, "head_dim": 20} if "heads" in options else {}
    with pytest.raises(ValueError, match=words):
        plan.plan(cfg, "cpu", layouts, mesh=options.get("mesh"))


def test_of_several_layouts_the_others_go_on():
    cfg = experiment()
    cfg["model"] |= {"heads": 3, "head_dim": 20}
    cfg["train"]["batch_size"] = 8
    rows = plan.plan(cfg, "cpu:8", ["tp", "dp"])
    assert "does not divide" in rows[0]["error"] and "flops" in rows[1]
    with pytest.raises(ValueError, match=r"'fdsp' is not one of .*; did you mean 'fsdp'"):
        plan._layouts("dp,fdsp")
    assert plan._layouts("all") == ["dp", "fsdp", "tp", "fsdp_tp", "hybrid"]


def test_search_names_the_best_that_fits(monkeypatch):
    """Compiled are few; which ones follows from the traces."""
    machine = topology.find("cpu")
    tried = []

    def row(cfg, _):
        tried.append((cfg["mesh"], cfg["model"]["remat"], cfg["train"]["batch_size"]))
        return {"layout": cfg["layout"], "batch": cfg["train"]["batch_size"], "fits": True,
                "remat": cfg["model"]["remat"], "tokens_per_s": float(len(tried))}  # fmt: skip

    from starflow2_jax.planning import search

    monkeypatch.setattr(estimate, "train_step", row)
    messages = []
    rows = search.search(experiment(), machine, ["fsdp", "hybrid"], 3, messages.append)
    assert len(rows) == len(tried) == 3 and rows[0]["tokens_per_s"] == 3.0
    assert {remat for _, remat, _ in tried} == {"none"}  # fewest FLOPs a token where memory allows
    assert "0 cannot" not in messages[0]  # 20 rows do not divide by 8
    chip = topology.Chip(1e12, 1000.0, 1e9, 1e9, 1e9)
    small = topology.Topology("cpu", "cpu", machine.devices, chip)
    with pytest.raises(ValueError, match="nothing fits cpu: 8 devices of"):
        search.search(experiment(), small, ["fsdp"], 3, messages.append)


def test_what_the_compiler_has_written_before_machine_code(tmp_path):
    """Arrays of main memory alone count (color 0); nothing is read of what is half written."""
    dump = lambda name: tmp_path / f"module_0003.jit_step.after_optimizations{name}.txt"
    assert partial_compile.read_dump(tmp_path) is None
    dump("-buffer-assignment").write_text(
        "BufferAssignment:\n"
        "allocation 0: size 64, output shape is |f32[16]|, maybe-live-out:\n"
        " value: <1 add @0> (size=64,offset=0): f32[16]\n"
        "allocation 1: size 256, parameter 0, shape |f32[64]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 2: size 512, parameter 1, shape |f32[128]| at ShapeIndex {}:\n"
        "allocation 3: size 4096, color 1, preallocated-temp:\n"
        "allocation 4: size 1024, preallocated-temp:\n"
    )
    dump("-memory-usage-report").write_text(
        "Memory Space: default (color=0)\nTotal bytes: 1856 (1.8KiB)\n"
        "Memory Space: vmem (color=1)\nTotal bytes: 4096 (4.0KiB)\n"
    )
    program = dump("_after_buffer_assignment")
    inner = "HloModule jit_step\n\n%inner (b: f32[64]) -> f32[16] {\n}\n\n"
    for part in (inner, inner + "ENTRY %main (a: f32[64]) -> f32[16] {\n  %a = f32[64]{0}"):
        program.write_text(part)
        assert partial_compile.read_dump(tmp_path) is None
    program.write_text(inner + "ENTRY %main (a: f32[64]) -> f32[16] {\n}\n\n")
    program_dump = partial_compile.read_dump(tmp_path)
    assert (
        program_dump.as_text().startswith("HloModule")
        and program_dump.memory_analysis() is program_dump
    )
    assert (program_dump.argument_size_in_bytes, program_dump.output_size_in_bytes) == (768, 320)
    assert (program_dump.alias_size_in_bytes, program_dump.temp_size_in_bytes) == (256, 1024)


def test_a_process_of_its_own_hands_back_what_it_found_or_why_not():
    assert partial_compile.run_in_subprocess(math.gcd, 12, 18) == 6
    with pytest.raises(ValueError, match="invalid literal for int"):
        partial_compile.run_in_subprocess(int, "twelve")
    with pytest.raises(RuntimeError, match="ended with code 3 and no answer; --whole compiles"):
        partial_compile.run_in_subprocess(os._exit, 3)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_the_process_of_its_own_ends_with_the_one_that_asked(tmp_path):
    """Even where that one is killed: a compiler would go on for minutes."""
    code = (
        "import time\n"
        "from starflow2_jax.planning import partial_compile\n"
        "if __name__ == '__main__':\n"
        "    partial_compile.run_in_subprocess(time.sleep, 1000)\n"
    )
    (tmp_path / "ask.py").write_text(code)
    asking = subprocess.Popen([sys.executable, str(tmp_path / "ask.py")], env={**os.environ})
    children = pathlib.Path(f"/proc/{asking.pid}/task/{asking.pid}/children")
    wait = lambda done: next((True for _ in range(600) if done() or time.sleep(0.1)), False)
    spawned = lambda: [
        n for n in children.read_text().split()
        if b"spawn_main" in pathlib.Path(f"/proc/{n}/cmdline").read_bytes()
    ]  # fmt: skip
    assert wait(spawned)
    (child,) = spawned()
    time.sleep(5)  # for the child to begin
    asking.kill()
    asking.wait()
    assert wait(lambda: not pathlib.Path(f"/proc/{child}").exists())


# ------------------------------------------------------------------------------------------- TPUs


@needs_libtpu
def test_splash_compiles_for_a_tpu_and_arguments_are_exact():
    """One block of scores a row: the bytes as declared and the tiles' padding are the compiled
    arguments, and the kernel's products count.
    """
    changes = {"model.side": 16, "image.pixels": 32, "compute_dtype": "bfloat16"}
    changes |= {"attention": "splash"}  # or an error: `auto` might fall back
    # A loop of one layer is none: the compiler then sees that remat computes what is there.
    cfg = experiment("fsdp", "fsdp=2,tensor=2", depth=2, **changes)
    (row,) = plan.plan(cfg, "v5e:2x2", ["fsdp"])
    assert row["kernel_flops"] > 0 and row["fits"] and row["mfu_bound"] > 0
    assert row["unknown_loops"] == []
    memory = row["memory"]
    assert memory["unused"] == 0
    assert sum(memory["declared"].values()) + memory["padding"] == memory["arguments"]
    model = model_config(cfg)
    expected = executed_step(model, cfg["train"]["batch_size"], model.tokens)
    # The kernel looks at its whole block, the plain path at 5/8 of it, and multiplies twice more
    # than that: scores anew for each of the two gradients.
    scores = 2 * 4 * model.tokens**2 * 8 * 32 * ROWS
    more = scores * (2 + 3.5 - 4 * 5 / 8)
    assert 4 * row["flops"] == pytest.approx(expected + more, rel=0.05)
    assert 4 * row["kernel_flops"] == pytest.approx(5.5 * scores)


@needs_libtpu
def test_a_single_row_is_generated_with_the_same_products():
    """TPU programs multiply a vector by a matrix without a matrix product."""
    cfg = experiment(**{"sample.guidance": 0.0})
    (row,) = plan.plan(cfg, "v5e:1x1", ["dp"], program="generate")
    matrices = sum(flops.matrix_parameters(model_config(cfg), 0))
    assert row["devices"] == row["batch"] == 1
    assert row["flops"] == pytest.approx(64 * (2 * matrices + 2 * 4 * 64 * 256), rel=0.01)


@needs_libtpu
def test_two_slices_exchange_gradients_alone():
    cfg = experiment("hybrid", "data=2,fsdp=4", depth=1)
    (row,) = plan.plan(cfg, "v5e:2x2*2", ["hybrid"])
    assert row["devices"] == 8
    # Weights are gathered inside a slice; between slices go gradients and a few sums.
    across = [c for c in row["collectives"] if c["axes"] not in ("fsdp", "")]
    assert {(c["kind"], c["axes"]) for c in across} == {("all-reduce", "slices")}
    trained = 4 * row["parameters"]["trained"]
    # No gradient is missing. Those of small weights are padded to tiles of 8 x 128.
    assert 1 <= sum(c["bytes"] for c in across) / (trained / 4) < 1.25
    with pytest.raises(ValueError, match="layout 'hybrid': mesh axis fsdp=8 crosses slices"):
        plan.plan(cfg, "v5e:2x2*2", ["hybrid"], mesh="fsdp=8")


@needs_libtpu
def test_what_does_not_fit_a_tpu_says_by_how_much():
    changes = {"model.width": 4096, "model.heads": 64, "compute_dtype": "bfloat16"}
    cfg = experiment("dp", "data=4", depth=6, **changes)
    (row,) = plan.plan(cfg, "v5e:2x2", ["dp"])
    assert not row["fits"] and row["memory"]["over"] > 0
    assert any("weights cut 4 ways, not 1" in hint for hint in row["advice"])


@needs_libtpu
@pytest.mark.slow
def test_a_plan_without_machine_code_is_that_of_the_whole():
    """Only the code's own bytes are missing, and what it keeps in memory for itself."""
    cfg = experiment("fsdp", "fsdp=4", depth=2, compute_dtype="bfloat16")
    (quick,) = plan.plan(cfg, "v5e:2x2", ["fsdp"])
    (full,) = plan.plan(cfg, "v5e:2x2", ["fsdp"], with_codegen=True)
    assert quick["unknown_loops"] == full["unknown_loops"] == []
    same = ("flops", "kernel_flops", "bytes", "collectives", "unexpected", "fits", "step_s")
    assert {name: quick[name] for name in same} == {name: full[name] for name in same}
    quick_memory, full_memory = quick["memory"], full["memory"]
    same = ("declared", "arguments", "outputs", "aliased", "padding", "unused", "capacity")
    assert {name: quick_memory[name] for name in same} == {name: full_memory[name] for name in same}
    assert quick_memory["code"] == 0 < full_memory["code"]
    assert 0 <= full_memory["peak"] - full_memory["code"] - quick_memory["peak"] < 64 * 2**20

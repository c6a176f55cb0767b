"""One row of a plan: a program compiled for a mesh, and what that costs."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax

from starflow2_jax import params
from starflow2_jax.mesh import make_mesh
from starflow2_jax.planning import (
    cost,
    decode_program,
    hlo,
    jaxpr,
    memory,
    options,
    partial_compile,
    sharding_audit,
)
from starflow2_jax.planning.topology import Topology, find
from starflow2_jax.training.tasks import registry

Row = dict[str, Any]
# So that `--layout tp` means something on many chips: heads and channels rarely divide by more.
TENSOR = 8


def default_mesh(layout: str, topology: Topology, model: Mapping[str, Any] | None = None) -> str:
    """A mesh that shows what a layout is for, on all devices of a topology.

    Args:
        model: of the experiment: whole key and value heads go to a device, or else no kernel
            serves and every layer exchanges them.
    """
    count, slices = len(topology.devices), topology.slices
    heads = filter(None, options.named(model or {}, "heads", "kv_heads"))
    tensor = math.gcd(count, TENSOR)
    whole = math.gcd(tensor, *heads)
    tensor = whole if whole > 1 else tensor
    return {
        "dp": "data=-1",
        "fsdp": "fsdp=-1",
        "tp": f"data=-1,tensor={tensor}",
        "fsdp_tp": f"fsdp=-1,tensor={min(tensor, 4)}",
        "hybrid": f"data={slices if slices > 1 else 2 if count < 64 else 4},fsdp=-1",
    }[layout]


def model_flops(cfg: Mapping[str, Any]) -> float:
    """FLOPs of a training step itself: its products without rematerialisation, causal attention as
    the plain path computes it (5/8 of the square where rows are long).
    """
    bare = {**cfg, "layout": "dp", "train": {**cfg["train"], "microbatches": 1}}
    # Products that a trace can count, as there are none in a kernel.
    bare |= {"attention": "plain", "model": options.changed(cfg["model"], remat="none")}
    mesh = make_mesh("data=1", jax.devices("cpu")[:1])
    return jaxpr.flops(_trace(registry.build(bare, mesh, dry_run=True)).jaxpr)


def _trace(program):
    with jax.set_mesh(program.mesh):
        given = (program.abstract_state, program.abstract_frozen, program.abstract_batch)
        return program.step.trace(*given)


def planned(
    what: str, cfg: Mapping[str, Any], topology: Topology, *args: Any, whole: bool = False
) -> Row:
    """`train_step` or `generate`; for TPUs in a process of its own, without machine code.

    Args:
        what: which of the two; args: after the topology; whole: here, and machine code too.
    """
    if whole or not topology.shape:
        return globals()[what](cfg, topology, *args)
    return partial_compile.apart(_apart, what, dict(cfg), topology.name, args)


def _apart(what, cfg, topology, args):
    return globals()[what](cfg, find(topology), *args, whole=False)


def train_step(
    cfg: Mapping[str, Any],
    topology: Topology,
    own_flops: float | None = None,
    *,
    whole: bool = True,
) -> Row:
    """Compile an experiment's training step for a topology under its `layout` and `mesh`.

    Args:
        cfg: a resolved, checked configuration; own_flops: of `model_flops`, where known.
        whole: machine code too, of which a plan reads the size alone.

    Raises:
        ValueError: what building the program says of configuration, mesh or layout.
    """
    mesh = make_mesh(cfg["mesh"], topology.devices)
    program = registry.build(cfg, mesh, dry_run=True)
    rows, parts = cfg["train"]["batch_size"], cfg["train"]["microbatches"]
    traced = _trace(program)
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    activations = jaxpr.kept(traced.jaxpr, rows // parts, ways)
    trained = set(cfg["train"]["trainable"])
    count = {
        "trained": sum(params.count(t) for n, t in program.declared.items() if n in trained),
        "frozen": sum(params.count(t) for n, t in program.declared.items() if n not in trained),
    }
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    row = _compiled(lowered, mesh, topology, memory.declared(program), activations, whole=whole)
    if "flops" in row:
        module, found = row.pop("_compiled")
        args = (program.declared, found, module, mesh, cfg["layout"])
        row["unintended"] = sharding_audit.unintended(*args, trained=trained)
        if topology.shape:
            row["unintended"] += sharding_audit.twice(program.declared, found, mesh, cfg["layout"])
    row = {**_told(cfg, topology, mesh, rows), "parameters": count, **row}
    held = row.pop("_memory")
    row["advice"] = memory.advice(held, cfg, dict(mesh.shape), rows)
    flops = model_flops(cfg) if own_flops is None else own_flops
    tokens = registry.work(cfg, program.model, program.declared)["tokens"]
    return _rates(row, flops, tokens, topology)


def generate(cfg: Mapping[str, Any], topology: Topology, rows: int, *, whole: bool = True) -> Row:
    """Compile the drawing of `rows` images; as `train_step`."""
    mesh = make_mesh(cfg["mesh"], topology.devices)
    made = decode_program.lower(cfg, mesh, rows)
    row = _compiled(made.lowered, mesh, topology, made.declared, 0.0, made.steps, whole)
    row = {**_told(cfg, topology, mesh, rows), **row}
    row.pop("_memory")
    row.pop("_compiled", None)
    row["advice"] = [] if row["fits"] else ["a layout that cuts weights, or a smaller --batch"]
    return _rates(row, None, made.tokens, topology)


def _told(cfg, topology, mesh, rows):
    return {
        "name": cfg["name"],
        "topology": topology.name,
        "devices": len(topology.devices),
        "layout": cfg["layout"],
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch": rows,
        "microbatches": cfg["train"]["microbatches"],
        "remat": options.remat(cfg["model"]),
        "attention": cfg["attention"],
    }


def _compiled(lowered, mesh, topology, declared, activations, unsaid=1, whole=True):
    """Memory and work of a lowered program; work is missing where it was too large to compile.

    `unsaid`: how often a loop runs of which the program does not say it.

    Raises:
        RuntimeError: a compiler newer than jax, whose programs it cannot read.
    """
    began, worked, chip = time.perf_counter(), time.process_time(), topology.chip
    # Seconds on the clock, and of all cores together, which a busy machine does not change.
    took = lambda: {
        "compile_s": time.perf_counter() - began,
        "compile_cpu_s": time.process_time() - worked,
    }
    try:
        made = lowered.compile() if whole else partial_compile.until_code(lowered)
    except jax.errors.JaxRuntimeError as error:
        held = memory.too_large(str(error), declared, activations, chip.memory)
        if held is None:
            raise
        return {"fits": False, **took(), "memory": asdict(held), "_memory": held}
    taken = took()
    try:
        module = hlo.parse(made.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"plan: jax {jax.__version__} cannot read what was compiled for {topology.name} "
            f"({str(error).splitlines()[0]}); pip install 'starflow2_jax[plan]' brings the libtpu "
            "of this jax"
        ) from error
    held = memory.compiled(made.memory_analysis(), module, declared, activations, chip.memory)
    found = cost.analyse(module, mesh.shape, topology.slices, unsaid)
    row = {"fits": held.fits, **taken, "memory": asdict(held), "_memory": held}
    row["flops"], row["kernel_flops"], row["bytes"] = found.flops, found.kernel_flops, found.bytes
    row["collectives"] = _summed(found.collectives)
    row["unknown_loops"] = list(found.unknown_loops) if unsaid == 1 else []
    row["_compiled"] = (module, found)
    if chip.flops:
        row["compute_s"] = found.flops / chip.flops
        row["memory_s"] = found.bytes / chip.bandwidth
        # Each operation waits for its products or its bytes, whichever takes longer.
        row["device_s"] = sum(
            times * max(flops / chip.flops, moved / chip.bandwidth)
            for flops, moved, times in found.operations
        )
        devices = list(mesh.devices.flat)
        row["network_s"] = sum(
            each.times * each.wire / _bandwidth(topology, each, devices)
            for each in found.collectives
            if len(each.group) > 1
        )
    return row


def _bandwidth(topology, collective, devices):
    if collective.axes == cost.SLICES:
        return topology.chip.network
    return topology.bandwidth([devices[n] for n in collective.group])


def _summed(collectives):
    found: dict[tuple[str, str], Row] = {}
    for each in collectives:
        key = (each.kind, each.axes)
        sums = found.setdefault(
            key, {"kind": each.kind, "axes": each.axes, "count": 0.0, "bytes": 0.0, "wire": 0.0}
        )
        sums["count"] += each.times
        sums["bytes"] += each.times * each.bytes
        sums["wire"] += each.times * each.wire
    return sorted(found.values(), key=lambda row: -row["wire"])


def _rates(row, flops, tokens, topology):
    """Step time between two bounds, and what follows from them."""
    row["model_flops"], row["tokens"] = flops, tokens
    if "device_s" not in row:
        return row
    row["step_s"] = max(row["device_s"], row["network_s"])
    row["step_without_overlap_s"] = row["device_s"] + row["network_s"]
    row["tokens_per_s"] = tokens / row["step_s"]
    if flops:
        peak = row["devices"] * topology.chip.flops
        row["mfu_bound"] = flops / peak / row["step_s"]
        row["mfu_without_overlap"] = flops / peak / row["step_without_overlap_s"]
    return row

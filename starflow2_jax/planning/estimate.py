"""One row of a plan: a program compiled for a mesh, with its memory, cost and step time."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax

from starflow2_jax import config, params
from starflow2_jax.mesh import make_mesh
from starflow2_jax.planning import (
    cost,
    decode_program,
    hlo,
    jaxpr,
    memory,
    partial_compile,
    sharding_audit,
)
from starflow2_jax.planning.topology import Topology, find
from starflow2_jax.training.tasks import registry

Row = dict[str, Any]
# The largest default of the tensor axis: heads and channels rarely divide by more.
TENSOR = 8


def default_mesh(layout: str, topology: Topology, model: Mapping[str, Any] | None = None) -> str:
    """Return a mesh that suits a layout, on all devices of a topology.

    The tensor axis divides the heads of the `model` group, because otherwise no attention kernel
    applies and every layer exchanges keys and values.
    """
    count, slices = len(topology.devices), topology.slices
    heads = filter(None, config.find_nested(model or {}, "heads", "kv_heads"))
    tensor = math.gcd(count, TENSOR)
    divisor = math.gcd(tensor, *heads)
    tensor = divisor if divisor > 1 else tensor
    return {
        "dp": "data=-1",
        "fsdp": "fsdp=-1",
        "tp": f"data=-1,tensor={tensor}",
        # Bytes sent grow with `tensor`; an `fsdp` axis across the whole slice is gathered badly.
        "fsdp_tp": f"fsdp=-1,tensor={min(tensor, 2)}",
        "hybrid": f"data={max(slices, 2)},fsdp=-1",
    }[layout]


def model_flops(cfg: Mapping[str, Any]) -> float:
    """Return the FLOPs of a step without rematerialization; causal attention counts 5/8."""
    plain = {**cfg, "layout": "dp", "train": {**cfg["train"], "microbatches": 1}}
    # The products inside attention kernels cannot be counted in a jaxpr.
    plain |= {"attention": "plain", "model": config.set_nested(cfg["model"], remat="none")}
    device_mesh = make_mesh("data=1", jax.devices("cpu")[:1])
    return jaxpr.count_flops(trace(registry.build(plain, device_mesh, dry_run=True)).jaxpr)


def trace(program: Any) -> Any:
    """Trace the training step of a program for its abstract arguments."""
    with jax.set_mesh(program.mesh):
        return program.step.trace(
            program.abstract_state, program.abstract_frozen, program.abstract_batch
        )


def plan_row(
    function: str,
    cfg: Mapping[str, Any],
    topology: Topology,
    *args: Any,
    with_codegen: bool = False,
) -> Row:
    """Run `train_step` or `generate`, for TPUs in a subprocess and without code generation."""
    if with_codegen or not topology.shape:
        return globals()[function](cfg, topology, *args)
    return partial_compile.run_in_subprocess(_run, function, dict(cfg), topology.name, args)


def _run(function, cfg, topology_name, args):
    return globals()[function](cfg, find(topology_name), *args, with_codegen=False)


def train_step(
    cfg: Mapping[str, Any],
    topology: Topology,
    step_flops: float | None = None,
    *,
    with_codegen: bool = True,
) -> Row:
    """Compile an experiment's training step for a topology under its `layout` and `mesh`.

    `step_flops` is the result of `model_flops`, if it is known.
    """
    device_mesh = make_mesh(cfg["mesh"], topology.devices)
    mesh = device_mesh.shape
    program = registry.build(cfg, device_mesh, dry_run=True)
    rows, microbatches = cfg["train"]["batch_size"], cfg["train"]["microbatches"]
    traced = trace(program)
    shards = mesh["data"] * mesh["fsdp"] * mesh["context"]
    activations = jaxpr.saved_activation_bytes(traced.jaxpr, rows // microbatches, shards)
    trained = set(cfg["train"]["trainable"])
    declared = program.task.declared
    count = {
        "trained": sum(params.count(t) for n, t in declared.items() if n in trained),
        "frozen": sum(params.count(t) for n, t in declared.items() if n not in trained),
    }
    with jax.set_mesh(device_mesh):
        lowered = traced.lower()
    argument_bytes = memory.declared_bytes(program)
    row = _compile(
        lowered, device_mesh, topology, argument_bytes, activations, with_codegen=with_codegen
    )
    if "flops" in row:
        module, step_cost = row.pop("_compiled")
        row["unexpected"] = sharding_audit.unexpected_collectives(
            declared,
            step_cost,
            module,
            device_mesh,
            cfg["layout"],
            trained=trained,
            rows=rows // microbatches // (mesh["data"] * mesh["fsdp"]),
        )
        if topology.shape:
            row["unexpected"] += sharding_audit.redundant_allreduces(
                declared, step_cost, device_mesh, cfg["layout"]
            )
    row = {**_settings(cfg, topology, mesh, rows), "parameters": count, **row}
    row["advice"] = memory.advice(row.pop("_memory"), cfg, dict(mesh), rows)
    flops = model_flops(cfg) if step_flops is None else step_flops
    tokens = program.task.step_cost()["tokens"]
    return _rates(row, flops, tokens, topology)


def generate(
    cfg: Mapping[str, Any], topology: Topology, rows: int, *, with_codegen: bool = True
) -> Row:
    """Compile the generation of `rows` images; arguments and errors as in `train_step`."""
    device_mesh = make_mesh(cfg["mesh"], topology.devices)
    program = decode_program.lower(cfg, device_mesh, rows)
    row = _compile(
        program.lowered, device_mesh, topology, program.declared, 0.0, program.steps, with_codegen
    )
    row = {**_settings(cfg, topology, device_mesh.shape, rows), **row}
    row.pop("_memory")
    row.pop("_compiled", None)
    row["advice"] = [] if row["fits"] else ["a layout that cuts weights, or a smaller --batch"]
    return _rates(row, None, program.tokens, topology)


def _settings(cfg, topology, mesh, rows):
    return {
        "name": cfg["name"],
        "topology": topology.name,
        "devices": len(topology.devices),
        "layout": cfg["layout"],
        "mesh": {axis: size for axis, size in mesh.items() if size > 1},
        "batch": rows,
        "microbatches": cfg["train"]["microbatches"],
        "remat": config.remat_policy(cfg["model"]),
        "attention": cfg["attention"],
    }


def _compile(
    lowered, device_mesh, topology, declared, activations, default_trips=None, with_codegen=True
):
    """Compile a lowered program; return its memory and, unless it is too large, its cost."""
    start_time, start_cpu, chip = time.perf_counter(), time.process_time(), topology.chip
    try:
        if with_codegen:
            executable = lowered.compile()
        else:
            executable = partial_compile.compile_without_codegen(lowered)
    except jax.errors.JaxRuntimeError as error:
        memory_use = memory.from_error(str(error), declared, activations, chip.memory)
        if memory_use is None:
            raise
        row = {"fits": False, **_elapsed(start_time, start_cpu)}
        return {**row, "memory": asdict(memory_use), "_memory": memory_use}
    elapsed = _elapsed(start_time, start_cpu)
    try:
        module = hlo.parse(executable.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"plan: jax {jax.__version__} cannot read the program compiled for {topology.name} "
            f"({str(error).splitlines()[0]}); pip install 'starflow2_jax[plan]' installs the "
            "libtpu of this jax"
        ) from error
    memory_use = memory.from_compiler(
        executable.memory_analysis(), module, declared, activations, chip.memory
    )
    step = cost.analyze(module, device_mesh.shape, topology.slices, default_trips)
    row = {"fits": memory_use.fits, **elapsed}
    row |= {"memory": asdict(memory_use), "_memory": memory_use}
    row |= {"flops": step.flops, "kernel_flops": step.kernel_flops, "bytes": step.bytes}
    row["collectives"] = _sum_collectives(step.collectives)
    row["unknown_loops"] = list(step.unknown_loops) if default_trips is None else []
    row["_compiled"] = (module, step)
    if chip.flops:
        row["compute_s"] = step.flops / chip.flops
        row["memory_s"] = step.bytes / chip.bandwidth
        # Roofline: each operation takes the longer of its compute time and its memory time.
        row["device_s"] = sum(
            times * max(flops / chip.flops, num_bytes / chip.bandwidth)
            for flops, num_bytes, times in step.operations
        )
        devices = list(device_mesh.devices.flat)
        row["network_s"] = sum(
            collective.times * collective.wire / _bandwidth(topology, collective, devices)
            for collective in step.collectives
            if len(collective.group) > 1
        )
    return row


def _elapsed(start_time, start_cpu):
    """Return the seconds of wall-clock time and of processor time (immune to other load)."""
    return {
        "compile_s": time.perf_counter() - start_time,
        "compile_cpu_s": time.process_time() - start_cpu,
    }


def _bandwidth(topology, collective, devices):
    if collective.axes == cost.SLICES:
        return topology.chip.network
    return topology.bandwidth([devices[n] for n in collective.group])


def _sum_collectives(collectives):
    """Return the totals per kind and mesh axes, those that send most first."""
    rows: dict[tuple[str, str], Row] = {}
    for c in collectives:
        empty = {"kind": c.kind, "axes": c.axes, "count": 0.0, "bytes": 0.0, "wire": 0.0}
        row = rows.setdefault((c.kind, c.axes), empty)
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
        row["wire"] += c.times * c.wire
    return sorted(rows.values(), key=lambda row: -row["wire"])


def _rates(row, flops, tokens, topology):
    """Add bounds of the step time, with and without overlap, and the rates they imply."""
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

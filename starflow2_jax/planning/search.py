"""A search over batch size, rematerialization and mesh: all candidates are traced, few compiled."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from starflow2_jax import config
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models.layers import REMAT
from starflow2_jax.planning import estimate, jaxpr, memory
from starflow2_jax.planning.topology import Topology
from starflow2_jax.training.tasks import registry

Row = dict[str, Any]
# Allowance for what is not counted: the work of one layer, and gradients in flight.
MARGIN = 1.1


def candidates(
    cfg: Mapping[str, Any], topology: Topology, layouts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield configurations with half, one and two times the batch, every rematerialization policy,
    and several meshes of each layout. The original batch and default mesh come first.
    """
    count, batch = len(topology.devices), cfg["train"]["batch_size"]
    for layout in layouts:
        sizes = [n for n in (2, 4, 8, 16) if count % n == 0 and n < count]
        meshes = {
            "tp": [f"data=-1,tensor={n}" for n in sizes],
            "fsdp_tp": [f"fsdp=-1,tensor={n}" for n in sizes],
            "hybrid": [f"data={n},fsdp=-1" for n in sizes],
        }.get(layout, [])
        default = estimate.default_mesh(layout, topology, cfg["model"])
        for mesh in dict.fromkeys([default, *meshes]):
            for rows in (batch, 2 * batch, batch // 2):
                for remat in REMAT if config.find_nested(cfg["model"], "remat") else (None,):
                    candidate = {**cfg, "layout": layout, "mesh": mesh}
                    candidate["train"] = {**cfg["train"], "batch_size": rows}
                    candidate["model"] = config.set_nested(cfg["model"], remat=remat)
                    yield candidate


def search(
    cfg: Mapping[str, Any],
    topology: Topology,
    layouts: Sequence[str],
    tries: int,
    log: Callable[[str], None],
    with_codegen: bool = False,
) -> list[Row]:
    """Return the rows of the compiled candidates, the best one that fits first.

    Candidates whose weights, optimizer and saved activations exceed the memory are dropped. Of the
    rest, `tries` are compiled, in order of FLOPs per token and then of devices per weight.
    """
    ranked, num_refused = [], 0
    for candidate in candidates(cfg, topology, layouts):
        try:
            device_mesh = make_mesh(candidate["mesh"], topology.devices)
            program = registry.build(candidate, device_mesh, dry_run=True)
        except ValueError:  # the mesh does not divide it
            num_refused += 1
            continue
        traced = estimate.trace(program)
        rows, microbatches = candidate["train"]["batch_size"], candidate["train"]["microbatches"]
        mesh = device_mesh.shape
        shards = mesh["data"] * mesh["fsdp"] * mesh["context"]
        num_bytes = sum(memory.declared_bytes(program).values())
        num_bytes += jaxpr.saved_activation_bytes(traced.jaxpr, rows // microbatches, shards)
        if topology.chip.memory and num_bytes * MARGIN > topology.chip.memory:
            num_refused += 1
            continue
        flops_per_row = jaxpr.count_flops(traced.jaxpr) / rows
        weight_shards = mesh["fsdp"] * mesh["tensor"]
        ranked.append((flops_per_row, weight_shards, num_bytes, len(ranked), candidate))
    log(
        f"{len(ranked)} candidates may fit, {num_refused} cannot; "
        f"compiling {min(tries, len(ranked))}"
    )
    if not ranked:
        raise ValueError(
            f"plan --search: nothing fits {topology.name}: {len(topology.devices)} devices of "
            f"{topology.chip.memory / memory.GIB:,.1f} GiB"
        )
    rows: list[Row] = []
    for *_, candidate in sorted(ranked)[:tries]:
        row = estimate.plan_row("train_step", candidate, topology, with_codegen=with_codegen)
        log(
            f"{row['layout']} {candidate['mesh']} batch {row['batch']} remat {row['remat']}: "
            f"{'fits' if row['fits'] else 'does not fit'}"
        )
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("tokens_per_s", -math.inf) * row["fits"])

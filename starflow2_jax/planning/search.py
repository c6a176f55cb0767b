"""Which batch, rematerialisation and mesh serve best: few are compiled, all are traced."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from starflow2_jax.mesh import make_mesh
from starflow2_jax.models.layers import REMAT
from starflow2_jax.planning import estimate, jaxpr, memory, options
from starflow2_jax.planning.topology import Topology
from starflow2_jax.training.tasks import registry

Row = dict[str, Any]
# Beside what the backward pass waits for: one layer's own work, gradients in flight.
MARGIN = 1.1


def candidates(
    cfg: Mapping[str, Any], topology: Topology, layouts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Configurations with half, once and twice the batch, every remat policy, and several meshes
    of each layout. The layout, mesh and batch as given come first.
    """
    count, batch = len(topology.devices), cfg["train"]["batch_size"]
    for layout in layouts:
        ways = [n for n in (2, 4, 8, 16) if count % n == 0 and n < count]
        shapes = {
            "tp": [f"data=-1,tensor={n}" for n in ways],
            "fsdp_tp": [f"fsdp=-1,tensor={n}" for n in ways],
            "hybrid": [f"data={n},fsdp=-1" for n in ways],
        }.get(layout, [])
        for mesh in dict.fromkeys([estimate.default_mesh(layout, topology, cfg["model"]), *shapes]):
            for rows in (batch, 2 * batch, batch // 2):
                for remat in REMAT if options.named(cfg["model"], "remat") else (None,):
                    new = {**cfg, "layout": layout, "mesh": mesh}
                    new["train"] = {**cfg["train"], "batch_size": rows}
                    new["model"] = options.changed(cfg["model"], remat=remat)
                    yield new


def search(
    cfg: Mapping[str, Any],
    topology: Topology,
    layouts: Sequence[str],
    tries: int,
    say: Callable[[str], None],
    whole: bool = False,
) -> list[Row]:
    """Rows of the candidates that were compiled, the best that fits first.

    Every candidate is traced. Those whose weights, optimizer and kept activations exceed the memory
    are left out; the others are compiled, `tries` of them, those of fewest FLOPs a token and fewest
    devices a weight first.

    Raises:
        ValueError: no candidate is left.
    """
    waiting, refused = [], 0
    for new in candidates(cfg, topology, layouts):
        try:
            mesh = make_mesh(new["mesh"], topology.devices)
            program = registry.build(new, mesh, dry_run=True)
        except ValueError:  # does not divide: not a candidate
            refused += 1
            continue
        with jax.set_mesh(mesh):
            traced = program.step.trace(
                program.abstract_state, program.abstract_frozen, program.abstract_batch
            )
        rows, parts = new["train"]["batch_size"], new["train"]["microbatches"]
        over = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
        held = sum(memory.declared(program).values())
        held += jaxpr.kept(traced.jaxpr, rows // parts, over)
        cut = mesh.shape["fsdp"] * mesh.shape["tensor"]
        if topology.chip.memory and held * MARGIN > topology.chip.memory:
            refused += 1
            continue
        waiting.append((jaxpr.flops(traced.jaxpr) / rows, cut, held, len(waiting), new))
    say(
        f"{len(waiting)} candidates may fit, {refused} cannot; compiling {min(tries, len(waiting))}"
    )
    if not waiting:
        raise ValueError(
            f"plan --search: nothing fits {topology.name}: {len(topology.devices)} devices of "
            f"{topology.chip.memory / memory.GIB:,.1f} GiB"
        )
    rows: list[Row] = []
    for *_, new in sorted(waiting)[:tries]:
        row = estimate.planned("train_step", new, topology, whole=whole)
        say(f"{row['layout']} {new['mesh']} batch {row['batch']} remat {row['remat']}: "
            f"{'fits' if row['fits'] else 'does not fit'}")  # fmt: skip
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("tokens_per_s", -math.inf) * row["fits"])

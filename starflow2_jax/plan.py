"""Plan an experiment for machines you do not have: compile its step ahead of time, per layout.

python -m starflow2_jax.plan --config experiments/starflow_t2i.py:3b --topology v5p:4x4x8 --layout all
python -m starflow2_jax.plan --config experiments/starflow_t2i.py:3b --topology v5e:16x16*2 --layout hybrid --mesh data=2,fsdp=256
python -m starflow2_jax.plan --config experiments/tarflow_pixels.py:in64 --topology v5e:4x4 --search --out plans/in64

The plan reports per chip: memory (declared weights and optimizer state, the compiler's total, and
remedies if it does not fit), FLOPs, bytes moved, and the bytes that each kind of collective sends
over each mesh axis. Step times are bounds from the chip's published figures: with full overlap, and
with none. TPU topologies need libtpu (pip install 'starflow2_jax[plan]') but no TPU; cpu and gpu
are the local devices.
"""  # noqa: E501

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from starflow2_jax import config
from starflow2_jax.mesh import LAYOUTS, make_mesh, parse_mesh
from starflow2_jax.runtime import atomic, cli


def define() -> None:
    """Define the flags of this command."""
    config_flags.DEFINE_config_file("config", None, "FILE.py[:variant] or starflow2:NAME[:variant]")
    flags.DEFINE_string("topology", None, "v5p:4x4x8, v5e:16x16*2 (slices), cpu, gpu:4")
    flags.DEFINE_string("layout", None, "sharding layout, a comma-separated list, or all; "
                                  "overrides the config")  # fmt: skip
    flags.DEFINE_string("mesh", None, "such as data=2,fsdp=64, for one layout; by default one "
                                "that suits the layout")  # fmt: skip
    flags.DEFINE_enum("what", "train", ("train", "generate"), "a step, or a batch of images")
    cli.define_integer("batch", None, "rows, by default train.batch_size; generate: one a "
                                  "device", 1, 100_000_000)  # fmt: skip
    flags.DEFINE_bool("search", False, "try batches, remat policies and meshes; best first")
    cli.define_integer("tries", 6, "search: programs compiled", 1, 10_000)
    flags.DEFINE_bool("whole", False, "generate machine code too, so that its size counts; "
                                      "takes minutes per layout")  # fmt: skip
    flags.DEFINE_string("out", None, "folder for plan.json, plan.md and plan.png")
    flags.DEFINE_bool("overwrite", False, "replace what --out names")
    flags.DEFINE_bool("json", False, "print the result as JSON")


def main(argv: list[str]) -> None:
    """Plan an experiment, print the table, and write it to --out."""
    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}")
    from starflow2_jax.training.workdir import pin_models

    if flags.FLAGS.config is None or flags.FLAGS.topology is None:
        raise ValueError("--config and --topology are needed")
    if not flags.FLAGS.topology.startswith("gpu"):
        # jax would wait for a TPU if libtpu is installed without one.
        jax.config.update("jax_platforms", "cpu")
    cfg = config.to_dict(flags.FLAGS.config)
    if flags.FLAGS.batch and flags.FLAGS.what == "train":
        cfg["train"]["batch_size"] = flags.FLAGS.batch
    config.check(cfg)
    cfg = pin_models(cfg, None)
    out = epath.Path(flags.FLAGS.out) if flags.FLAGS.out else None
    if out is not None and out.exists() and not flags.FLAGS.overwrite:
        raise FileExistsError(f"{out} exists already; --overwrite replaces it")
    layouts = _layouts(flags.FLAGS.layout or cfg["layout"])

    def make_result(rows):
        return result(cfg, rows, flags.FLAGS.topology, flags.FLAGS.what)

    def save(rows):
        if out is not None:
            write(out, make_result(rows))

    rows = plan(
        cfg,
        flags.FLAGS.topology,
        layouts,
        callback=save,
        mesh=flags.FLAGS.mesh,
        program=flags.FLAGS.what,
        batch=flags.FLAGS.batch,
        tries=flags.FLAGS.tries if flags.FLAGS.search else 0,
        with_codegen=flags.FLAGS.whole,
    )
    save(rows)
    planned = make_result(rows)
    print(json.dumps(planned, indent=2) if flags.FLAGS.json else "\n".join(table(planned)))


def _layouts(text: str) -> list[str]:
    names = list(LAYOUTS) if text == "all" else text.split(",")
    for name in names:
        if name not in LAYOUTS:
            hint = config.nearest(name, LAYOUTS)
            raise ValueError(f"--layout: {name!r} is not one of {', '.join(LAYOUTS)}{hint}")
    return names


def plan(
    cfg: dict[str, Any],
    topology: str,
    layouts: Sequence[str],
    *,
    mesh: str | None = None,
    program: str = "train",
    batch: int | None = None,
    tries: int = 0,
    with_codegen: bool = False,
    callback: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Return the rows of a plan, one per layout, or with `tries` those of a search.

    If there are several layouts, one that does not suit the model or the devices gets a row with
    the error. A layout may take minutes; `callback` gets the rows so far after each one.

    Args:
        mesh: Mesh of a single layout; by default one that suits it.
        program: `train` or `generate`.
        batch: Rows to generate; by default one per device.
        tries: Number of programs that a search compiles; 0 for no search.
    """
    from starflow2_jax.planning import estimate, search
    from starflow2_jax.planning.topology import find

    machine = find(topology)
    if mesh and len(layouts) > 1:
        raise ValueError("--mesh applies to a single --layout")
    if tries and program == "generate":
        raise ValueError("--search applies to training only")
    if tries:
        return search.search(cfg, machine, layouts, tries, _log, with_codegen)
    rows, step_flops = [], None
    for layout in layouts:
        shape = mesh or (cfg["mesh"] if len(layouts) == 1 and layout == cfg["layout"] else None)
        shape = shape or estimate.default_mesh(layout, machine, cfg["model"])
        layout_cfg = {**cfg, "layout": layout, "mesh": shape}
        start_time = time.perf_counter()
        try:
            name, argument = "train_step", step_flops
            if program == "generate":
                name, argument = "generate", batch or _batch_shards(layout_cfg, machine)
            row = estimate.plan_row(name, layout_cfg, machine, argument, with_codegen=with_codegen)
            step_flops = row["model_flops"]
        except ValueError as error:
            if len(layouts) == 1:
                raise
            row = {"layout": layout, "mesh": parse_mesh(layout_cfg["mesh"]), "error": str(error)}
        _log(f"{layout}: {time.perf_counter() - start_time:.0f} s")
        rows.append(row)
        callback(rows)
    return rows


def _batch_shards(cfg, machine):
    shape = make_mesh(cfg["mesh"], machine.devices).shape
    return shape["data"] * shape["fsdp"]


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def result(
    cfg: dict[str, Any], rows: list[dict[str, Any]], topology: str, program: str
) -> dict[str, Any]:
    """Return the contents of plan.json."""
    versions = {"jax": jax.__version__}
    try:
        import libtpu

        versions["libtpu"] = libtpu.__version__
    except ImportError:
        pass  # cpu and gpu need none
    title = f"{cfg['name'] or 'experiment'}, {program}, {topology}"
    return {"title": title, "versions": versions, "config": cfg, "rows": rows}


def table(plan_result: dict[str, Any]) -> list[str]:
    """Format a plan as lines of Markdown."""
    from starflow2_jax.planning import report

    return [plan_result["title"], "", *report.lines(plan_result["rows"])]


def write(out: epath.Path, plan_result: dict[str, Any]) -> None:
    """Write plan.json, plan.md and plan.png to a folder."""
    from starflow2_jax.planning import report

    chart = report.chart(plan_result["rows"], plan_result["title"])
    atomic.write_file(out / "plan.json", json.dumps(plan_result, indent=2))
    atomic.write_file(out / "plan.md", "\n".join(table(plan_result)) + "\n")
    atomic.write_file(out / "plan.png", chart)


if __name__ == "__main__":
    define()
    cli.run(main)

"""What an experiment costs on machines that are not here: compiled ahead of time, per layout.

python -m starflow2_jax.plan --config experiments/starflow_t2i.py:3b --topology v5p:4x4x8 --layout all
python -m starflow2_jax.plan --config experiments/starflow_t2i.py:3b --topology v5e:16x16*2 --layout hybrid --mesh data=2,fsdp=256
python -m starflow2_jax.plan --config experiments/tarflow_pixels.py:in64 --topology v5e:4x4 --search --out plans/in64

Per chip: memory (weights and optimizer as declared, the compiler's own account, whether it fits and
what would help), FLOPs, bytes moved, what each kind of collective sends over each mesh axis. Step
time is a bound from the maker's figures: everything overlaps, or nothing does. TPUs need libtpu
(pip install 'starflow2_jax[plan]') and no TPU; cpu and gpu stand for the devices at hand.
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
from starflow2_jax.runtime import cli


def define() -> None:
    """Defines the flags of this command."""
    config_flags.DEFINE_config_file("config", None, "FILE.py[:variant] or starflow2:NAME[:variant]")
    flags.DEFINE_string("topology", None, "v5p:4x4x8, v5e:16x16*2 (slices), cpu, gpu:4")
    flags.DEFINE_string("layout", None, "where weights live; several, or all; overrides the "
                                  "config")  # fmt: skip
    flags.DEFINE_string("mesh", None, "such as data=2,fsdp=64, for one layout; else what shows "
                                "the layout")  # fmt: skip
    flags.DEFINE_enum("what", "train", ("train", "generate"), "a step, or a batch of images")
    flags.DEFINE_integer("batch", None, "rows, by default train.batch_size; generate: one a "
                                  "device", 1)  # fmt: skip
    flags.DEFINE_bool("search", False, "try batches, remat policies and meshes; best first")
    flags.DEFINE_integer("tries", 6, "search: programs compiled", 1)
    flags.DEFINE_bool("whole", False, "compile to machine code too, as a TPU would: its size "
                                      "counts as well, minutes a layout")  # fmt: skip
    flags.DEFINE_string("out", None, "folder for plan.json, plan.md and plan.png")
    flags.DEFINE_bool("overwrite", False, "replace what --out names")
    flags.DEFINE_bool("json", False, "print the result as JSON")


def main(words: list[str]) -> None:
    """See the module's docstring."""
    if words:
        raise ValueError(f"unexpected argument {words[0]!r}")
    if flags.FLAGS.config is None or flags.FLAGS.topology is None:
        raise ValueError("--config and --topology are needed")
    if not flags.FLAGS.topology.startswith("gpu"):
        # Before any device is asked for: a libtpu without a TPU would be waited for.
        jax.config.update("jax_platforms", "cpu")
    cfg = config.to_dict(flags.FLAGS.config)
    if flags.FLAGS.batch and flags.FLAGS.what == "train":
        cfg["train"]["batch_size"] = flags.FLAGS.batch
    config.check(cfg)
    out = epath.Path(flags.FLAGS.out) if flags.FLAGS.out else None
    if out is not None and out.exists() and not flags.FLAGS.overwrite:
        raise FileExistsError(f"{out} is there already; --overwrite replaces it")
    layouts = _layouts(flags.FLAGS.layout or cfg["layout"])
    told = lambda rows: result(cfg, rows, flags.FLAGS.topology, flags.FLAGS.what)
    keep = lambda rows: write(out, told(rows)) if out is not None else None
    rows = plan(
        cfg,
        flags.FLAGS.topology,
        layouts,
        after=keep,
        mesh=flags.FLAGS.mesh,
        what=flags.FLAGS.what,
        batch=flags.FLAGS.batch,
        tries=flags.FLAGS.tries if flags.FLAGS.search else 0,
        whole=flags.FLAGS.whole,
    )
    keep(rows)
    print(json.dumps(told(rows), indent=2) if flags.FLAGS.json else "\n".join(table(told(rows))))


def _layouts(text: str) -> list[str]:
    names = list(LAYOUTS) if text == "all" else text.split(",")
    for name in names:
        if name not in LAYOUTS:
            near = config.nearest(name, LAYOUTS)
            raise ValueError(f"--layout: {name!r} is not one of {', '.join(LAYOUTS)}{near}")
    return names


def plan(
    cfg: dict[str, Any],
    topology: str,
    layouts: Sequence[str],
    *,
    mesh: str | None = None,
    what: str = "train",
    batch: int | None = None,
    tries: int = 0,
    whole: bool = False,
    after: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Rows of a plan, one a layout, or with `tries` those of a search.

    `after` is called with the rows so far after each layout, which may take minutes. `whole`:
    compile to machine code too.

    Of several layouts, one that does not suit the model or the devices gives a row that says why.

    Raises:
        ValueError: a topology that does not exist, a mesh of another number of devices, a batch
            that does not divide, a layout that does not suit the model. RuntimeError: no libtpu.
    """
    from starflow2_jax.planning import estimate, search, topology as topologies

    machine = topologies.find(topology)
    if mesh and len(layouts) > 1:
        raise ValueError("--mesh: one mesh is for one layout")
    if tries and what == "generate":
        raise ValueError("--search is for training")
    if tries:
        return search.search(cfg, machine, layouts, tries, _say, whole)
    rows, own = [], None
    for layout in layouts:
        shape = mesh or (cfg["mesh"] if len(layouts) == 1 and layout == cfg["layout"] else None)
        shape = shape or estimate.default_mesh(layout, machine, cfg["model"])
        now = {**cfg, "layout": layout, "mesh": shape}
        began = time.perf_counter()
        try:
            name, given = "train_step", own
            if what == "generate":
                name, given = "generate", batch or _ways(now, machine)
            row = estimate.planned(name, now, machine, given, whole=whole)
            own = row["model_flops"]
        except ValueError as error:
            if len(layouts) == 1:
                raise
            row = {"layout": layout, "mesh": parse_mesh(now["mesh"]), "error": str(error)}
        _say(f"{layout}: {time.perf_counter() - began:.0f} s")
        rows.append(row)
        after(rows)
    return rows


def _ways(cfg, machine):
    shape = make_mesh(cfg["mesh"], machine.devices).shape
    return shape["data"] * shape["fsdp"]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def result(
    cfg: dict[str, Any], rows: list[dict[str, Any]], topology: str, what: str
) -> dict[str, Any]:
    """All there is to know of a plan, as written to plan.json."""
    versions = {"jax": jax.__version__}
    try:
        import libtpu

        versions["libtpu"] = libtpu.__version__
    except ImportError:
        pass  # cpu and gpu do without
    title = f"{cfg['name'] or 'experiment'}, {what}, {topology}"
    return {"title": title, "versions": versions, "config": cfg, "rows": rows}


def table(told: dict[str, Any]) -> list[str]:
    """Lines for people."""
    from starflow2_jax.planning import report

    return [told["title"], "", *report.lines(told["rows"])]


def write(out: epath.Path, told: dict[str, Any]) -> None:
    """plan.json, plan.md and plan.png in a folder."""
    from starflow2_jax.planning import report

    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(told, indent=2))
    (out / "plan.md").write_text("\n".join(table(told)) + "\n")
    (out / "plan.png").write_bytes(report.picture(told["rows"], told["title"]))


if __name__ == "__main__":
    define()
    cli.run(main)

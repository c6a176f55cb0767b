"""Measures trained models, and writes the report of a run.

python -m starflow2_jax.evaluate likelihood --model runs/cifar --data data/cifar_test
python -m starflow2_jax.evaluate likelihood --model runs/cifar --fit data/cifar_train --rows 1000
python -m starflow2_jax.evaluate likelihood --model runs/latents --data data/shapes64_test --fae runs/fae
python -m starflow2_jax.evaluate codec --model runs/fae_pixels --data data/shapes64_test --out codec.json
python -m starflow2_jax.evaluate report --workdir runs/cifar
python -m starflow2_jax.evaluate all --model runs/stage3 --n 16 --out evaluation/
"""  # noqa: E501

import functools
import hashlib
import itertools
import json
import time
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from starflow2_jax.checkpoints import digest, model_folder, steps
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.config import nearest
from starflow2_jax.data import image_batches, manifest, records
from starflow2_jax.data.options import image_batch_options
from starflow2_jax.evaluation import (
    codec as codec_eval,
    interleaved_likelihood,
    likelihood,
    vqa,
)
from starflow2_jax.evaluation.report import run_report
from starflow2_jax.evaluation.shapes import cases, contact_sheets, report, suite
from starflow2_jax.inference import (
    flow_sampler as models,
    load,
    options as options_lib,
    vlm as readers,
)
from starflow2_jax.latents import batch_encoder, codec as codecs
from starflow2_jax.mesh import check_batch, host_rows, make_mesh
from starflow2_jax.runtime import allocator, cli
from starflow2_jax.training.logging import image_grid, run_log
from starflow2_jax.training.tasks import vlm

VERBS = {
    "likelihood": "exact nats/dim, and bits/dim where they are defined (--model --data)",
    "understanding": "answers of a model that reads (--model --data --blind)",
    "codec": "PSNR of a latent codec's images, and a probe of its latents (--model --data --fit)",
    "shapes": "tasks of the shapes world put to a STARFlow2 (--model --n or --data, --only)",
    "all": "shapes with a page and sheets of pictures (--model --n or --data, --out FOLDER)",
    "report": "report.html of a run (--workdir)",
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("model", None, "workdir, step folder or model folder", flag_values=values)
    text("workdir", None, "report: the run's folder", flag_values=values)
    text("data", None, "dataset folder (default: that of the run's eval_data); shapes, all: some, "
         "with commas (default: drawn from the seed)", flag_values=values)  # fmt: skip
    text("vlm", None, "folder of the VLM, where the run's is elsewhere", flag_values=values)
    text("fae", None, "folder of the codec, where the run's is elsewhere", flag_values=values)
    number("n", None, "shapes, all: cases of each tag, and half as many withheld (32; all of "
           "--data)", 1, flag_values=values)  # fmt: skip
    flags.DEFINE_list("only", [], f"shapes, all: some of {', '.join(suite.SECTIONS)}",
                      flag_values=values)  # fmt: skip
    of_pictures = "shapes, all: %s of pictures; the run's own by default"
    flags.DEFINE_float("guidance", None, of_pictures % "guidance", 0, flag_values=values)
    flags.DEFINE_float("image_temperature", None, of_pictures % "factor on the noise", 1e-3,
                       flag_values=values)  # fmt: skip
    text("latents", None, "folder of latents parallel to --data", flag_values=values)
    text("features", None, "folder of text features parallel to --data", flag_values=values)
    text("blind", None, "understanding, shapes, all: a VLM that never saw", flag_values=values)
    text("fit", None, "training dataset: of the Gaussian baseline or the probe", flag_values=values)
    text("fit_latents", None, "folder of latents parallel to --fit", flag_values=values)
    number("rows", None, "first rows of --data that are measured (all)", 1, flag_values=values)
    number("batch_size", None, "rows at a time (that of the run)", 1, flag_values=values)
    flags.DEFINE_float("sigma", 0.3, "codec: noise on unit-variance latents", 0, flag_values=values)
    flags.DEFINE_enum("resize", "none", ("none", "center_crop"), "codec: what to do with images of "
                      "another size than the codec's", flag_values=values)  # fmt: skip
    number("seed", 0, "of noise, and of what is drawn", 0, flag_values=values)
    number("pictures", 16, "codec: images in the grid beside --out", 1, flag_values=values)
    text("layout", "dp", "where weights live", flag_values=values)
    text("mesh", "data=-1", "devices along each mesh axis", flag_values=values)
    text("out", None, "JSON to write, of `all` a folder (of a run by default: in its evaluation/)",
         flag_values=values)  # fmt: skip
    switch("overwrite", False, "replace what --out names", flag_values=values)
    switch("json", False, "print the result as JSON", flag_values=values)


def main(verb: str, words: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs one verb and prints its result.

    Raises:
        ValueError, OSError: bad input; nothing was written over.
    """
    if words:
        raise ValueError(f"{verb}: unexpected argument {words[0]!r}")
    verbs = {
        "likelihood": _likelihood,
        "understanding": _understanding,
        "codec": _codec,
        "shapes": _shapes,
        "all": functools.partial(_shapes, everything=True),
        "report": _report,
    }
    result, lines = verbs[verb](values)
    if jax.process_index() == 0:
        print(json.dumps(result, indent=2) if values.json else "\n".join(lines))


def _report(values: flags.FlagValues) -> tuple[dict[str, Any], list[str]]:
    if not values.workdir:
        raise ValueError("report: --workdir is needed")
    path = run_report.write(values.workdir)
    return {"report": str(path)}, [str(path)]


def _likelihood(values: flags.FlagValues) -> tuple[dict[str, Any], list[str]]:
    if not values.model:
        raise ValueError("likelihood: --model is needed")
    task = open_model(values.model).task
    if task == load.TASK:
        return _rows_likelihood(values)
    if task != "flow":
        raise ValueError(
            f"likelihood: {values.model}: task={task!r}, expected a flow or task={load.TASK!r}"
        )
    mesh = make_mesh(values.mesh)
    source = _source(values.model)
    model = models.load_flow(values.model, mesh, values.layout)
    options, codec = _options(model, values)
    about = batch_encoder.describe(image_batches.describe(options), codec, "--data")
    _check_encoder(model, about)
    out = _out(values, source, "likelihood", options["path"] or "mixture")
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = values.batch_size or -(-model.cfg["evaluate"]["batch_size"] // ways) * ways
    check_batch(size, mesh, "--batch_size")
    began = time.time()
    mine = host_rows(size, mesh)
    batches = image_batches.eval_batches(options, batch_size=size, rows=mine)
    batches = batch_encoder.encoded(likelihood.limit(batches, values.rows, size), codec)
    nats, parts = likelihood.per_image(model, batches, mesh)
    figures = likelihood.summarise(nats, model.cfg)
    result = {
        "model": source,
        "data": {
            "path": str(options["path"]),
            "fingerprints": about["fingerprints"],
            "features": about["features"],
            "records": about["records"],
            "rows": len(nats),
            "skipped": min(values.rows or about["records"], about["records"]) - len(nats),
        },
        **figures,
        "parts": parts,
        "baselines": _baselines(model, options, codec, values, size),
        "protocol": likelihood.protocol(model.cfg, model.model_config),
        "seconds": round(time.time() - began, 1),
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    if out is not None and jax.process_index() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result, [*likelihood.lines(result), *([f"written    {out}"] if out else [])]


def _starflow2(values: flags.FlagValues) -> Any:
    """The STARFlow2 of --model, on one device unless a mesh is given."""
    mesh = make_mesh(values.mesh) if values["mesh"].present else None
    where = {"vlm": values.vlm or "", "fae": values.fae or ""}
    return load.load_starflow2(values.model, mesh, values.layout, **where)


def _rows_likelihood(values: flags.FlagValues) -> tuple[dict[str, Any], list[str]]:
    """Of a STARFlow2: nats of the images and the text of a dataset's records."""
    if not values.data:
        raise ValueError("likelihood: --data is needed: a dataset folder of interleaved records")
    source = _source(values.model)
    out = _out(values, source, "rows_likelihood", values.data)
    began, seed = time.time(), values["seed"].value
    model = _starflow2(values)
    given = list(itertools.islice(records.read(values.data), values.rows))
    options = {"size": min(values.batch_size or 32, len(given)), "seed": seed}
    found = interleaved_likelihood.of_records(model, given, **options)
    result = {
        "model": source,
        "data": {"path": values.data, "fingerprint": _fingerprint(values.data)},
        "sections": {"likelihood": {"records": {"all": found}}},
        "not_run": {},
        "options": options,
        "protocol": {"likelihood": interleaved_likelihood.PROTOCOL},
        "seconds": round(time.time() - began, 1),
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    lines = report.lines(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
        lines += [f"written    {out}"]
    return result, lines


def _options(
    model: models.FlowModel, values: flags.FlagValues
) -> tuple[dict[str, Any], codecs.Codec | None]:
    """Where the data are: the run's `eval_data`, or --data and the folders parallel to it; and the
    codec that encodes their images, where there are no stored latents."""
    changes: dict[str, Any] = {}
    if values.data:
        text = "none"
        if model.model_config.text_channels:
            text = "bytes" if model.cfg["text"]["vocabulary"] else "features"
        changes = {"path": values.data, "mixture": (), "latents": "", "features": ""}
        changes |= {"labels": bool(model.model_config.classes), "text": text}
    given = {"latents": values.latents, "features": values.features}
    changes |= {name: value for name, value in given.items() if value}
    options = image_batch_options(model.cfg, model.model_config, **changes)
    if not options["path"] and not options["mixture"]:
        raise ValueError("likelihood: --data is needed: the run has no eval_data.path")
    stored = [options["latents"], *(entry.get("latents") for entry in options["mixture"])]
    path = values.fae or ("" if any(stored) else model.cfg["fae"]["path"])
    if not options["pixels"] and not any(stored) and not path:
        raise ValueError("likelihood: --latents or --fae is needed: the model reads latents")
    cfg = {**model.cfg, "fae": {**model.cfg["fae"], "path": path}}
    codec = batch_encoder.open(cfg, model.model_config)
    return batch_encoder.options(options, codec), codec


def _check_encoder(model: models.FlowModel, about: dict[str, Any]) -> None:
    """Refuses latents of another encoder than the flow was trained on, where that is known."""
    known = model.frozen.get("fae", "").split()
    for row in about["features"]:
        if known and "fae" in row and row["fae"]["sha256"] not in known:
            raise ValueError(
                f"likelihood: the data are latents of the encoder {row['fae']['sha256'][:12]}, the "
                f"flow was trained on those of {', '.join(name[:12] for name in known)}"
            )


def _baselines(
    model: models.FlowModel,
    options: dict[str, Any],
    codec: codecs.Codec | None,
    values: flags.FlagValues,
    size: int,
) -> dict[str, Any]:
    if not values.fit:
        return {}
    plain = {"labels": False, "text": "none", "features": ""}
    fit = {**options, **plain, "path": values.fit, "latents": values.fit_latents or ""}
    if not fit["pixels"] and not fit["latents"]:
        raise ValueError("likelihood: --fit_latents or --fae is needed: the model reads latents")
    # Every host reads all of it: a Gaussian is cheap.
    measured = image_batches.eval_batches({**options, **plain}, batch_size=size)
    nats = likelihood.gaussian_baseline(
        batch_encoder.encoded(image_batches.eval_batches(fit, batch_size=size), codec),
        batch_encoder.encoded(likelihood.limit(measured, values.rows, size), codec),
        model.cfg,
    )
    bits = None
    if not likelihood.not_comparable(model.cfg):
        bits = likelihood.bits_per_dim(nats)
    about = {"fit": values.fit, "fingerprints": image_batches.describe(fit)["fingerprints"]}
    return {"gaussian_per_dimension": {"nats_per_dim": nats, "bits_per_dim": bits, **about}}


def _source(path: str) -> dict[str, Any]:
    """Path, step and digest of what is measured: the sha256 of its list of file digests."""
    if model_folder.is_folder(model_folder.locate(path)):
        listed, step, where = (
            epath.Path(model_folder.locate(path)) / model_folder.DIGEST_FILE,
            None,
            path,
        )
    else:
        workdir, step = steps.locate(path)
        entry = steps.find(workdir, step)
        listed, step, where = entry.path / digest.SIDECAR, entry.step, str(workdir)
    sha256 = hashlib.sha256(listed.read_bytes()).hexdigest() if listed.exists() else None
    return {"path": where, "step": step, "weights": "averaged", "sha256": sha256}


def _understanding(values: flags.FlagValues) -> tuple[dict[str, Any], list[str]]:
    if not values.model or not values.data:
        raise ValueError("understanding: --model and --data are needed")
    source = _source(values.model)
    out = _out(values, source, "understanding", values.data)
    began = time.time()

    def answers(path, **changes):
        reader = readers.load(path)
        own = {"path": values.data, "mixture": (), "tokenizer": reader.tokenizer_folder, **changes}
        options = vlm.data_options(reader.cfg, reader.model_config, **own)
        return vqa.answers(functools.partial(readers.score, reader), options)

    told = answers(values.model)
    baselines = {"blank_pictures": vqa.summarise(answers(values.model, blank=True))}
    if values.blind:
        baselines["blind_model"] = vqa.summarise(answers(values.blind))
    result = {
        "model": source,
        "data": {"path": values.data, "fingerprint": _fingerprint(values.data)},
        "kinds": vqa.summarise(told),
        "by_withheld": vqa.by_withheld(told),
        "baselines": baselines,
        "protocol": vqa.PROTOCOL,
        "seconds": round(time.time() - began, 1),
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result, [*vqa.lines(result), *([f"written    {out}"] if out else [])]


def _codec(values: flags.FlagValues) -> tuple[dict[str, Any], list[str]]:
    if not values.model or not values.data:
        raise ValueError("codec: --model and --data are needed")
    source = _source(values.model)
    codec = codecs.load(values.model)
    out = _out(values, source, "codec", values.data)
    grid = out.with_suffix(".png") if out else None
    if out and out.suffix != ".json":
        raise ValueError(f"--out {out}: expected a name that ends in .json")
    if grid and grid.exists() and not values.overwrite:
        raise FileExistsError(f"{grid} is there already; --overwrite replaces it")
    seed = values["seed"].value
    began = time.time()
    given = {"rows": values.rows, "resize": values.resize}
    keep = values.pictures if out else 0
    options = {"sigma": values.sigma, "seed": seed, "keep": keep}
    figures, shown = codec_eval.fidelity(codec, values.data, **given, **options)
    read = codec_eval.probe(codec, values.fit, values.data, **given) if values.fit else None
    result = {
        "model": {**source, "encoder": codec.sha256},
        "data": {"path": values.data, "fingerprint": _fingerprint(values.data)},
        **figures,
        "probe": read,
        "protocol": codec_eval.protocol(codec, values.sigma, seed, values.resize),
        "seconds": round(time.time() - began, 1),
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    if read:
        fitted = {"path": values.fit, "fingerprint": _fingerprint(values.fit)}
        result["probe"] = {"fit": fitted, **read}
    lines = codec_eval.lines(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
        image_grid.save_grid(grid, shown, columns=12)
        lines += [f"written    {out}, {grid}"]
    return result, lines


def _shapes(values: flags.FlagValues, everything: bool = False) -> tuple[dict[str, Any], list[str]]:
    """`shapes`, and with its page and sheets `all`."""
    verb = "all" if everything else "shapes"
    if not values.model:
        raise ValueError(f"{verb}: --model is needed")
    only = tuple(values.only) or suite.SECTIONS
    for name in only:
        if name not in suite.SECTIONS:
            known = f"{nearest(name, suite.SECTIONS)}; sections: {', '.join(suite.SECTIONS)}"
            raise ValueError(f"--only: unknown section {name!r}{known}")
    source = _source(values.model)
    folders = values.data.split(",") if values.data else []
    name = "-".join(epath.Path(folder).name for folder in folders) or "drawn"
    out = _out(values, source, verb, name, "" if everything else ".json")
    if everything and out is None:
        raise ValueError("all: --out is needed: a folder for the page and the sheets")
    began, seed = time.time(), values["seed"].value
    model = _starflow2(values)
    pixels = model.codec.model.pixels if model.codec else model.cfg["image"]["pixels"] or 64
    if folders:
        given = cases.read(folders, n=values.n)
    else:
        asked = list(cases.TAGS)
        if "likelihood" not in only:
            asked = [suite.TASKS[section] for section in only]
        given = cases.drawn(seed, values.n or 32, pixels, asked)
    given_by_flag = {name: values[name].value for name in ("guidance", "image_temperature")}
    drawing = options_lib.sampling_defaults(model.cfg["sample"], **given_by_flag)
    options = {"rows": values.batch_size or 96, "seed": seed, **drawing}
    beside, without = suite.readers(model, pixels, values.blind)
    result, samples = suite.run(
        given,
        suite.asker(model, given, **options),
        only=only,
        not_run=suite.unable(model),
        model=model,
        beside=beside,
        keeps=suite.through(model, seed) if model.codec else None,
        seed=seed,
        say=lambda section: logging.info("%s ...", section),
    )
    result = {
        "model": source,
        "data": {"path": values.data or f"drawn from seed {seed}"}
        | {"fingerprints": [_fingerprint(folder) for folder in folders]},
        "options": options,
        **result,
        "not_run": {**result["not_run"], **without},
        "samples": {name: [*map(report.told, rows)] for name, rows in samples.items()},
        "seconds": round(time.time() - began, 1),
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    lines = report.lines(result)
    if everything:
        out.mkdir(parents=True, exist_ok=True)
        shown = contact_sheets.make(samples, seed)
        for name, sheet in shown.items():
            (out / f"{name}.png").write_bytes(image_grid.png(sheet))
        report.write(out / "report.html", result, shown)
        lines += [f"written    {out}: report.html, shapes.json, {len(shown)} sheets"]
        out = out / "shapes.json"
    elif out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines += [f"written    {out}"]
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result, lines


def _fingerprint(path: str) -> str:
    return manifest.fingerprint(manifest.load(path))


def _out(
    values: flags.FlagValues, source: dict[str, Any], what: str, data: str, end: str = ".json"
) -> epath.Path | None:
    """Where the result goes; refused here, before anything is computed, if it may not."""
    out = values.out
    if not out and source["step"] is not None:
        name = f"{what}_{source['step']:08d}_{epath.Path(data).name}{end}"
        out = epath.Path(source["path"]) / "evaluation" / name
    if out and epath.Path(out).exists() and not values.overwrite:
        raise FileExistsError(f"{out} is there already; --overwrite replaces it")
    return epath.Path(out) if out else None


if __name__ == "__main__":
    define(flags.FLAGS)
    allocator.keep_freed_memory()
    cli.run(main, VERBS)

"""Measure trained models, and write the report of a run.

python -m starflow2_jax.evaluate likelihood --model runs/cifar --data data/cifar_test
python -m starflow2_jax.evaluate likelihood --model runs/cifar --fit data/cifar_train --rows 1000
python -m starflow2_jax.evaluate likelihood --model runs/latents --data data/shapes64_test --fae runs/fae
python -m starflow2_jax.evaluate codec --model runs/fae_pixels --data data/shapes64_test --out codec.json
python -m starflow2_jax.evaluate images --model runs/cifar --data data/cifar_test --inception weights.pth --out images.json
python -m starflow2_jax.evaluate judge --bench wise --tree tree --prompts data.json --official WISE --judge http://127.0.0.1:8000/v1 --out scores
python -m starflow2_jax.evaluate report --workdir runs/cifar
python -m starflow2_jax.evaluate all --model runs/stage3 --n 16 --out evaluation/
python -m starflow2_jax.evaluate compare evaluation/ other_evaluation/
python -m starflow2_jax.evaluate showcase --model pretrained/starflow2_tiny --out examples/
"""  # noqa: E501

import functools
import itertools
import json
from typing import Any

import jax
from absl import flags

from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.config import checks
from starflow2_jax.data import image_batches, records
from starflow2_jax.data.options import image_batch_options
from starflow2_jax.evaluation import (
    codec as codec_evaluation,
    interleaved_likelihood,
    likelihood,
    result_files,
    vqa,
)
from starflow2_jax.evaluation.command_flags import (
    Output,
    describe_data,
    load_starflow2,
    open_result,
    require,
)
from starflow2_jax.evaluation.harnesses import questions
from starflow2_jax.evaluation.image_metrics import command as images_command
from starflow2_jax.evaluation.judges import command as judges_command
from starflow2_jax.evaluation.report import run_report
from starflow2_jax.evaluation.shapes import codec_ceiling, command, suite, summary
from starflow2_jax.inference import load, output, vlm
from starflow2_jax.inference.flow_sampler import FlowModel, load_flow
from starflow2_jax.latents import batch_encoder, codec as latent_codec
from starflow2_jax.latents.codec import Codec
from starflow2_jax.mesh import check_batch, host_rows, make_mesh
from starflow2_jax.runtime import allocator, cli, memory
from starflow2_jax.training import preprocess
from starflow2_jax.training.logging import image_grid
from starflow2_jax.training.tasks import vlm as vlm_task

VERBS = {
    "likelihood": "exact nats/dim, and bits/dim where they are defined (--model --data)",
    "understanding": "question answering of a VLM or STARFlow2 (--model --data --blind)",
    "codec": "PSNR of a latent codec's images, a probe of its latents, and the accuracy of the "
    "shapes suite on reconstructed images (--model --data --fit --n)",
    "shapes": "the shapes suite for a STARFlow2 (--model --n or --data, --only)",
    "all": "shapes, with a page and contact sheets (--model --n or --data, --out FOLDER)",
    "showcase": "a page of pictures that a STARFlow2 draws, edits, answers and reasons about, with "
    "verdicts (--model --out FOLDER)",
    "compare": "paired differences of two models or results: compare A B (the flags of shapes)",
    "images": "Fréchet distance, precision, recall and CLIP score against a dataset's images, and "
    "ADM's .npz (--model or --images, --data --inception --clip --out)",
    "judge": "scores of a benchmark's tree by a judge behind an OpenAI-compatible address (--bench "
    "--tree --prompts --official --judge --out)",
    "report": "report.html of a run (--workdir)",
}


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(cli.define_integer, flag_values=values)
    real = functools.partial(cli.define_number, flag_values=values)
    switch = functools.partial(flags.DEFINE_boolean, flag_values=values)
    text("model", None, "workdir, step folder, model folder or hf://user/name")
    text("workdir", None, "report: the run's folder")
    text("data", None, "dataset folder (default: the run's eval_data); shapes, all: one or more "
         "folders, separated by commas (default: cases generated from the seed)")  # fmt: skip
    text("vlm", None, "folder of the VLM, if it is not where the run's configuration says")
    text("fae", None, "folder of the codec, if it is not where the run's configuration says")
    integer("n", None, "shapes, all, codec: cases of each tag, and half as many held-out ones (32; "
            "all of --data; codec: none); showcase: cases of each tag", 1, 1_000_000)  # fmt: skip
    flags.DEFINE_list("only", [], f"shapes, all, showcase: some of {', '.join(suite.SECTIONS)}",
                      flag_values=values)  # fmt: skip
    switch("balance_answers", False, "shapes, all: each answer of counting questions as often")
    text("note", None, "all, showcase: a sentence for the page, about the model or its data")
    real("guidance", None, "shapes suite, images: guidance weight; the run's by default", 0)
    real("image_temperature", None, "shapes suite, images: scale of the noise; the run's by "
         "default", 1e-3)  # fmt: skip
    text("latents", None, "folder of latents parallel to --data")
    text("features", None, "folder of text features parallel to --data")
    text("blind", None, "understanding, shapes, all: a VLM trained without images, as baseline")
    text("fit", None, "training dataset, for the Gaussian baseline or the probe")
    text("fit_latents", None, "folder of latents parallel to --fit")
    integer("rows", None, "number of rows to measure, from the start of --data (all)", 1)
    integer("batch_size", None, "rows of a batch (the run's)", 1)
    real("sigma", 0.3, "codec: noise on unit-variance latents", 0)
    flags.DEFINE_enum("resize", "none", ("none", "center_crop"), "codec: how to treat images whose "
                      "size is not the codec's", flag_values=values)  # fmt: skip
    integer("seed", 0, "seed of noise and of generated cases", 0, checks.MAX_SEED)
    integer("pictures", 16, "codec: images in the grid next to --out", 1, 10_000)
    text("images", None, "images: measure these in place of a model's: .npz of ADM, or a folder")
    text("inception", None, "images: weights of FID's Inception v3, as torch-fidelity stores them")
    text("clip", None, "images: folder of a CLIP in Hugging Face's format")
    judges_command.define(values)
    text("layout", "dp", "sharding layout of the weights")
    text("mesh", "data=-1", "devices along each mesh axis")
    text("out", None, "JSON file to write; all, showcase: folder to write (default for a run: in "
         "its evaluation/)")  # fmt: skip
    switch("overwrite", False, "replace what --out names")
    switch("json", False, "print the result as JSON")


def main(verb: str, argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Run one verb and print its result."""
    if argv and verb != "compare":
        raise ValueError(f"{verb}: unexpected argument {argv[0]!r}")
    verbs = {
        "likelihood": evaluate_likelihood,
        "understanding": evaluate_vlm,
        "codec": evaluate_codec,
        "shapes": command.evaluate_shapes,
        "all": functools.partial(command.evaluate_shapes, with_page=True),
        "showcase": command.show_examples,
        "compare": functools.partial(command.compare_results, paths=argv),
        "images": images_command.evaluate_images,
        "judge": judges_command.evaluate_judge,
        "report": write_report,
    }
    try:
        result, lines = verbs[verb](values)
    except result_files.CompleteResult as complete:
        result, lines = complete.result, [str(complete)]
    if jax.process_index() == 0:
        print(json.dumps(result, indent=2) if values.json else "\n".join(lines))


def write_report(values: flags.FlagValues) -> Output:
    """Write the report of a run."""
    require(values, "report", "workdir")
    path = run_report.write(values.workdir)
    return {"report": str(path)}, [str(path)]


def evaluate_likelihood(values: flags.FlagValues) -> Output:
    """Measure the exact likelihood of a dataset under a flow, or of records under a STARFlow2."""
    require(values, "likelihood", "model")
    task = open_model(values.model).task
    if task == load.TASK:
        return _record_likelihood(values)
    if task != "flow":
        raise ValueError(
            f"likelihood: {values.model}: task={task!r}, expected a flow or task={load.TASK!r}"
        )
    device_mesh = make_mesh(values.mesh)
    model = load_flow(values.model, device_mesh, values.layout)
    options, codec = _flow_data_options(model, values)
    data = batch_encoder.describe(image_batches.describe(options), codec, "--data")
    _check_encoder(model, data)
    _check_classes(model, data)
    file = open_result(values, "likelihood", options["path"] or "mixture")
    num_shards = device_mesh.shape["data"] * device_mesh.shape["fsdp"]
    default_size = -(-model.cfg["evaluate"]["batch_size"] // num_shards) * num_shards
    batch_size = values.batch_size or default_size
    check_batch(batch_size, device_mesh, "--batch_size")
    rows = preprocess.abstract_batch(model.cfg, model.model_config, batch_size)
    size = {"a batch": memory.nbytes(rows.values())}
    memory.check(f"--batch_size={batch_size}", size, memory.capacity())
    batches = image_batches.eval_batches(
        options, batch_size=batch_size, rows=host_rows(batch_size, device_mesh)
    )
    batches = batch_encoder.encoded(likelihood.limit(batches, values.rows, batch_size), codec)
    nll, parts = likelihood.per_image(model, batches, device_mesh)
    result = {
        "data": {
            "path": str(options["path"]),
            "fingerprints": data["fingerprints"],
            "features": data["features"],
            "records": data["records"],
            "rows": len(nll),
            "skipped": min(values.rows or data["records"], data["records"]) - len(nll),
        },
        **likelihood.summarize(nll, model.cfg),
        "parts": parts,
        "baselines": _gaussian_baseline(model, options, codec, values, batch_size),
        "protocol": likelihood.protocol(model.cfg, model.model_config),
    }
    result, written = file.write(result)
    return result, [*likelihood.summary_lines(result), *written]


def _flow_data_options(
    model: FlowModel, values: flags.FlagValues
) -> tuple[dict[str, Any], Codec | None]:
    """Return the options of the data, and the codec of its images if no latents are stored."""
    changes: dict[str, Any] = {}
    if values.data:
        text = "none"
        if model.model_config.text_channels:
            text = "bytes" if model.cfg["text"]["vocabulary"] else "features"
        changes = {"path": values.data, "mixture": (), "latents": "", "features": ""}
        changes |= {"labels": bool(model.model_config.classes), "text": text}
    folders = {"latents": values.latents, "features": values.features}
    changes |= {name: folder for name, folder in folders.items() if folder}
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


def _check_encoder(model: FlowModel, data: dict[str, Any]) -> None:
    """Raise ValueError for latents of an encoder that the flow was not trained on, if recorded."""
    expected = model.frozen.get("fae", "").split()
    for row in data["features"]:
        if expected and "fae" in row and row["fae"]["sha256"] not in expected:
            raise ValueError(
                f"likelihood: the data are latents of the encoder {row['fae']['sha256'][:12]}, but "
                f"the flow was trained on those of {', '.join(name[:12] for name in expected)}"
            )


def _check_classes(model: FlowModel, data: dict[str, Any]) -> None:
    """Raise ValueError if the data number other classes than the model was trained on."""
    classes, expected = tuple(data["classes"] or ()), tuple(model.classes)
    if model.model_config.classes and expected and classes != expected:
        differing = sorted(set(classes) ^ set(expected)) or ["their order"]
        raise ValueError(
            f"likelihood: the {len(classes)} classes of the data are not the {len(expected)} of "
            f"the model, so their numbers differ: {', '.join(differing[:8])}"
        )


def _gaussian_baseline(
    model: FlowModel,
    options: dict[str, Any],
    codec: Codec | None,
    values: flags.FlagValues,
    batch_size: int,
) -> dict[str, Any]:
    """Return the metrics of a Gaussian per dimension fitted to --fit; empty without that flag."""
    if not values.fit:
        return {}
    image_options = {**options, "labels": False, "text": "none", "features": ""}
    fit = {**image_options, "path": values.fit, "latents": values.fit_latents or ""}
    if not fit["pixels"] and not fit["latents"]:
        raise ValueError("likelihood: --fit_latents or --fae is needed: the model reads latents")
    # Every host reads all of the data, since a Gaussian is cheap.
    fit_batches = image_batches.eval_batches(fit, batch_size=batch_size)
    batches = image_batches.eval_batches(image_options, batch_size=batch_size)
    nats = likelihood.gaussian_baseline(
        batch_encoder.encoded(fit_batches, codec),
        batch_encoder.encoded(likelihood.limit(batches, values.rows, batch_size), codec),
        model.cfg,
    )
    comparable = not likelihood.not_comparable(model.cfg)
    metrics = {
        "nats_per_dim": nats,
        "bits_per_dim": likelihood.bits_per_dim(nats) if comparable else None,
        "fit": values.fit,
        "fingerprints": image_batches.describe(fit)["fingerprints"],
    }
    return {"gaussian_per_dimension": metrics}


def _record_likelihood(values: flags.FlagValues) -> Output:
    if not values.data:
        raise ValueError("likelihood: --data is needed: a dataset folder of interleaved records")
    file, seed = open_result(values, "rows_likelihood", values.data), values["seed"].value
    model = load_starflow2(values)
    rows = list(itertools.islice(records.read(values.data), values.rows))
    batch_size = min(values.batch_size or 32, len(rows))
    metrics = interleaved_likelihood.measure_records(model, rows, batch_size=batch_size, seed=seed)
    result = {
        "data": describe_data(values.data),
        "sections": {"likelihood": {"records": {"all": metrics}}},
        "not_run": {},
        "options": {"batch_size": batch_size, "seed": seed},
        "protocol": {"likelihood": interleaved_likelihood.PROTOCOL},
    }
    result, written = file.write(result)
    return result, [*summary.likelihood_lines(result), *written]


def evaluate_vlm(values: flags.FlagValues) -> Output:
    """Measure how many questions about images a VLM, or a STARFlow2, answers correctly."""
    require(values, "understanding", "model", "data")
    file = open_result(values, "understanding", values.data)

    def score(path, blank=False):
        if open_model(path).task == load.TASK:
            return _score_with_starflow2(values, path, blank)
        model = vlm.load(path)
        options = vlm_task.data_options(
            model.cfg,
            model.model_config,
            path=values.data,
            mixture=(),
            tokenizer=model.tokenizer_folder,
            blank_images=blank,
        )
        return vqa.score_answers(functools.partial(vlm.score, model), options)

    answers = score(values.model)
    baselines = {"blank_image": vqa.summarize(score(values.model, blank=True))}
    if values.blind:
        baselines["text_only_baseline"] = vqa.summarize(score(values.blind))
    result = {
        "data": describe_data(values.data),
        "kinds": vqa.summarize(answers),
        "by_holdout": vqa.summarize_by_holdout(answers),
        "baselines": baselines,
        "protocol": vqa.PROTOCOL,
    }
    result, written = file.write(result)
    return result, [*vqa.summary_lines(result), *written]


def _score_with_starflow2(
    values: flags.FlagValues, path: str, blank: bool = False
) -> list[vqa.ScoredAnswer]:
    """Return scored answers; those that are one text at the end of a record are decoded.

    The noise of a decoded record's images is that of its number, as in the plugins of harnesses.
    """
    model, seed = load_starflow2(values, path), values["seed"].value
    rows = list(itertools.islice(records.read(values.data), values.rows))
    batch_size = min(values.batch_size or 32, len(rows))
    sums, _ = interleaved_likelihood.score_records(
        model, rows, batch_size=batch_size, seed=seed, blank=blank
    )
    decoded = questions.decode_records(model, rows, batch_size=batch_size, seed=seed, blank=blank)
    return vqa.from_sums(rows, sums, decoded)


def evaluate_codec(values: flags.FlagValues) -> Output:
    """Measure the fidelity of a codec's images and, with --fit, a linear probe of its latents."""
    require(values, "codec", "model", "data")
    codec = latent_codec.load(values.model)
    file, seed = open_result(values, "codec", values.data), values["seed"].value
    if file.path and file.path.suffix != ".json":
        raise ValueError(f"--out {file.path}: expected a name that ends in .json")
    grid = file.path.with_suffix(".png") if file.path else None
    # What a killed process of this command left is replaced.
    if grid and not output.is_of_this_package(grid):
        result_files.refuse_existing(grid, values.overwrite)
    metrics, images = codec_evaluation.measure_fidelity(
        codec,
        values.data,
        rows=values.rows,
        sigma=values.sigma,
        seed=seed,
        resize=values.resize,
        keep=values.pictures if grid else 0,
    )
    probe = None
    if values.fit:
        probe = codec_evaluation.measure_probe(
            codec, values.fit, values.data, rows=values.rows, resize=values.resize
        )
        probe = {"fit": describe_data(values.fit), **probe}
    ceiling = None
    if values.n:
        ceiling = codec_ceiling.measure(codec, values.n, sigma=values.sigma, seed=seed)
    result = {
        "model": {**file.model, "encoder": codec.sha256},
        "data": describe_data(values.data),
        **metrics,
        "probe": probe,
        "ceiling": ceiling,
        "protocol": codec_evaluation.protocol(codec, values.sigma, seed, values.resize),
    }
    if grid:
        output.save_png(grid, image_grid.grid(images, columns=12), {"codec": codec.sha256})
    result, written = file.write(result)
    written += [f"written    {grid}"] if grid else []
    ceiling_lines = codec_ceiling.summary_lines(ceiling) if ceiling else []
    return result, [*codec_evaluation.summary_lines(result), *ceiling_lines, *written]


if __name__ == "__main__":
    define(flags.FLAGS)
    allocator.keep_freed_memory()
    cli.run(main, VERBS)

"""The verbs `shapes`, `all`, `compare` and `showcase` of `evaluate`."""

import json
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from starflow2_jax.config import nearest
from starflow2_jax.evaluation import result_files
from starflow2_jax.evaluation.command_flags import (
    Output,
    describe_data,
    load_starflow2,
    open_result,
    require,
)
from starflow2_jax.evaluation.shapes import (
    cases,
    compare,
    report,
    showcase,
    skills,
    suite,
    summary,
)
from starflow2_jax.evaluation.training_history import training_history
from starflow2_jax.inference import options as inference_options
from starflow2_jax.inference.model import Model
from starflow2_jax.runtime import atomic


def evaluate_shapes(values: flags.FlagValues, with_page: bool = False) -> Output:
    """Run the shapes suite and, for the verb `all`, write its page and contact sheets."""
    verb = "all" if with_page else "shapes"
    require(values, verb, "model")
    _sections(values)  # an unknown one is named before anything is opened
    folders = _folders(values)
    data_name = "-".join(epath.Path(folder).name for folder in folders) or "drawn"
    file = open_result(values, verb, data_name, "" if with_page else ".json")
    if with_page and file.path is None:
        raise ValueError("all: --out is needed: a folder for the page and the sheets")
    result, samples = _run_suite(values, values.model)
    written = []
    if not with_page:
        result, written = file.write(result)
    elif jax.process_index() == 0:
        result = report.write_folder(
            file, result, samples, seed=values["seed"].value, overwrite=values.overwrite
        )
        names = f"{report.PAGE}, {result_files.SHAPES_FILE} and contact sheets"
        written = [f"written    {file.path}: {names}"]
    return result, [*summary.summary_lines(result), *written]


def _run_suite(
    values: flags.FlagValues, path: str
) -> tuple[dict[str, Any], dict[str, list[cases.Sample]]]:
    """Measure the shapes suite; return its result, and the samples by section."""
    sections, folders, seed = _sections(values), _folders(values), values["seed"].value
    model = load_starflow2(values, path)
    pixels = _pixels(model)
    if folders:
        suite_cases = cases.read(folders, n=values.n)
    else:
        n, balance = values.n or 32, values.balance_answers
        suite_cases = cases.generate(seed, n, pixels, suite.tasks_of(sections), balance)
    sampling_settings = _sampling_settings(values, model)
    references, missing_references = suite.load_reference_vlms(model, pixels, values.blind)
    result, samples = suite.run(
        suite_cases,
        suite.make_answer_fn(model, suite_cases, **sampling_settings),
        only=sections,
        not_run=suite.unsupported_sections(model),
        model=model,
        references=references,
        reconstruct_fn=suite.make_reconstruct_fn(model, seed) if model.codec else None,
        seed=seed,
        on_section=lambda section: logging.info("%s ...", section),
    )
    result = {
        "data": {
            "path": values.data or f"generated from seed {seed}",
            "fingerprints": [describe_data(folder)["fingerprint"] for folder in folders],
        },
        "note": values.note or "",
        "training": training_history(path),
        "options": sampling_settings,
        "skills": skills.judge(result["sections"]),
        **result,
        "not_run": {**result["not_run"], **missing_references},
        "samples": {name: [*map(report.sample_row, rows)] for name, rows in samples.items()},
    }
    return result, samples


def compare_results(values: flags.FlagValues, paths: Sequence[str]) -> Output:
    """Compare two results of the shapes suite, or two models, which are measured first."""
    if len(paths) != 2:
        raise ValueError(
            f"compare: {len(paths)} arguments; expected two: results of `evaluate all` or of "
            "`evaluate shapes`, or models"
        )
    out = epath.Path(values.out) if values.out else None
    if out:
        result_files.refuse_existing(out, values.overwrite)
    results = []
    for path in paths:
        stored = compare.read(path)
        if stored is None:
            model = result_files.describe_model(path)
            stored = {"model": model, **_run_suite(values, path)[0]}
        results.append(stored)
    result = compare.compare(*results)
    written = []
    if out and jax.process_index() == 0:
        atomic.write_file(out, json.dumps(result, indent=2) + "\n")
        written = [f"written    {out}"]
    return result, [*compare.lines(result), *written]


def show_examples(values: flags.FlagValues) -> Output:
    """Write one page of pictures that a model draws, edits, answers and reasons about."""
    require(values, "showcase", "model", "out")
    file, seed = open_result(values, "showcase", "drawn", ""), values["seed"].value
    model = load_starflow2(values)
    sections = _sections(values) if values.only else tuple(showcase.EXAMPLES)
    unsupported = suite.unsupported_sections(model)
    groups = showcase.make_cases(seed, _pixels(model), sections, values.n or 0)
    settings = _sampling_settings(values, model)
    samples = {}
    for name, group in groups.items():
        if name not in unsupported:
            logging.info("%s ...", name)
            answer_fn = suite.make_answer_fn(model, group, **settings)
            samples[name] = suite.SCORED_SECTIONS[showcase.section(name)].answer_cases(
                group, answer_fn
            )
    result = {
        "data": {"path": f"generated from seed {seed}"},
        "note": values.note or "",
        "training": training_history(values.model),
        "options": settings,
        "correct": {name: sum(s.correct for s in group) for name, group in samples.items()},
        "not_run": {name: why for name, why in unsupported.items() if name in sections},
        "samples": {name: [*map(report.sample_row, group)] for name, group in samples.items()},
    }
    if jax.process_index() == 0:
        result = showcase.write_folder(file, result, samples, overwrite=values.overwrite)
    return result, showcase.summary_lines(result, str(file.path))


def _folders(values: flags.FlagValues) -> list[str]:
    return values.data.split(",") if values.data else []


def _sections(values: flags.FlagValues) -> tuple[str, ...]:
    for name in values.only:
        if name not in suite.SECTIONS:
            known, near = ", ".join(suite.SECTIONS), nearest(name, suite.SECTIONS)
            raise ValueError(f"--only: unknown section {name!r}{near}; the sections are {known}")
    return tuple(values.only) or suite.SECTIONS


def _pixels(model: Model) -> int:
    return model.codec.model.pixels if model.codec else model.cfg["image"]["pixels"] or 64


def _sampling_settings(values: flags.FlagValues, model: Model) -> dict[str, Any]:
    return {
        "batch_size": values.batch_size or 96,
        "seed": values["seed"].value,
        **inference_options.sampling_defaults(
            model.cfg["sample"],
            guidance=values.guidance,
            image_temperature=values.image_temperature,
        ),
    }

"""Convert weights, inspect checkpoints, share models: starflow, tarflow, export, push, list, show, verify.

python -m starflow2_jax.convert tarflow model.pth --options config.yaml --out models/tarflow
python -m starflow2_jax.convert export --model runs/cifar --out models/cifar
python -m starflow2_jax.convert verify --workdir runs/cifar
python -m starflow2_jax.convert push --model models/cifar --repo user/cifar --license apache-2.0 --private

INPUT of starflow and tarflow is a .safetensors or .pth file or a folder with one; --options is the
run's YAML file, or text such as 'img_size=32 patch_size=4 ...', in either published vocabulary.
"""  # noqa: E501

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from starflow2_jax import params
from starflow2_jax.checkpoints import hub, hub_push, model_card, model_folder, tensor_files
from starflow2_jax.checkpoints.convert import starflow, starflow_options
from starflow2_jax.checkpoints.open_model import EXPORTED_METADATA, SavedModel, open_model
from starflow2_jax.models.flow import declare
from starflow2_jax.runtime import cli

VERBS = {
    "starflow": "INPUT, --options, --out: a published STARFlow to a model folder",
    "tarflow": "INPUT, --options, --out: a published TarFlow to a model folder",
    "export": "--model, --out: a run, a step or a model folder to a model folder; with --public "
    "to safetensors under the published names",
    "push": "--model, --repo, --license: a model folder to the Hugging Face Hub, with a card; "
    "with --dry_run to the folder --out",
    "list": "--workdir: its checkpoints",
    "show": "--model: names, shapes and sizes of a run, a step or a model folder",
    "verify": "--workdir or --model: compare every file with its sha256",
}
_NOISE_OPTIONS = {"noise_std", "noise_type"}

# The result as JSON, and as lines of text.
Result = tuple[dict[str, Any] | list[dict[str, Any]], list[str]]


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    text = partial(flags.DEFINE_string, flag_values=values)
    switch = partial(flags.DEFINE_boolean, flag_values=values)
    text("options", None, "options of the run: a YAML file or key=value")
    text("out", None, "folder to write")
    switch("overwrite", False, "replace the model folder at --out")
    text("model", None, "a workdir, a step folder in it, or a model folder, also hf://user/name")
    text("workdir", None, "a run's folder")
    switch("ema", True, "export the averaged weights, not the raw ones")
    switch(
        "embed", True, "export of a STARFlow2: include VLM, tokenizer and codec, not their paths"
    )
    switch("public", False, "export under the published names")
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ("float32", "bfloat16"),
        "export of a task='vlm' run: dtype of the tensors",
        flag_values=values,
    )
    text("repo", None, "push: USER/NAME, created if it does not exist")
    switch("private", False, "push: create a private repository; a public one is refused")
    text("license", None, "push: license of the weights, such as apache-2.0")
    flags.DEFINE_multi_string(
        "base_model", [], "push: USER/NAME that the model derives from", flag_values=values
    )
    flags.DEFINE_multi_string(
        "results", [], "push: result file of `evaluate` for the card", flag_values=values
    )
    switch("dry_run", False, "push: write the files to --out and upload nothing")
    switch("seal", False, "verify: write the digests that a complete step lacks")
    switch("json", False, "print the result as JSON")


def main(verb: str, argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Run one verb.

    Raises:
        ValueError, OSError, RuntimeError: The input is invalid; nothing was overwritten.
    """
    expected = 1 if verb in starflow_options.FAMILIES else 0
    if len(argv) != expected:
        inputs = "one INPUT" if expected else "no arguments"
        raise ValueError(f"{verb}: expected {inputs}, got {argv}")
    try:
        result, lines = _RUN[verb](values, *argv)
    except ImportError as error:
        raise RuntimeError(str(error)) from error
    print(json.dumps(result) if values.json else "\n".join(lines))
    problems = result.get("problems", 0) if isinstance(result, dict) else 0
    if problems:
        raise ValueError(f"{problems} of what was checked is damaged; see above")


def _required(values: flags.FlagValues, *names: str) -> str:
    """Return the value of the one flag among `names` that is set."""
    used = [name for name in names if values[name].value]
    if len(used) != 1:
        raise ValueError(f"{' or '.join('--' + n for n in names)} is needed")
    return values[used[0]].value


def _import(family: str, values: flags.FlagValues, source: str) -> Result:
    """Convert a published state dict to a model folder, tensor by tensor."""
    out = _required(values, "out")
    options, trainer_options = starflow_options.read_options(_required(values, "options"))
    if options.get("family", family) != family:
        raise ValueError(f"options: family={options['family']!r}, but the verb is {family}")
    options["family"] = family
    tensors = tensor_files.open_source(source)
    model, image = starflow.describe(tensors, options)
    cfg = starflow.experiment_config(model, image, options, trainer_options)
    tree = {"flow": starflow.tree_view(tensors, model)}
    model_folder.write_folder(out, tree, cfg, overwrite=values.overwrite)
    unused = sorted(set(trainer_options) - _NOISE_OPTIONS)
    result, lines = _summary(out, params.count(declare(model)), unused)
    noise = {name: cfg["noise"][name] for name in ("kind", "sigma")}
    is_known = trainer_options.get("noise_std") is not None
    note = "" if is_known else ", assumed: the options do not state it"
    lines.append(f"trained with {noise['kind']} noise of {noise['sigma']}{note}")
    return {**result, "noise": noise}, lines


def _export(values: flags.FlagValues) -> Result:
    """Export a run, a step or a model folder, in our format or the published one."""
    path, out = _required(values, "model"), _required(values, "out")
    saved = open_model(path)
    _check_place(saved, out, values.overwrite)
    task = saved.task
    if task == "flow":
        return _export_flow(values, path, out)
    if values.public or not values.ema:
        raise ValueError(
            f"--public, --noema: a model with task={task!r} is exported in its one format, with "
            "averaged weights"
        )
    if task == "starflow2":
        from starflow2_jax.inference import load

        model = load.export(path, out, embed=values.embed, overwrite=values.overwrite)
    elif task == "vlm":
        from starflow2_jax.inference import vlm

        model = vlm.load(path)
        vlm.export(model, out, dtype=values.dtype, overwrite=values.overwrite)
    else:
        from starflow2_jax.latents import codec

        model = codec.load(path)
        codec.export(model, out, overwrite=values.overwrite)
    return _summary(out, params.count(model.params))


def _check_place(saved: SavedModel, out: str, overwrite: bool) -> None:
    """Refuse an output that would replace a part of the exported model, or all around it."""
    source, target = Path(saved.path).resolve(), Path(out).resolve()
    contained = source.is_relative_to(target) or target.is_relative_to(source)
    if overwrite and saved.is_folder and source != target and contained and target.exists():
        raise ValueError(f"--out {out}: the model {saved.path} would be replaced in part")


def _export_flow(values: flags.FlagValues, path: str, out: str) -> Result:
    from starflow2_jax.training.tasks import flow

    saved = open_model(path)
    metadata = {key: saved.metadata.get(key) for key in EXPORTED_METADATA}
    cfg = {**saved.config, **{key: value for key, value in metadata.items() if value}}
    model, image = flow.model_config(cfg), cfg["image"]
    declared = flow.declare(cfg, model)
    if saved.is_folder:
        tree = saved.open_params(declared)
    else:
        trained, _ = params.split(declared, tuple(cfg["train"]["trainable"]))
        tree = saved.open_params(trained, ema=values.ema) | flow.init_frozen(cfg, declared)
    if not values.public:
        model_folder.write_folder(out, tree, cfg, overwrite=values.overwrite)
        return _summary(out, params.count(tree))
    options = starflow_options.public_options(
        model,
        {
            "pixels": model.side * image["patch"],
            "patch": image["patch"],
            # With patches of one pixel both orders are the same, and the family decides.
            "channel_order": image["channel_order"] if image["patch"] > 1 else None,
        },
    )
    tensors = starflow.public_view(tree["flow"], model)
    texts = {"options.yaml": starflow_options.to_yaml(options)}
    model_folder.write_tensors(out, tensors, texts, overwrite=values.overwrite)
    return _summary(out, params.count(tree["flow"]), sorted(set(tree) - {"flow"}))


def _summary(out: str, count: int, left_out: list[str] | None = None) -> Result:
    size = sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
    result = {"out": out, "parameters": count, "bytes": size, "left_out": left_out or []}
    lines = [f"{out}: {count:,} parameters, {size / 1e6:,.1f} MB"]
    if left_out:
        lines.append(f"left out, as no part of the flow: {', '.join(left_out)}")
    return result, lines


def _push(values: flags.FlagValues) -> Result:
    """Upload a model folder with a card, or write both to --out."""
    path, license_name = _required(values, "model"), _required(values, "license")
    repo = hub.parse(hub.PREFIX + _required(values, "repo").removeprefix(hub.PREFIX)).repo
    saved = open_model(path)
    if not saved.is_folder:
        raise ValueError(
            f"push: {path} is a run; push the folder that `convert export` makes of it"
        )
    if problems := [*_missing_parts(path), *_outside_parts(path, saved)]:
        raise ValueError(f"push: {path}: {'; '.join(problems)}; nothing was uploaded")
    count = sum(int(np.prod(t.shape)) for t in tensor_files.open_source(saved.path).values())
    options = model_card.CardOptions(
        repo, license_name, tuple(values.base_model), tuple(values.results)
    )
    card = model_card.make_card(saved, options, parameters=count)
    upload = hub_push.prepare(saved.path, card)
    if values.dry_run:
        out = _required(values, "out")
        hub_push.write(upload, out, overwrite=values.overwrite)
        return {"out": out, "files": len(upload.names) + 1}, [f"{out}: nothing was uploaded"]
    address = hub_push.push(upload, repo, private=values.private)
    result = {"address": str(address), "files": len(upload.names) + 1}
    return result, [f"pushed {result['files']} files: --model {address}"]


def _outside_parts(path: str, saved: SavedModel) -> list[str]:
    """Return a line for each part of a STARFlow2 that other machines would not find."""
    if saved.task != "starflow2":
        return []
    from starflow2_jax.inference import load

    cfg, folder = load.read_config(path), Path(saved.path).resolve()
    problems = []
    for name, part in (
        ("VLM", cfg["vlm"]["path"]),
        ("codec", cfg["fae"]["path"]),
        ("tokenizer", cfg["text"]["tokenizer"]),
    ):
        is_public = hub.is_address(part) or part.startswith(model_folder.PRETRAINED)
        if part and not is_public and not Path(part).resolve().is_relative_to(folder):
            problems.append(f"its {name} is in {part}; `convert export` copies it into the folder")
    return problems


def _list(values: flags.FlagValues) -> Result:
    """List the step folders of a run."""
    from starflow2_jax.checkpoints import steps

    workdir = _required(values, "workdir", "model")
    entries = steps.steps(steps.locate(workdir)[0])
    if not entries:
        raise FileNotFoundError(f"{workdir}: no checkpoints in it")
    rows = [{"step": e.step, "status": e.status, "path": str(e.path)} for e in entries]
    return rows, [f"{r['step']:>10}  {r['status']:8}  {r['path']}" for r in rows]


def _show(values: flags.FlagValues) -> Result:
    """List name, shape, dtype and bytes of every stored array."""
    path = str(model_folder.locate(_required(values, "model", "workdir")))
    if model_folder.is_folder(path):
        rows = [
            (name, tensor.shape, tensor.dtype.name, tensor.bytes)
            for name, tensor in sorted(tensor_files.open_source(path).items())
        ]
    else:
        from starflow2_jax.checkpoints import orbax, steps

        rows = [tuple(row) for row in orbax.show(*steps.locate(path))]
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{n:{width}}  {'x'.join(map(str, s)) or '-':>18}  {d:9}  {b:>14,}" for n, s, d, b in rows
    ]
    total_bytes = sum(row[3] for row in rows)
    total_count = sum(int(np.prod(row[1])) for row in rows)
    lines.append(f"{'total':{width}}  {total_count:>18,}  {'':9}  {total_bytes:>14,}")
    return [dict(zip(("name", "shape", "dtype", "bytes"), row)) for row in rows], lines


def _verify(values: flags.FlagValues) -> Result:
    """Compare files with their digests."""
    path = _required(values, "workdir", "model")
    if model_folder.is_folder(model_folder.locate(path)):
        path = str(model_folder.locate(path))
        problems = [*model_folder.verify(path), *_missing_parts(path)]
        rows = [{"what": path, "status": "sealed", "problems": problems}]
    else:
        from starflow2_jax.checkpoints import orbax, steps

        reports = orbax.verify(*steps.locate(path), seal=values.seal)
        if not reports:
            raise FileNotFoundError(f"{path}: no checkpoints in it")
        rows = [
            {"what": f"step {r.step}", "status": r.status, "problems": r.problems} for r in reports
        ]
    lines = []
    for row in rows:
        lines.append(f"{row['what']}: {row['status']}, {'damaged' if row['problems'] else 'good'}")
        lines += [f"  {problem}" for problem in row["problems"]]
    return {"checked": rows, "problems": sum(1 for row in rows if row["problems"])}, lines


def _missing_parts(path: str) -> list[str]:
    """Return a line for each part of a model folder that its configuration names and it lacks."""
    saved = open_model(path)
    if saved.task != "starflow2":
        return []
    from starflow2_jax.inference import load

    missing = load.missing_parts(saved, load.read_config(path))
    return [f"{name}: there is no folder {folder}" for name, folder in missing.items()]


_RUN = {
    "starflow": partial(_import, "starflow"),
    "tarflow": partial(_import, "tarflow"),
    "export": _export,
    "push": _push,
    "list": _list,
    "show": _show,
    "verify": _verify,
}


if __name__ == "__main__":
    define(flags.FLAGS)
    cli.run(main, VERBS)

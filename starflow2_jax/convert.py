"""Converts weights, and looks after checkpoints: starflow, tarflow, export, list, show, verify.

python -m starflow2_jax.convert tarflow model.pth --options config.yaml --out models/tarflow
python -m starflow2_jax.convert export --model runs/cifar --out models/cifar
python -m starflow2_jax.convert verify --workdir runs/cifar

INPUT of starflow and tarflow is a .safetensors or .pth file or a folder with one; --options is the
run's YAML file, or text such as 'img_size=32 patch_size=4 ...', in either public vocabulary.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from starflow2_jax import config, params
from starflow2_jax.checkpoints import model_folder, tensor_files
from starflow2_jax.checkpoints.convert import starflow, starflow_options
from starflow2_jax.checkpoints.open_model import EXPORTED_METADATA, open_model
from starflow2_jax.models.flow import FlowConfig, declare
from starflow2_jax.runtime import cli

VERBS = {
    "starflow": "INPUT, --options, --out: a public STARFlow to a model folder",
    "tarflow": "INPUT, --options, --out: a public TarFlow to a model folder",
    "export": "--model, --out: a run, a step or a model folder to a model folder; with --public "
    "to safetensors under the public names",
    "list": "--workdir: its checkpoints",
    "show": "--model: names, shapes and sizes of a run, a step or a model folder",
    "verify": "--workdir or --model: compare every file with its sha256",
}
_NOISE = {"noise_std", "noise_type"}
_NOISE_STD = {"tarflow": 0.05, "starflow": 0.3}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    text, switch = flags.DEFINE_string, flags.DEFINE_boolean
    text("options", None, "the public run's options: a YAML file or key=value", flag_values=values)
    text("out", None, "folder to write", flag_values=values)
    switch("overwrite", False, "replace the model folder at --out", flag_values=values)
    text("model", None, "a workdir, a step folder in it, or a model folder", flag_values=values)
    text("workdir", None, "a run's folder", flag_values=values)
    switch("ema", True, "export the averaged weights, not the raw ones", flag_values=values)
    switch("embed", True, "export of a STARFlow2: VLM, tokenizer and codec too, else their paths",
           flag_values=values)  # fmt: skip
    switch("public", False, "export under the names of the public code", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "export of a task='vlm' run: "
                      "what is stored", flag_values=values)  # fmt: skip
    switch("seal", False, "verify: write digests a step lacks, if it is whole", flag_values=values)
    switch("json", False, "print the result as JSON", flag_values=values)


def main(verb: str, words: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Run one verb.

    Raises:
        ValueError, OSError, RuntimeError: bad input; nothing was written over.
    """
    takes = 1 if verb in starflow_options.FAMILIES else 0
    if len(words) != takes:
        raise ValueError(f"{verb}: expected {'one INPUT' if takes else 'no words'}, got {words}")
    try:
        result, lines = _VERBS[verb](values, *words)
    except ImportError as error:
        raise RuntimeError(str(error)) from error
    print(json.dumps(result) if values.json else "\n".join(lines))
    problems = result.get("problems", 0) if isinstance(result, dict) else 0
    if problems:
        raise ValueError(f"{problems} of what was checked is damaged; see above")


def _need(values: flags.FlagValues, *names: str) -> str:
    given = [name for name in names if values[name].value]
    if len(given) != 1:
        raise ValueError(f"{' or '.join('--' + n for n in names)} is needed")
    return values[given[0]].value


# ------------------------------------------------------------------------------------- conversions


def _import(family: str, values: flags.FlagValues, source: str) -> tuple[dict, list[str]]:
    """A public state dict to a model folder, tensor by tensor."""
    out = _need(values, "out")
    options, others = starflow_options.read_options(_need(values, "options"))
    if options.get("family", family) != family:
        raise ValueError(f"options: family={options['family']!r}, but the verb is {family}")
    options["family"] = family
    stored = tensor_files.open_source(source)
    model, image = starflow.describe(stored, options)
    cfg = experiment(model, image, options, others)
    tree = {"flow": starflow.tree_view(stored, model)}
    model_folder.write_folder(out, tree, cfg, overwrite=values.overwrite)
    result, lines = _summary(out, params.count(declare(model)), sorted(set(others) - _NOISE))
    noise = cfg["noise"]
    assumed = "" if others.get("noise_std") is not None else ", which the options do not say"
    lines.append(f"trained with {noise['kind']} noise of {noise['sigma']}{assumed}")
    return {**result, "noise": noise}, lines


def experiment(
    model: FlowConfig,
    image: Mapping[str, Any],
    options: Mapping[str, Any],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """The experiment configuration of a converted flow: what `generate` and `evaluate` read.

    Args:
        image: of `starflow_options.image_of`; options, others: of `starflow_options.read_options`.
            Of the trainer's options the noise is taken, by default that of the family's trainer.
    """
    cfg = config.to_dict(config.default())
    cfg["name"] = f"converted {options['family']}"
    cfg["model"] = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if getattr(model, field.name) != field.default
    }
    # Tokens that are not of RGB pixels are latents: read, never cut out of an image.
    pixels = 0 if options.get("vae") or options["in_channels"] != 3 else model.side * image["patch"]
    cfg["image"].update(pixels=pixels, patch=image["patch"], channel_order=image["layout"])
    cfg["data"]["text"] = "features" if model.text_channels else "none"
    cfg["data"]["labels"] = bool(model.classes)
    sigma = others.get("noise_std")
    cfg["noise"]["sigma"] = float(_NOISE_STD[options["family"]] if sigma is None else sigma)
    cfg["noise"]["kind"] = others.get("noise_type") or "gaussian"
    cfg = config.to_dict(cfg)
    config.check(cfg)
    return cfg


def _export(values: flags.FlagValues) -> tuple[dict, list[str]]:
    """A run, a step or a model folder to a model folder, ours or the public one."""
    from starflow2_jax.training.program import model_config

    path, out = _need(values, "model"), _need(values, "out")
    task = open_model(path).task
    if task == "starflow2":
        return _export_interleaved(values, path, out)
    if task == "vlm":
        return _export_reader(values, path, out)
    if task != "flow":
        return _export_codec(values, path, out)
    cfg, tree = _open_flow(path, values.ema)
    if not values.public:
        model_folder.write_folder(out, tree, cfg, overwrite=values.overwrite)
        return _summary(out, params.count(tree))
    model, image = model_config(cfg), cfg["image"]
    options = starflow.options(
        model,
        {
            "pixels": model.side * image["patch"],
            "patch": image["patch"],
            # Patches of one pixel are the same in both; then the family decides.
            "layout": image["channel_order"] if image["patch"] > 1 else None,
        },
    )
    tensors = starflow.public_view(tree["flow"], model)
    texts = {"options.yaml": starflow_options.to_yaml(options)}
    model_folder.write_tensors(out, tensors, texts, overwrite=values.overwrite)
    return _summary(out, params.count(tree["flow"]), sorted(set(tree) - {"flow"}))


def _export_interleaved(values: flags.FlagValues, path: str, out: str) -> tuple[dict, list[str]]:
    """A STARFlow2 with its VLM, tokenizer and codec to a model folder."""
    from starflow2_jax.inference import load

    if values.public or not values.ema:
        raise ValueError("--public, --noema: a STARFlow2 is exported as ours, averaged weights")
    found = load.export(path, out, embed=values.embed, overwrite=values.overwrite)
    return _summary(out, params.count(found.params))


def _export_codec(values: flags.FlagValues, path: str, out: str) -> tuple[dict, list[str]]:
    """A latent codec and its tower to a model folder."""
    from starflow2_jax.latents import codec

    if values.public or not values.ema:
        raise ValueError("--public, --noema: a codec is exported as it is, averaged weights")
    found = codec.load(path)
    codec.export(found, out, overwrite=values.overwrite)
    return _summary(out, params.count(found.params))


def _export_reader(values: flags.FlagValues, path: str, out: str) -> tuple[dict, list[str]]:
    """A small vision-language model to a folder that transformers reads."""
    from starflow2_jax.inference import vlm

    if values.public or not values.ema:
        raise ValueError("--public, --noema: this export is the public folder, averaged weights")
    found = vlm.load(path)
    vlm.export(found, out, dtype=values.dtype, overwrite=values.overwrite)
    return _summary(out, params.count(found.params))


def _open_flow(path: str, ema: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and the host parameters of a flow."""
    from starflow2_jax.training.program import (
        declare as declare_experiment,
        frozen_weights,
        model_config,
    )

    saved = open_model(path)
    metadata = {key: saved.metadata.get(key) for key in EXPORTED_METADATA}
    cfg = {**saved.config, **{key: value for key, value in metadata.items() if value}}
    declared = declare_experiment(cfg, model_config(cfg))
    if saved.is_folder:
        return cfg, saved.open_params(declared)
    trained, _ = params.split(declared, tuple(cfg["train"]["trainable"]))
    return cfg, {**saved.open_params(trained, ema=ema), **frozen_weights(cfg, declared)}


def _summary(out: str, count: int, left_out: list[str] | None = None) -> tuple[dict, list[str]]:
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    result = {"out": out, "parameters": count, "bytes": size, "left_out": left_out or []}
    lines = [f"{out}: {count:,} parameters, {size / 1e6:,.1f} MB"]
    if left_out:
        lines.append(f"left out, as no part of the flow: {', '.join(left_out)}")
    return result, lines


# ------------------------------------------------------------------------------------- checkpoints


def _list(values: flags.FlagValues) -> tuple[list[dict], list[str]]:
    """Step folders of a run."""
    from starflow2_jax.checkpoints import steps

    workdir = _need(values, "workdir", "model")
    found = steps.steps(steps.locate(workdir)[0])
    if not found:
        raise FileNotFoundError(f"{workdir}: no checkpoints in it")
    rows = [{"step": s.step, "status": s.status, "path": str(s.path)} for s in found]
    return rows, [f"{r['step']:>10}  {r['status']:8}  {r['path']}" for r in rows]


def _show(values: flags.FlagValues) -> tuple[list[dict], list[str]]:
    """Names, shapes, dtypes and bytes of what is stored."""
    path = _need(values, "model", "workdir")
    if model_folder.is_folder(path):
        rows = [
            (name, stored.shape, stored.dtype.name, stored.bytes)
            for name, stored in sorted(tensor_files.open_source(path).items())
        ]
    else:
        from starflow2_jax.checkpoints import orbax, steps

        rows = [tuple(row) for row in orbax.show(*steps.locate(path))]
    fields = ("name", "shape", "dtype", "bytes")
    wide = max(len(row[0]) for row in rows)
    lines = [
        f"{n:{wide}}  {'x'.join(map(str, s)) or '-':>18}  {d:9}  {b:>14,}" for n, s, d, b in rows
    ]
    total = sum(row[3] for row in rows)
    numbers = sum(int(np.prod(row[1])) for row in rows)
    lines.append(f"{'total':{wide}}  {numbers:>18,}  {'':9}  {total:>14,}")
    return [dict(zip(fields, row)) for row in rows], lines


def _verify(values: flags.FlagValues) -> tuple[dict, list[str]]:
    """Files against their digests."""
    path = _need(values, "workdir", "model")
    if model_folder.is_folder(path):
        found = [{"what": path, "status": "sealed", "problems": model_folder.verify(path)}]
    else:
        from starflow2_jax.checkpoints import orbax, steps

        reports = orbax.verify(*steps.locate(path), seal=values.seal)
        if not reports:
            raise FileNotFoundError(f"{path}: no checkpoints in it")
        found = [
            {"what": f"step {r.step}", "status": r.status, "problems": r.problems} for r in reports
        ]
    lines = []
    for row in found:
        lines.append(f"{row['what']}: {row['status']}, {'damaged' if row['problems'] else 'good'}")
        lines += [f"  {problem}" for problem in row["problems"]]
    damaged = sum(1 for row in found if row["problems"])
    return {"checked": found, "problems": damaged}, lines


_VERBS = {
    "starflow": lambda values, source: _import("starflow", values, source),
    "tarflow": lambda values, source: _import("tarflow", values, source),
    "export": _export,
    "list": _list,
    "show": _show,
    "verify": _verify,
}


if __name__ == "__main__":
    define(flags.FLAGS)
    cli.run(main, VERBS)

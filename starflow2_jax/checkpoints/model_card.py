"""The card of a model on the Hugging Face Hub: metadata, commands, figures with their stamps."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow2_jax import __version__
from starflow2_jax.checkpoints import hub, model_folder
from starflow2_jax.checkpoints.open_model import SavedModel
from starflow2_jax.data import untrusted

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD_FILE = "README.md"
PAPER = "https://arxiv.org/abs/2605.08029"
TAGS = ("jax", "starflow2_jax", "normalizing-flow")
# Groups of a result that are no figures of the model as such, and those of single tasks.
_SKIPPED_GROUPS = (
    *("samples", "options", "protocol", "versions", "model", "data", "fit"),
    *("tags", "by_holdout", "differences"),
)
# Groups whose name says nothing to a reader, and counts of what a figure is the mean of.
_SILENT_GROUPS = ("sections", "mean", "score", "kinds", "all")
_COUNTS = ("count", "rows", "records")
_COMPARISONS = ("baselines", "references", "ceilings", "ceiling", "probe")
_STAMP = ("command", "machine", "devices")

# Kind of training -> (pipeline tag, description, command that uses the model).
_KINDS = {
    "starflow2": (
        "any-to-any",
        f"A [STARFlow2]({PAPER}): one causal model that reads and writes interleaved text and "
        "images, with an exact log-likelihood of every part.",
        'generate --model {address} --prompt "a red circle above a blue square" --out images/',
    ),
    "flow": (
        "unconditional-image-generation",
        "An autoregressive normalizing flow of images with an exact likelihood (TarFlow, "
        "STARFlow).",
        "generate --model {address} --n 4 --out images/",
    ),
    "vlm": (
        "image-text-to-text",
        "A vision-language model of Qwen2.5-VL's architecture, with its tokenizer.",
        "evaluate understanding --model {address} --data DATASET",
    ),
    "codec": (
        "image-feature-extraction",
        "A latent codec: it encodes the features of a vision tower, and decodes images.",
        "prepare latents --fae {address} --data DATASET --out LATENTS",
    ),
}


@dataclass(frozen=True)
class CardOptions:
    """The facts of a card that a model folder does not contain."""

    repo: str  # `user/name`
    license: str  # identifier of the Hub, such as apache-2.0
    base_models: Sequence[str] = ()  # `user/name` of the models that it was made from
    results: Sequence[str] = ()  # result files of `evaluate`


@dataclass(frozen=True)
class Figure:
    """A number of a result file that has an interval."""

    name: str  # its groups, joined by commas
    metric: str  # its key
    value: float
    interval: Sequence[float] | None  # 95%
    count: int | None  # of what was measured

    @property
    def label(self) -> str:
        """Return groups and key."""
        return f"{self.name}: {self.metric}" if self.name else self.metric

    def text(self) -> str:
        """Return the value with its interval."""
        if not self.interval:
            return f"{self.value:.4g}"
        low, high = self.interval
        return f"{self.value:.4g} ({low:.4g} to {high:.4g})"


def make_card(saved: SavedModel, options: CardOptions, *, parameters: int) -> str:
    """Return the text of a model card.

    Raises:
        ValueError: A result file is not one of `evaluate`, or measured another model.
    """
    from huggingface_hub import ModelCardData  # heavy

    task = saved.task if saved.task in _KINDS else "codec"
    tag, description, command = _KINDS[task]
    if task == "flow" and saved.config.get("model", {}).get("text_length"):
        tag = "text-to-image"
    results = [(path, read_result(path, saved.path)) for path in options.results]
    base_models = list(dict.fromkeys([*options.base_models, *_base_models(saved.config)]))
    name = options.repo.split("/")[1]
    evaluations = [entry for _, result in results for entry in _evaluations(result, tag)]
    data = ModelCardData(
        license=options.license,
        library_name="starflow2_jax",
        pipeline_tag=tag,
        tags=list(TAGS),
        base_model=base_models or None,
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    lines = ["---", data.to_yaml().strip(), "---", "", f"# {name}", "", description, ""]
    lines += _facts(saved, parameters)
    lines += _usage(f"{hub.PREFIX}{options.repo}", command, task)
    lines += _figures(results)
    return "\n".join(lines)


def _base_models(config: Mapping[str, Any]) -> list[str]:
    """Return the repositories of the Hub that a configuration names."""
    keys = (("init", "from"), ("vlm", "path"), ("teacher", "path"))
    paths = [(config.get(group) or {}).get(name) or "" for group, name in keys]
    return [hub.parse(path).repo for path in paths if hub.is_address(path)]


def _facts(saved: SavedModel, parameters: int) -> list[str]:
    pixels = (saved.config.get("image") or {}).get("pixels")
    facts = [f"{parameters:,} parameters"]
    facts += [f"images of {pixels} pixels"] if pixels else []
    facts += [f"experiment `{saved.config['name']}`"] if saved.config.get("name") else []
    return [
        f"{', '.join(facts)}. `config.json` holds the whole configuration of its training, and "
        "`sha256.json` the digest of every file. Safetensors only; nothing in it is executed.",
        "",
    ]


def _usage(address: str, command: str, task: str) -> list[str]:
    lines = [
        "## Use",
        "",
        f"With starflow2_jax {__version__} or newer. A commit after `@` pins the files: "
        f"`{address}@COMMIT`.",
        "",
        "```bash",
        f"python -m starflow2_jax.{command.format(address=address)}",
        f"python -m starflow2_jax.convert verify --model {address}",
        "```",
        "",
    ]
    if task == "starflow2":
        lines += [
            "```python",
            "from starflow2_jax.inference.load import load",
            "",
            f'model = load("{address}")',
            'image = model.generate(["a red circle"], images=1, max_tokens=0).rows[0][0]',
            "print(image.image.shape, image.log_likelihood)",
            "```",
            "",
        ]
    return lines


# ---------------------------------------------------------------------------------------- figures


def read_result(path: str, folder: str) -> dict[str, Any]:
    """Return a result file of `evaluate` about the model folder `folder`.

    Raises:
        ValueError: It is another file, or about another model.
    """
    result = untrusted.read_json(path, dict[str, Any])
    model = result.get("model")
    if not isinstance(model, dict) or any(not result.get(key) for key in _STAMP):
        raise ValueError(f"{path}: not a result of `evaluate`, which has model, command, machine")
    digests = (Path(folder) / model_folder.DIGEST_FILE).read_bytes()
    expected = hashlib.sha256(digests).hexdigest()
    if model.get("sha256") != expected:
        raise ValueError(
            f"{path}: a result of another model, {model.get('path')} with sha256 "
            f"{model.get('sha256')}; that of {folder} is {expected}: evaluate this folder"
        )
    return result


def figures(group: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Figure]:
    """Yield every number of a result that has a 95% interval next to it."""
    for name, value in group.items():
        if isinstance(value, Mapping):
            if name == "kinds" and "all" in value:
                value = {"all": value["all"]}
            if name not in _SKIPPED_GROUPS:
                yield from figures(value, (*path, name))
        elif f"{name}_95" in group and isinstance(value, int | float):
            count = next((group[key] for key in _COUNTS if isinstance(group.get(key), int)), None)
            parts = [part.replace("_", " ") for part in path if part not in _SILENT_GROUPS]
            yield Figure(", ".join(parts), name, value, group[f"{name}_95"], count)


def headline_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of the model itself, without those that it is compared with."""
    names = [name.replace("_", " ") for name in _COMPARISONS]
    return [f for f in figures(result) if not set(names) & set(f.name.split(", "))]


def _evaluations(result: Mapping[str, Any], task: str) -> "Iterator[EvalResult]":
    from huggingface_hub import EvalResult

    data = result.get("data") or {}
    path = str(data.get("path") or "unknown")
    for figure in headline_figures(result):
        yield EvalResult(
            task_type=task,
            dataset_type=Path(path).name.replace(" ", "-"),
            dataset_name=path,
            metric_type="accuracy" if figure.metric == "correct" else figure.metric,
            metric_name=figure.label,
            metric_value=figure.value,
            metric_args={"interval_95": list(figure.interval or ()), "count": figure.count},
        )


def _figures(results: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    if not results:
        return []
    lines = ["## Figures", "", "In brackets: 95% intervals.", ""]
    for path, result in results:
        time = result.get("time") or "at an unrecorded time"
        versions = result.get("versions") or {}
        packages = ", ".join(f"{name} {versions[name]}" for name in ("jax",) if name in versions)
        stamp = [str(result["machine"]), str(result["devices"]), packages, str(time)]
        lines += ["| figure | value | of |", "|---|---|---|"]
        lines += [
            f"| {_cell(row.label)} | {row.text()} | {row.count or ''} |" for row in figures(result)
        ]
        lines += ["", f"`{Path(path).name}`: {'; '.join(part for part in stamp if part)}.", ""]
        lines += ["```bash", str(result["command"]), "```", ""]
    return lines


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", " ")

"""Every task of the shapes world put to one STARFlow2, and what of it cannot be.

generation     pictures of captions, by GenEval's six tags
understanding  questions about pictures, beside the frozen VLM with its own eyes
editing        the change made, the rest kept
reasoning      answers through a picture, and at once
likelihood     nats a dimension and a token on the same records
text           the VLM's skill without pictures, before and after
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from starflow2_jax.checkpoints import model_folder
from starflow2_jax.evaluation import codec, interleaved_likelihood
from starflow2_jax.evaluation.shapes import (
    accuracy,
    ask as asking,
    cases,
    editing,
    reasoning,
    text_to_image,
    vqa,
)
from starflow2_jax.evaluation.shapes.ask import Ask
from starflow2_jax.evaluation.shapes.cases import Case, Sample
from starflow2_jax.evaluation.shapes.text_to_image import Through
from starflow2_jax.inference import vlm as reader_lib
from starflow2_jax.inference.model import Model, adapter_is_trained, flow_is_trained
from starflow2_jax.inference.vlm import VLM

# Of each section the task whose cases it asks; the likelihood is that of all of them.
TASKS = {
    "generation": "t2i",
    "understanding": "question",
    "editing": "edit",
    "reasoning": "reason",
    "text": "text",
}
SECTIONS = ("generation", "understanding", "editing", "reasoning", "likelihood", "text")
# Of tokens beyond the longest right answer that an answer may have.
_MORE_TOKENS = 4
_ROWS = 32
SCORES = {
    "generation": text_to_image,
    "understanding": vqa,
    "editing": editing,
    "reasoning": reasoning,
}


def asker(model: Model, given: Sequence[Case], **options: Any) -> Ask:
    """`asking.asker`, for answers as long as those of the cases and a little longer."""
    longest = max((len(model.tokenizer.encode(case.words)) for case in given), default=0)
    return asking.asker(model, max_tokens=longest + _MORE_TOKENS, **options)


def through(model: Model, seed: int = 0) -> Through:
    """Pictures as the model's codec keeps them, with the noise that the model was trained with."""
    noise = model.cfg["noise"]
    sigma = noise["sigma"] if noise["kind"] == "gaussian" else 0.0

    def kept(images: np.ndarray) -> np.ndarray:
        shown = [codec.Picture(pixels, None) for pixels in images]
        return codec.reconstruct(model.codec, shown, sigma, seed)[2]

    return kept


def unable(model: Model) -> dict[str, str]:
    """Sections that a checkpoint cannot be asked, and why: its stage has not learnt them."""
    found = {}
    if model.codec is None:
        reason = "the model has no codec (--fae)"
        found |= dict.fromkeys(("generation", "understanding", "editing", "reasoning"), reason)
    if not adapter_is_trained(model):
        reason = "the adapter is zero (a checkpoint of stage 1?): the VLM sees no pictures"
        found |= dict.fromkeys(("understanding", "editing", "reasoning"), reason)
    if not flow_is_trained(model):
        reason = "the flow is as it was born (a checkpoint of stage 2?): it draws no pictures"
        found |= dict.fromkeys(("generation", "editing", "reasoning"), reason)
    return found


def readers(model: Model, pixels: int, blind: str | None) -> tuple[dict[str, VLM], dict]:
    """What reads beside the model: `own_eyes`, its VLM, and `blind_model`, that in a folder; and by
    name why one of them does not.

    Raises:
        ValueError, FileNotFoundError: as `reader.load` of `blind`.
    """
    found, without = {}, {}
    path = model.cfg["vlm"]["path"]
    try:
        if not path:
            raise ValueError("vlm.path is empty: the VLM was drawn from the seed, without a tower")
        found["own_eyes"] = reader_lib.load(str(model_folder.locate(path)))
        size = found["own_eyes"].cfg["image"]["pixels"]
        if size != pixels:
            raise ValueError(f"{path} reads pictures of {size} pixels, the model of {pixels}")
    except (ValueError, FileNotFoundError) as error:
        found, without = {}, {"own_eyes": str(error)}
    if blind:
        found["blind_model"] = reader_lib.load(blind)
    return found, without


def run(
    given: Sequence[Case],
    ask: Ask,
    *,
    only: Sequence[str] = SECTIONS,
    not_run: Mapping[str, str] | None = None,
    model: Model | None = None,
    beside: Mapping[str, VLM] | None = None,
    keeps: Through | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Measures.

    Args:
        only: sections; not_run: of sections that are left out, why.
        model: for likelihoods, which are left out without.
        beside: as from `readers`.
        keeps: what the codec makes of pictures; say: told of each section as it begins.

    Returns:
        `sections`, `not_run`, `cases` by task and `protocol`; and samples by section.
    """
    skip = dict(not_run or {})
    sections: dict[str, Any] = {}
    samples: dict[str, list[Sample]] = {}
    asked = {
        "generation": partial(text_to_image.measure, through=keeps),
        "understanding": vqa.measure,
        "editing": partial(editing.measure, through=keeps),
        "reasoning": reasoning.measure,
    }
    for name in only:
        own = [case for case in given if case.task == TASKS.get(name, case.task)]
        if not own:
            skip.setdefault(name, f"no cases of task {TASKS.get(name)}")
        if name in ("likelihood", "text") and model is None:
            skip.setdefault(name, "there is no model to score with")
        if name == "likelihood" and model is not None and model.codec is None:
            own = [case for case in own if case.task == "text"]
        if name in skip or not own:
            continue
        say(name)
        if name == "likelihood":
            sections[name] = interleaved_likelihood.measure(model, own, size=_ROWS, seed=seed)
        elif name == "text":
            sections[name] = interleaved_likelihood.skill(model, own, size=_ROWS)
        else:
            sections[name], samples[name] = asked[name](own, ask)
        if name == "understanding":
            sections[name]["references"] = _references(own, beside or {})
    counts = {task: sum(case.task == task for case in given) for task in cases.TAGS}
    result = {
        "sections": sections,
        "not_run": {name: skip[name] for name in only if name in skip},
        "cases": {task: count for task, count in counts.items() if count},
        "protocol": protocol(),
    }
    return result, samples


def _references(given: Sequence[Case], beside: Mapping[str, VLM]) -> dict[str, Any]:
    found = {}
    for name, reader in beside.items():
        found[name] = accuracy.apart(given, vqa.by_reader(reader, given))
        if name == "own_eyes":
            blank = vqa.by_reader(reader, given, blank=True)
            found["own_eyes_blank"] = accuracy.apart(given, blank)
    return found


def protocol() -> dict[str, Any]:
    """What every figure means."""
    baselines = {
        name: {**room.BASELINES, **getattr(room, "CEILINGS", {}), **getattr(room, "REFERENCES", {})}
        for name, room in SCORES.items()
    }
    return {
        "shares": accuracy.PROTOCOL,
        "others": f"of a tag, the {accuracy.MOST} cases behind each are held against it at most",
        "words": "right word for word; the likeliest tokens",
        "judge": "shapes_eval, by rules; facts as GenEval metadata",
        "editing": " ".join((editing.__doc__ or "").split("\n\n", 1)[1].split()),
        "kept_within": editing.NEAR,
        "likelihood": interleaved_likelihood.PROTOCOL,
        "beside": baselines,
    }

"""WISE: images that need world knowledge, in the verified version of 2026 and the legacy one.

The two versions have other prompts, categories, scores and judges, and must not be mixed.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starflow2_jax.evaluation.judges import official
from starflow2_jax.evaluation.judges.protocol import (
    Item,
    Picture,
    Protocol,
    Question,
    Scores,
    json_items,
)

WISE_PROMPTS, WISE_VERIFIED_PROMPTS = "WISE_legacy/gpt_eval.py", "vllm_eval.py"


def _wise_questions(item: Item, files: list[Path], prompts: Any) -> list[Question]:
    messages = tuple((message.role, message.render(item)) for message in prompts)
    return [Question("image", messages, tuple(map(Picture, files)))]


def _parse_wise_verified(reply: str) -> Scores:
    reply = re.sub(r"(<think>.*?)?</think>\s*", "", reply, flags=re.DOTALL)
    match = re.search(r"\*{0,2}Score\*{0,2}\s*[:：]?\s*([01])\b", reply, re.IGNORECASE)
    lines = re.findall(r"(?m)^\s*([01])\s*$", reply)
    if not match and len(lines) != 1:
        return None
    return [float(match[1] if match else lines[0])]


def _parse_wise(reply: str) -> Scores:
    """Return consistency, realism and aesthetic quality."""
    numbers = []
    for name in ("Consistency", "Realism", "Aesthetic Quality"):
        match = re.search(rf"{name}\*{{0,2}}\s*[:：]?\s*\*{{0,2}}([0-2])", reply, re.IGNORECASE)
        numbers.append(float(match[1]) if match else None)
    if None in numbers:
        lines = re.findall(r"(?m)^\s*([0-2])\s*$", reply)
        numbers = [float(number) for number in lines[:3]] if len(lines) >= 3 else None
    return numbers


def _wise_score(item: Item, numbers: Mapping[str, list[float]]) -> dict[str, float]:
    consistency, realism, aesthetics = numbers["image"]
    score = (0.7 * consistency + 0.2 * realism + 0.1 * aesthetics) / 2
    return {"score": score, "consistency": consistency}


def _wise_verified_score(item: Item, numbers: Mapping[str, list[float]]) -> dict[str, float]:
    return {"score": numbers["image"][0]}


# The last id of each category, in order, and the weight of the category.
_WISE = {
    "culture": (400, 0.4),
    "time": (567, 0.167),
    "space": (700, 0.133),
    "biology": (800, 0.1),
    "physics": (900, 0.1),
    "chemistry": (1000, 0.1),
}
_WISE_VERIFIED = {
    "culture": (400, 0.4),
    "time": (520, 0.12),
    "space": (640, 0.12),
    "biology": (760, 0.12),
    "physics": (880, 0.12),
    "chemistry": (1000, 0.12),
}


def _wise_groups(
    ranges: Mapping[str, tuple[int, float]],
) -> Callable[[Item], tuple[str, ...]]:
    def groups(item: Item) -> tuple[str, ...]:
        number = int(item["prompt_id"])
        for name, (last, _) in ranges.items():
            if 1 <= number <= last:
                return (name,)
        raise ValueError(f"prompt_id {number}: expected 1 to 1000")

    return groups


def _wise_overall(
    ranges: Mapping[str, tuple[int, float]],
) -> Callable[[Mapping[str, Mapping[str, float]]], dict[str, float]]:
    def summarize(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        if set(groups) != set(ranges):
            return {}  # the official overall is of all categories
        return {"overall": sum(groups[name]["score"] * w for name, (_, w) in ranges.items())}

    return summarize


def _wise(
    prompt_file: str,
    ranges: Mapping[str, tuple[int, float]],
    parse: Callable[[str], Scores],
    score: Callable[[Item, Mapping[str, list[float]]], dict[str, float]],
    **rest: Any,
) -> Protocol:
    return Protocol(
        items=json_items,
        name=lambda item: str(item["prompt_id"]),
        files=lambda item, tree, sources: [tree / f"{item['prompt_id']}.png"],
        questions=_wise_questions,
        prompts=lambda folder: official.read_messages(
            folder / prompt_file, "build_evaluation_messages"
        ),
        parse=parse,
        score=score,
        groups=_wise_groups(ranges),
        summarize=_wise_overall(ranges),
        attempts=3,
        commit="eb51174",
        prompt_files=(prompt_file,),
        **rest,
    )


PROTOCOL = _wise(
    WISE_PROMPTS,
    _WISE,
    _parse_wise,
    _wise_score,
    settings={"temperature": 0.0, "max_tokens": 2000},
    judge="gpt-4o-2024-05-13",
)
VERIFIED_PROTOCOL = _wise(
    WISE_VERIFIED_PROMPTS,
    _WISE_VERIFIED,
    _parse_wise_verified,
    _wise_verified_score,
    settings={
        "temperature": 0.0,
        "max_tokens": 500,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    judge="Qwen3.5-35B-A3B",
)

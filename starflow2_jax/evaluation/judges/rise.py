"""RISEBench: edits that need reasoning; consistency, reasoning and plausibility, 1 to 5."""

import re
from collections.abc import Mapping
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
    mean_of_groups,
)

PROMPTS = "utils.py"
PROMPT_NAMES = (
    "prompt_consist", "prompt_reasoning", "prompt_reasoning_w_input", "prompt_generation",
    "prompt_spatial_ref", "prompt_spatial_ref_img", "prompt_spatial_ref_w_input",
    "prompt_spatial_qual", "prompt_spatial_cons", "prompt_logical_cons_ans",
    "prompt_logical_cons", "prompt_logical_txt", "prompt_logical_img", "prompt_logical_img_wo_q",
)  # fmt: skip


# The weights of what is judged.
_WEIGHTS = (
    {"consistency": 0.3, "reasoning": 0.5, "quality": 0.2},
    {"reasoning": 0.8, "quality": 0.2},
    {"consistency": 0.3, "reasoning": 0.7},
    {"reasoning": 1.0},
)


def _rise_files(item: Item, tree: Path, sources: Path) -> list[Path]:
    folder = tree / "images" / item["category"]
    candidates = [folder / f"{item['index']}.{suffix}" for suffix in ("png", "jpg", "jpeg")]
    image = next((path for path in candidates if path.exists()), candidates[0])
    reference = item.get("reference_img")
    uses_reference = reference and item["category"] in ("spatial_reasoning", "logical_reasoning")
    if item["category"] == "logical_reasoning" and item.get("reference_txt"):
        uses_reference = False
    return [sources / (reference if uses_reference else item["image"]), image]


def _rise_questions(item: Item, files: list[Path], prompts: Any) -> list[Question]:
    """Return the questions about consistency, reasoning and quality, as far as they are asked."""
    first, result = (Picture(path, jpeg=True, max_side=768, detail="high") for path in files)
    category = item["category"]
    values = {"instruct": item["instruction"], "reference": str(item.get("reference") or "")}
    shows_first = bool(item.get("reasoning_img"))
    if category in ("temporal_reasoning", "causal_reasoning"):
        consistency, quality = "prompt_consist", "prompt_generation"
        reasoning = "prompt_reasoning_w_input" if shows_first else "prompt_reasoning"
    elif category == "spatial_reasoning":
        consistency, quality = "prompt_spatial_cons", "prompt_spatial_qual"
        reasoning = "prompt_spatial_ref_w_input" if shows_first else "prompt_spatial_ref"
        if item.get("reference_img"):
            reasoning, shows_first = "prompt_spatial_ref_img", True
    else:
        quality, shows_first = "", False
        if item.get("reference_txt"):
            consistency, reasoning = "prompt_logical_cons_ans", "prompt_logical_txt"
            values["reference"] = str(item["reference_txt"])
        else:
            consistency, shows_first = "prompt_logical_cons", True
            reasoning = "prompt_logical_img"
            if "reasoning_wo_ins" in item:
                reasoning = "prompt_logical_img_wo_q"

    def question(name: str, template: str, pictures: tuple[Picture, ...]) -> Question:
        # Some of the texts have no fields and are sent as they are.
        text = prompts[template]
        has_fields = "{instruct}" in text or "{reference}" in text
        text = official.fill(text, values) if has_fields else text
        return Question(name, (("user", text),), pictures)

    questions = []
    if not item.get("consistency_free"):
        questions.append(question("consistency", consistency, (first, result)))
    both = (first, result) if shows_first else (result,)
    questions.append(question("reasoning", reasoning, both))
    if quality:
        questions.append(question("quality", quality, (result,)))
    return questions


def _parse_final_score(reply: str) -> Scores:
    """Return the numbers after the first "Final Score" that has any."""
    for match in re.finditer(r"final scores?\**:?\s*([\d*\s,]*)", reply, re.IGNORECASE):
        numbers = [float(number) for number in re.findall(r"\d+", match[1])]
        if numbers:
            return numbers
    return None


def _rise_score(item: Item, numbers: Mapping[str, list[float]]) -> dict[str, float]:
    """Return consistency, reasoning, quality and score, 1 to 5, and whether all are 5.

    Logic is judged with 0 and 1, which stand for 1 and 5. An item whose consistency is not judged
    is scored by the two others. The benchmark's own file scores all items in this way if the field
    `consistency_free` is in its data and empty there, since an empty field counts as true.
    """
    values = {name: row[0] for name, row in numbers.items()}
    if item["category"] == "logical_reasoning":
        values = {name: 4 * min(value, 1) + 1 for name, value in values.items()}
    names = frozenset(values)
    weights = next(weights for weights in _WEIGHTS if names == frozenset(weights))
    score = sum(weight * values[name] for name, weight in weights.items())
    if values["reasoning"] == 1:
        score = max(score / 2, 1)
    is_complete = all(value == 5 for value in values.values())
    return {**values, "score": score, "accuracy": float(is_complete)}


PROTOCOL = Protocol(
    items=json_items,
    name=lambda item: str(item["index"]),
    files=_rise_files,
    questions=_rise_questions,
    prompts=lambda folder: official.read_constants(folder / PROMPTS, PROMPT_NAMES),
    parse=_parse_final_score,
    score=_rise_score,
    groups=lambda item: (item["category"],),
    summarize=mean_of_groups,
    settings={"max_tokens": 4096, "n": 1, "temperature": 0},
    attempts=1,
    judge="gpt-4.1-2025-04-14",
    commit="5f22651",
    prompt_files=(PROMPTS,),
)

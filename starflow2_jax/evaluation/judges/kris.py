"""KRIS-Bench: edits that need knowledge, on scales of 1 to 5 that are reported as 0 to 100.

The repository of the benchmark lacks the texts of the judge and a summary, so this restates BAGEL's
copy. Two of its slips are part of the published scores and are kept: the text for anomalies is not
used, since the code looks for another name of the category, and the common categories show the
edited image as "the original image" when its quality is judged.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starflow2_jax.data import untrusted
from starflow2_jax.evaluation.judges import official
from starflow2_jax.evaluation.judges.protocol import Item, Picture, Protocol, Question, Scores
from starflow2_jax.runtime import json_text

PROMPTS = "eval/gen/kris/prompts.py"
PROMPT_NAMES = (
    "prompt_consist", "prompt_quality", "prompt_instruction_following", "prompt_dual_evaluation",
    "prompt_view_instruction_following", "prompt_consist_temporal", "prompt_instruction_temporal",
    "prompt_consist_multi", "prompt_instruction_multi",
)  # fmt: skip

# Levels of knowledge, their types, and the categories of those.
LEVELS = {
    "Factual Knowledge": {
        "Attribute Perception": (
            "count_change", "color_change", "size_adjustment", "part_completion",
            "anomaly_correction",
        ),
        "Spatial Perception": ("viewpoint_change", "position_movement"),
        "Temporal Prediction": ("temporal_prediction",),
    },
    "Conceptual Knowledge": {
        "Social Science": ("humanities", "practical_knowledge"),
        "Natural Science": (
            "biology", "chemistry", "geography", "medicine", "mathematics", "physics",
        ),
    },
    "Procedural Knowledge": {
        "Logical Reasoning": ("abstract_reasoning", "rule-based_reasoning"),
        "Instruction Decomposition": ("multi-element_composition", "multi-instruction_execution"),
    },
}  # fmt: skip
_TYPES_WITH_KNOWLEDGE = ("Social Science", "Natural Science", "Logical Reasoning")
_GROUPS = {
    category: (category, kind, level)
    for level, kinds in LEVELS.items()
    for kind, categories in kinds.items()
    for category in categories
}
_ALL = "all"
ORIGINAL, EDITED = "This is the original image:", "This is the edited image:"
TO_EVALUATE, TRUTH = "This is the image to evaluate:", "This is the ground truth image:"


def _kris_items(paths: Sequence[Path]) -> list[Item]:
    """Return the rows of a folder of `CATEGORY/annotation.json`, or of BAGEL's list of all."""
    items: list[Item] = []
    for path in paths:
        if path.is_dir():
            for file in sorted(path.glob("*/annotation.json")):
                table = untrusted.read_json(file, dict[str, dict[str, Any]])
                items += [
                    {**row, "id": key, "type": file.parent.name} for key, row in table.items()
                ]
        else:
            items += untrusted.read_json(path, list[dict[str, Any]])
    unknown = sorted({str(item.get("type")) for item in items} - set(_GROUPS))
    if unknown or not items:
        raise ValueError(f"{paths[0]}: no items of KRIS-Bench; unknown categories: {unknown}")
    return items


def _kris_files(item: Item, tree: Path, sources: Path) -> list[Path]:
    """Return the original images, the true one of a change of viewpoint, and the edit."""
    names = [item["ori_img"]] if isinstance(item["ori_img"], str) else list(item["ori_img"])
    if item["type"] == "viewpoint_change":
        names.append(item["gt_img"])
    folder = sources / item["type"]
    return [*(folder / name for name in names), tree / item["type"] / f"{item['id']}.png"]


def _picture(path: Path, label: str) -> Picture:
    return Picture(path, label=label, media_type="image/jpeg")


def _frames(files: Sequence[Path]) -> tuple[int, tuple[Picture, ...]]:
    """Return the number of the edited frame, and all frames in their order."""
    matches = [re.search(r"(\d+)-(\d+)", path.name) for path in files[:-1]]
    numbers = [int(match[2]) for match in matches if match]
    if len(numbers) != len(files) - 1:
        names = ", ".join(path.name for path in files[:-1])
        raise ValueError(f"frames {names}: expected names such as 1-2.jpg, with their number")
    missing = {1, 2, 3, 4} - set(numbers)
    edited = missing.pop() if len(missing) == 1 else max(numbers, default=0) + 1
    kinds = ["Reference"] * len(numbers) + ["Generated"]
    frames = sorted(zip([*numbers, edited], kinds, files))
    pictures = (
        Picture(path, jpeg=True, quality=85, label=f"Frame {number} ({kind}):")
        for number, kind, path in frames
    )
    return edited, tuple(pictures)


def _kris_questions(item: Item, files: list[Path], prompts: Any) -> list[Question]:
    """Return the questions about consistency, instruction (and knowledge), and quality."""
    category, edit = item["type"], files[-1]
    values = {"instruct": item["ins_en"], "explanation": item.get("explain_en") or ""}
    pictures = (_picture(files[0], ORIGINAL), _picture(edit, EDITED))
    consistency, instruction = "prompt_consist", "prompt_instruction_following"
    of_instruction, parse = pictures, _parser("instruction_score")
    quality = _picture(edit, EDITED)
    if category == "temporal_prediction":
        number, pictures = _frames(files)
        values["N"] = str(number)
        consistency, instruction = "prompt_consist_temporal", "prompt_instruction_temporal"
        of_instruction = pictures
        quality = Picture(edit, jpeg=True, quality=85, label=TO_EVALUATE)
    elif category == "multi-element_composition":
        sources = (_picture(path, f"Reference Image {i}:") for i, path in enumerate(files[:-1], 1))
        pictures = of_instruction = (*sources, _picture(edit, "Predicted Image:"))
        consistency, instruction = "prompt_consist_multi", "prompt_instruction_multi"
        quality = _picture(edit, TO_EVALUATE)
    elif category == "viewpoint_change":
        instruction = "prompt_view_instruction_following"
        of_instruction = (*pictures, _picture(files[1], TRUTH))
    elif _GROUPS[category][1] in _TYPES_WITH_KNOWLEDGE:
        instruction = "prompt_dual_evaluation"
        parse = _parser("instruction_score", "knowledge_score")
    else:
        quality = _picture(edit, ORIGINAL)

    def text(name: str) -> tuple[tuple[str, str], ...]:
        return (("user", official.fill(prompts[name], values)),)

    return [
        Question("consistency", text(consistency), pictures, _parser("consistency_score")),
        Question("instruction", text(instruction), of_instruction, parse),
        # This text has no fields and is sent as it is.
        Question(
            "quality",
            (("user", prompts["prompt_quality"]),),
            (quality,),
            _parser("quality_score"),
        ),
    ]


def _parser(*names: str) -> Callable[[str], Scores]:
    return functools.partial(_parse, names)


def _parse(names: Sequence[str], reply: str) -> Scores:
    """Return the numbers of these names, 1 to 5.

    They are read from a JSON object, or else from `name: number`, as most replies follow the
    format of the prompt, which is not JSON. One alone may also be `4/5`, `4 out of 5`, or all of a
    reply. The official file takes the first digit of any other reply, which may be that of a list.
    """
    for block in re.findall(r"\{[^{}]*\}", reply):
        try:
            fields = json_text.decode(block, "the reply")
        except ValueError:
            continue
        numbers = [fields.get(name) for name in names]
        if all(str(number) in "12345" and str(number) for number in numbers):
            return [float(number) for number in numbers]
    matches = [
        re.findall(rf"{name.replace('_', '[_ ]*')}\W{{0,6}}([1-5])(?![\d.]*\d)", reply, re.I)
        for name in names
    ]
    if len(names) == 1 and not matches[0]:
        matches = [re.findall(r"\b([1-5])\s*(?:/|out\s+of)\s*5\b|\A\s*\**([1-5])\**\s*\Z", reply)]
        matches = [[a or b for a, b in row] for row in matches]
    return [float(row[-1]) for row in matches] if all(matches) else None


def _kris_score(item: Item, numbers: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the scores from 0 to 100, their number and sum.

    VC is the visual consistency, VQ the quality, IF the following of the instruction, and KP the
    plausibility by knowledge.
    """
    values = [numbers["consistency"][0], numbers["quality"][0], *numbers["instruction"]]
    scores = {name: (value - 1) * 25 for name, value in zip(("VC", "VQ", "IF", "KP"), values)}
    return {**scores, "judged": float(len(scores)), "sum": sum(scores.values())}


def _kris_overall(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over all single scores, of each type and level, and of everything."""
    names = [name for level, kinds in LEVELS.items() for name in (*kinds, level)]
    return {
        name: groups[name]["sum"] / groups[name]["judged"]
        for name in (*names, _ALL)
        if name in groups
    }


PROTOCOL = Protocol(
    items=_kris_items,
    name=lambda item: f"{item['type']}/{item['id']}",
    files=_kris_files,
    questions=_kris_questions,
    prompts=lambda folder: official.read_constants(folder / PROMPTS, PROMPT_NAMES),
    parse=_parser("quality_score"),
    score=_kris_score,
    groups=lambda item: (*_GROUPS[item["type"]], _ALL),
    summarize=_kris_overall,
    settings={"max_tokens": 1000},
    attempts=1,
    judge="gpt-4o-2024-11-20",
    commit="ByteDance-Seed/Bagel 056b5fd",
    prompt_files=(PROMPTS,),
)

"""GEdit-Bench: the VIEScore of edits, semantics (SC) and quality (PQ), 0 to 10."""

import math
import re
from collections.abc import Mapping, Sequence
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
from starflow2_jax.importers import tables as reader
from starflow2_jax.runtime import json_text

_COLUMNS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
PROMPTS = "GEdit-Bench/viescore/vie_prompts.py"


def _gedit_files(item: Item, tree: Path, sources: Path) -> list[Path]:
    folder = tree / "fullset" / item["task_type"] / item["instruction_language"]
    return [folder / f"{item['key']}_SRCIMG.png", folder / f"{item['key']}.png"]


def _gedit_prompts(folder: Path) -> dict[str, str]:
    names = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule",
             "_prompts_0shot_tie_rule_SC", "_prompts_0shot_rule_PQ")  # fmt: skip
    context, rule, semantics, quality = official.read_constants(folder / PROMPTS, names).values()
    return {
        "SC": "\n".join([context, rule, semantics]),
        "PQ": "\n".join([context, quality]),
    }


def _gedit_questions(item: Item, files: list[Path], prompts: Any) -> list[Question]:
    source = Picture(files[0], jpeg=True)
    result = Picture(files[1], jpeg=True, size_of=files[0])
    semantics = prompts["SC"].replace("<instruction>", item["instruction"])
    return [
        Question("SC", (("user", semantics),), (source, result)),
        Question("PQ", (("user", prompts["PQ"]),), (result,)),
    ]


def _parse_viescore(reply: str) -> Scores:
    """Return the list `score` of a JSON object, or a reply that is a list or a number alone."""
    match = re.search(r"\{.*\}", reply, re.DOTALL)
    text = match[0] if match else reply.strip()
    try:
        value = json_text.decode(text.replace("\n", " "), "the reply")
    except ValueError:
        match = re.search(r"score\W*\[([\d.,\s]+)\]", text)
        if not match:
            return None
        value = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", match[1])]
    value = value.get("score") if isinstance(value, dict) else value
    numbers = value if isinstance(value, list) else [value]
    is_valid = numbers and all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= 10 for n in numbers
    )
    return [float(n) for n in numbers] if is_valid else None


def _gedit_score(item: Item, numbers: Mapping[str, list[float]]) -> dict[str, float]:
    semantics, quality = min(numbers["SC"]), min(numbers["PQ"])
    return {"G_SC": semantics, "G_PQ": quality, "G_O": math.sqrt(semantics * quality)}


def _items(paths: Sequence[Path]) -> list[Item]:
    """Return the rows of parquet files, of folders of them, or of JSON files."""
    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError(f"{paths[0]}: there are no .parquet files in this folder")
    tables = [file for file in files if file.suffix == ".parquet"]
    rows = reader.parquet_rows(tables, _COLUMNS) if tables else ()
    json_files = [file for file in files if file not in tables]
    return [*(row for _, row in rows), *json_items(json_files)]


def _groups(item: Item) -> tuple[str, ...]:
    """Return the groups of an item: its type within the full set and within the intersection."""
    name = f"{item['instruction_language']}/{item['task_type']}"
    names = (f"fullset/{name}",)
    return (*names, f"intersection/{name}") if item.get("Intersection_exist") else names


def _overall(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over types of every score, by set and language."""
    prefixes = dict.fromkeys(name.rsplit("/", 1)[0] for name in groups)
    overall = {}
    for prefix in prefixes:
        rows = {n: row for n, row in groups.items() if n.rsplit("/", 1)[0] == prefix}
        overall |= {f"{prefix} {name}": value for name, value in mean_of_groups(rows).items()}
    return overall


PROTOCOL = Protocol(
    items=_items,
    name=lambda item: f"{item['task_type']}/{item['instruction_language']}/{item['key']}",
    files=_gedit_files,
    questions=_gedit_questions,
    prompts=_gedit_prompts,
    parse=_parse_viescore,
    score=_gedit_score,
    groups=_groups,
    summarize=_overall,
    settings={"max_tokens": 1400},
    attempts=2,
    judge="gpt-4.1",
    commit="570eba6",
    prompt_files=(PROMPTS,),
)

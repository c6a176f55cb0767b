"""ImgEdit-Basic: edits on three scales of 1 to 5, by type of edit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starflow2_jax.data import untrusted
from starflow2_jax.evaluation.judges.protocol import (
    Item,
    Picture,
    Protocol,
    Question,
    Scores,
    mean_of_groups,
)

PROMPTS = "Benchmark/Basic/prompts.json"


def _imgedit_items(paths: Sequence[Path]) -> list[Item]:
    """Return the rows of files that map keys to rows."""
    tables = [untrusted.read_json(path, dict[str, dict[str, Any]]) for path in paths]
    return [{**row, "key": key} for table in tables for key, row in table.items()]


def _imgedit_questions(item: Item, files: list[Path], prompts: Any) -> list[Question]:
    text = prompts[item["edit_type"]].replace("<edit_prompt>", item["prompt"])
    return [Question("edit", (("user", text),), tuple(map(Picture, files)))]


def _parse_imgedit(reply: str) -> Scores:
    """Return the numbers of the lines `NAME: NUMBER`."""
    parts = [line.strip().split(": ") for line in reply.splitlines()]
    numbers = [float(part[1]) for part in parts if len(part) == 2 and part[1].isdigit()]
    return numbers or None


def _imgedit_score(item: Item, numbers: Mapping[str, list[float]]) -> dict[str, float]:
    return {"score": sum(numbers["edit"]) / len(numbers["edit"])}


PROTOCOL = Protocol(
    items=_imgedit_items,
    name=lambda item: item["key"],
    files=lambda item, tree, sources: [sources / item["id"], tree / f"{item['key']}.png"],
    questions=_imgedit_questions,
    prompts=lambda folder: untrusted.read_json(folder / PROMPTS, dict[str, str]),
    parse=_parse_imgedit,
    score=_imgedit_score,
    groups=lambda item: (item["edit_type"],),
    summarize=mean_of_groups,
    settings={},
    attempts=1,
    judge="gpt-4.1",
    commit="547185d",
    prompt_files=(PROMPTS,),
)

"""The prompt files of public benchmarks in their own formats, with six prompts each."""

import hashlib
import json

import numpy as np
from PIL import Image

from starflow2_jax.evaluation.benchmarks import tree

SIDE = 8
COLORS = ("red", "green", "blue", "white", "black", "yellow")
PROMPTS = [f"a {color} circle" for color in COLORS]
GEDIT_TASKS = ("background_change", "color_alter", "subject-add")
RISE_CATEGORIES = ("temporal_reasoning", "logical_reasoning")
KRIS_CATEGORIES = ("color_change", "multi-element_composition")


def make(root):
    """Write the files of every benchmark under `root`; return the `--prompts` of each."""
    import pyarrow
    from pyarrow import parquet

    for number in range(len(PROMPTS)):
        for folder in ("imgedit/animal", "rise/pictures", *(f"kris/{c}" for c in KRIS_CATEGORIES)):
            save_source(root / folder / f"{number + 1}.png", number)
    rows = [{"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": prompt}
            for prompt in PROMPTS]  # fmt: skip
    (root / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "dpg").mkdir()
    for number, prompt in enumerate(PROMPTS):
        (root / "dpg" / f"COCOval2014_{number}.txt").write_text(prompt + "\n")
    table = {
        str(100 + n): {"id": f"animal/{n + 1}.png", "prompt": prompt, "edit_type": "adjust"}
        for n, prompt in enumerate(PROMPTS)
    }
    (root / "imgedit" / "basic_edit.json").write_text(json.dumps(table))
    rows = [{"index": f"{RISE_CATEGORIES[n % 2]}_{n}", "category": RISE_CATEGORIES[n % 2],
             "instruction": prompt, "image": f"pictures/{n + 1}.png"}
            for n, prompt in enumerate(PROMPTS)]  # fmt: skip
    (root / "rise" / "data_total.json").write_text(json.dumps(rows))
    for category in KRIS_CATEGORIES:
        table = {
            str(n + 1): {"ori_img": kris_sources(category, n), "ins_en": PROMPTS[n]}
            for n in range(3)
        }
        (root / "kris" / category / "annotation.json").write_text(json.dumps(table))
    for version, numbers in (("wise", (1, 2, 450, 600, 750, 1000)),
                             ("wise_verified", (1, 2, 450, 600, 700, 1000))):  # fmt: skip
        rows = [{"Prompt": prompt, "Explanation": "", "Category": category, "prompt_id": number}
                for prompt, category, number in zip(PROMPTS, WISE_CATEGORIES, numbers)]  # fmt: skip
        (root / f"{version}_1.json").write_text(json.dumps(rows[:4]))
        (root / f"{version}_2.json").write_text(json.dumps(rows[4:]))
    images = [{"bytes": source_bytes(n), "path": f"{n}.png"} for n in range(len(PROMPTS))]
    parquet.write_table(
        pyarrow.table({
            "key": [f"key{n // 2}" for n in range(6)],
            "task_type": [GEDIT_TASKS[n // 2] for n in range(6)],
            "instruction": PROMPTS,
            "instruction_language": ["en", "cn"] * 3,
            "Intersection_exist": [True] * 6,
            "input_image": images,
            "input_image_raw": images,
        }),
        root / "gedit.parquet",
        row_group_size=4,
    )  # fmt: skip
    return {
        "geneval": [str(root / "geneval.jsonl")],
        "dpg": [str(root / "dpg")],
        "gedit": [str(root / "gedit.parquet")],
        "imgedit": [str(root / "imgedit" / "basic_edit.json")],
        "rise": [str(root / "rise" / "data_total.json")],
        "kris": [str(root / "kris")],
        "wise": [str(root / "wise_1.json"), str(root / "wise_2.json")],
        "wise_verified": [str(root / "wise_verified_1.json"), str(root / "wise_verified_2.json")],
    }


WISE_CATEGORIES = ("Cultural knowledge", "Cultural knowledge", "time", "Space", "Biology",
                   "Chemistry")  # fmt: skip


def kris_sources(category, number):
    """Return the names of the source images of a prompt, one or several."""
    if category == KRIS_CATEGORIES[0]:
        return f"{number + 1}.png"
    return [f"{number + 1}.png", f"{number + 2}.png"]


def source_pixels(number):
    """Return the source image of the prompt with a number, wider than it is high."""
    return np.full((6, 12, 3), 40 * number, np.uint8)


def save_source(path, number):
    """Write a source image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(source_pixels(number)).save(path)


def source_bytes(number):
    """Return a source image as PNG."""
    from starflow2_jax.data import images

    return images.encode_png(source_pixels(number))


def picture(prompt, sample):
    """Return the picture that `draw` draws of a prompt."""
    digest = hashlib.sha256(f"{prompt} {sample}".encode()).digest()
    rng = np.random.default_rng(list(digest))
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def drawer(samples):
    """Return a function that stands in for a model."""

    def draw(items, numbers):
        return [
            [tree.Picture(picture(item.prompt, k), {"log_likelihood": 1.5}) for k in range(samples)]
            for item in items
        ]

    return draw

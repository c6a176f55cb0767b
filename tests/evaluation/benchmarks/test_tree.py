"""Trees of public benchmarks: every evaluator's walk, kills, shards, checks and stamps."""

import json
import re

import numpy as np
import pytest
from helpers import benchmark_files, kills
from helpers.benchmark_files import PROMPTS, SIDE, drawer, picture
from PIL import Image

from starflow2_jax.evaluation.benchmarks import items, layouts, tree
from starflow2_jax.inference import output

pytestmark = pytest.mark.fast
SETTINGS = {"guidance": 3.0, "seed": 0}


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory):
    """The files of every benchmark."""
    return benchmark_files.make(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def trees(prompt_files, tmp_path_factory):
    """The folder of a complete tree of every benchmark."""
    folder = tmp_path_factory.mktemp("trees")
    for name, prompts in prompt_files.items():
        write(tree.open_tree(str(folder / name), name, prompts=prompts))
    return folder


def write(benchmark, **options):
    settings = {**tree.describe(benchmark), **SETTINGS}
    stamp = tree.start(benchmark.out, settings, overwrite=False)
    return tree.write(benchmark, stamp, drawer(benchmark.samples), **options)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --------------------------------------------------------------------- the walks of the evaluators


def test_geneval_is_walked(trees):
    """Folders of digits alone, each with its metadata, and samples of digits alone."""
    scored = {}
    for folder in (trees / "geneval").iterdir():
        if not folder.is_dir() or not folder.name.isdigit():
            continue
        prompt = json.loads((folder / "metadata.jsonl").read_text())["prompt"]
        for path in (folder / "samples").iterdir():
            if re.match(r"\d+\.png", path.name):
                scored[prompt, int(path.stem)] = pixels(path)
    assert set(scored) == {(prompt, k) for prompt in PROMPTS for k in range(4)}
    for (prompt, k), image in scored.items():
        np.testing.assert_array_equal(image, picture(prompt, k))


def test_dpg_bench_is_walked(trees):
    """Every entry of the folder is cut into four tiles; names end at the first dot."""
    questions = {f"COCOval2014_{n}": prompt for n, prompt in enumerate(PROMPTS)}
    scored, failed = [], []
    for path in (trees / "dpg").iterdir():
        try:
            image = Image.open(path)
            prompt = questions[path.name.split(".")[0]]
        except (KeyError, OSError):
            failed.append(path.name)
            continue
        assert image.size == (2 * SIDE, 2 * SIDE)
        corners = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
        for k, (left, top) in enumerate(corners):
            tile = image.crop((left, top, left + SIDE, top + SIDE))
            np.testing.assert_array_equal(np.asarray(tile), picture(prompt, k))
        scored.append(prompt)
    assert sorted(scored) == sorted(PROMPTS) and failed == ["settings.json"]


def test_gedit_bench_is_walked(trees):
    """An item needs the edit and its source; the edit is scaled to the size of the source."""
    for n, prompt in enumerate(PROMPTS):
        folder = trees / "gedit" / "fullset" / benchmark_files.GEDIT_TASKS[n // 2]
        stem = folder / ("en", "cn")[n % 2] / f"key{n // 2}"
        source, edit = pixels(f"{stem}_SRCIMG.png"), pixels(f"{stem}.png")
        np.testing.assert_array_equal(source, benchmark_files.source_pixels(n))
        np.testing.assert_array_equal(edit, picture(prompt, 0))
    assert len(list((trees / "gedit").rglob("*.png"))) == 12


def test_imgedit_is_walked(trees, prompt_files):
    """The edit of a key of the JSON file is KEY.png."""
    with open(prompt_files["imgedit"][0]) as file:
        edits = json.load(file)
    for key, row in edits.items():
        image = pixels(trees / "imgedit" / f"{key}.png")
        np.testing.assert_array_equal(image, picture(row["prompt"], 0))


def test_risebench_is_walked(trees, prompt_files):
    """An edit is looked for under three endings in images/CATEGORY."""
    with open(prompt_files["rise"][0]) as file:
        rows = json.load(file)
    for row in rows:
        folder = trees / "rise" / "images" / row["category"]
        paths = [folder / f"{row['index']}.{ending}" for ending in ("png", "jpg", "jpeg")]
        path = next(path for path in paths if path.exists())
        np.testing.assert_array_equal(pixels(path), picture(row["instruction"], 0))


def test_kris_bench_is_walked(trees, prompt_files):
    """The official evaluator opens CATEGORY/ID.jpg, BAGEL's copy CATEGORY/ID.png."""
    for category in benchmark_files.KRIS_CATEGORIES:
        for id in ("1", "2", "3"):
            expected = picture(PROMPTS[int(id) - 1], 0)
            np.testing.assert_array_equal(pixels(trees / "kris" / category / f"{id}.png"), expected)
            compressed = pixels(trees / "kris" / category / f"{id}.jpg").astype(int)
            assert np.abs(compressed - expected).mean() < 10


@pytest.mark.parametrize("version", ["wise", "wise_verified"])
def test_wise_is_walked(trees, prompt_files, version):
    """The picture of a prompt is PROMPT_ID.png."""
    for path in prompt_files[version]:
        with open(path) as file:
            rows = json.load(file)
        for row in rows:
            image = pixels(trees / version / f"{row['prompt_id']}.png")
            np.testing.assert_array_equal(image, picture(row["Prompt"], 0))


# ------------------------------------------------------------------------- kills, shards and checks


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(trees, prompt_files, tmp_path):
    """A kill at many of the calls that change files, and the same command again."""
    setup = """
    import json, shutil
    from helpers.benchmark_files import drawer
    from helpers.kills import contents
    from starflow2_jax.evaluation.benchmarks import tree

    out, complete = sys.argv[1:3]
    trees = [
        tree.open_tree(f"{out}/{name}", name, prompts=prompts, max_rows=8)
        for name, prompts in json.loads(sys.argv[3]).items()
    ]

    def prepare():
        shutil.rmtree(out, ignore_errors=True)

    def write():
        for benchmark in trees:
            settings = {**tree.describe(benchmark), "guidance": 3.0, "seed": 0}
            stamp = tree.start(benchmark.out, settings, overwrite=False)
            tree.write(benchmark, stamp, drawer(benchmark.samples))

    def check_killed():
        pass

    def check_finished():
        assert contents(out) == contents(complete)
    """
    args = (tmp_path / "out", trees, json.dumps(prompt_files))
    assert kills.kill_everywhere(setup, *args, every=151) > 1000


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_shards_together_are_one_run(trees, prompt_files, tmp_path, name):
    counts = []
    for shard in ("0/2", "1/2"):
        options = {"prompts": prompt_files[name], "max_rows": layouts.LAYOUTS[name].samples * 2}
        counts.append(write(tree.open_tree(str(tmp_path), name, shard=shard, **options)))
    assert all(counts) and kills.contents(tmp_path) == kills.contents(trees / name)


def test_the_check_names_a_missing_and_a_truncated_file(trees, prompt_files, tmp_path):
    benchmark = tree.open_tree(str(tmp_path), "geneval", prompts=prompt_files["geneval"])
    with pytest.raises(ValueError, match=r"has no settings\.json"):
        tree.check(benchmark)
    assert write(benchmark) == 30
    assert tree.check(benchmark) == ([], 30)
    (tmp_path / "00001" / "samples" / "00002.png").unlink()
    truncated = tmp_path / "00004" / "samples" / "00000.png"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    (tmp_path / "00005" / "metadata.jsonl").write_text("{}\n")
    faults, count = tree.check(benchmark)
    assert count == 30 and faults == [
        tree.Fault("00001/samples/00002.png", "missing", "00001"),
        tree.Fault("00004/samples/00000.png", "truncated", "00004"),
        tree.Fault("00005/metadata.jsonl", "another text", "00005"),
    ]
    assert write(benchmark) == 3 and write(benchmark) == 0
    assert kills.contents(tmp_path) == kills.contents(trees / "geneval")
    other = tree.open_tree(str(tmp_path), "geneval", prompts=prompt_files["geneval"], samples=2)
    with pytest.raises(ValueError, match="samples is 4 in the tree, 2 in this command"):
        tree.check(other)


def test_the_stamp_is_in_every_file_and_another_one_is_refused(prompt_files, tmp_path):
    benchmark = tree.open_tree(str(tmp_path / "out"), "kris", prompts=prompt_files["kris"])
    write(benchmark)
    settings = tree.read_settings(benchmark.out)
    assert settings["prompts"]["count"] == 6 and settings["rewriting"] == "none"
    stamp = tree.stamp_of((benchmark.out / tree.SETTINGS).read_text())
    with Image.open(tmp_path / "out" / "color_change" / "1.png") as image:
        note = json.loads(image.text[output.PNG_KEY])
    expected = {"stamp": stamp, "item": "color_change/1", "prompt": PROMPTS[0], "sample": 0}
    assert note == {**expected, "log_likelihood": 1.5}
    changed = {**settings, "guidance": 2.0}
    with pytest.raises(ValueError, match=r"guidance is 3\.0 in the tree, 2\.0 in this command"):
        tree.start(benchmark.out, changed, overwrite=False)
    # After a kill of a run that overwrites, the old pictures are none of its own.
    other = tree.start(benchmark.out, changed, overwrite=True)
    reasons = {fault.reason for fault in tree.check(benchmark)[0]}
    assert other != stamp and reasons == {"another run"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    full = tree.open_tree(str(tmp_path / "full"), "kris", prompts=prompt_files["kris"])
    with pytest.raises(ValueError, match="is not empty"):
        write(full)


# ------------------------------------------------------------------------------- the prompt files


def test_rewritten_texts_replace_the_prompts(prompt_files, tmp_path):
    with open(prompt_files["geneval"][0]) as file:
        rows = [json.loads(line) for line in file]
    longer = [{**row, "prompt": f"{row['prompt']}, in detail"} for row in rows]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in longer))
    options = {"prompts": prompt_files["geneval"], "rewrite": [str(path)]}
    benchmark = tree.open_tree(str(tmp_path / "out"), "geneval", **options)
    assert benchmark.items[0].prompt == "a red circle, in detail"
    assert benchmark.items[0].row["prompt"] == "a red circle"
    assert tree.describe(benchmark)["rewriting"] == {"sha256": items.sha256([str(path)])}
    path.write_text(json.dumps(longer[0]) + "\n")
    with pytest.raises(ValueError, match="no rewritten text for prompt '00001'"):
        tree.open_tree(str(tmp_path / "out"), "geneval", **options)


def test_edits_have_their_sources(prompt_files):
    for name in ("gedit", "imgedit", "rise", "kris"):
        for item in layouts.read_items(name, prompt_files[name], None):
            number = PROMPTS.index(item.prompt)
            source = tree.read_source(item.images[0], item.name)
            np.testing.assert_array_equal(source, benchmark_files.source_pixels(number))
    several = layouts.read_items("kris", prompt_files["kris"], None)[-1]
    assert [path.name for path in several.images] == ["3.png", "4.png"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("geneval", "[]\n", r"line 1: expected an object with a text `prompt`"),
        ("geneval", "", "contains no prompt"),
        ("imgedit", '{"../1": {"id": "a.png", "prompt": "a"}}', "cannot be the name of a file"),
        ("imgedit", '{"1": {"id": "../../a.png", "prompt": "a"}}', "is outside of"),
        ("imgedit", '{"1": {"id": "a.png"}}', "missing required field `prompt`"),
        ("rise", '[{"index": "1", "category": "a/b", "instruction": "", "image": "a"}]', "'a/b'"),
        ("wise", '[{"Prompt": "a", "prompt_id": 641, "Category": "Biology"}]',
         "prompt 641 is of Biology, which has 701 to 800 in wise; the file belongs to the other"),
        ("wise", '[{"Prompt": "a", "prompt_id": 1}, {"Prompt": "b", "prompt_id": 1}]',
         "prompt '1' occurs 2 times"),
    ],
)  # fmt: skip
def test_files_of_another_format_are_named(tmp_path, name, text, message):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        layouts.read_items(name, [str(path)], None)


@pytest.mark.parametrize("name", ["geneval", "imgedit", "rise", "kris", "wise"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / "prompts.json"
    for data in (b"[" * 100_000, b'["\\ud800"]', b"\xff", b"{}", b"[]", b"[3]", b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"prompts\.json"):
            layouts.read_items(name, [str(path)], None)


def test_arguments_that_are_refused(prompt_files):
    for name, options, message in (
        ("genevl", {}, "expected one of geneval, dpg"),
        ("dpg", {"samples": 1}, "--n=1: dpg is scored with n=4"),
        ("dpg", {"shard": "2/2"}, r"--shard=2/2: expected i/n with i from 0 to n - 1"),
    ):
        prompts = prompt_files.get(name, ["a"])
        with pytest.raises(ValueError, match=message):
            tree.open_tree("out", name, prompts=prompts, **options)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        layouts.read_items("wise", ["/nowhere.json"], None)

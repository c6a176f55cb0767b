"""Tests of README.md and docs/: limits, links, commands, keys and paths, without running them."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from helpers.markdown import PAGES, blocks, spans
from helpers.paths import ROOT

from starflow2_jax import config
from starflow2_jax.runtime import cli

NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}
COMMANDS = ("prepare", "convert", "train", "generate", "serve", "evaluate", "plan", "bench")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", NAMES.values(), ids=NAMES.keys())


def prose(page):
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and MyST derive them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_page
def test_lines_fit(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= (160 if line.startswith("|") else 120), f"{page}:{number}"


@each_page
def test_links_and_images_exist(page):
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"


@each_page
def test_the_files_that_are_named_exist(page):
    package = ROOT / "starflow2_jax"
    folders = {folder.name for folder in package.iterdir() if folder.is_dir()}
    roots = {"docs", "experiments", "launch", "starflow2_jax", "tests"}
    for span in spans(page):
        for word in span.split():
            first, slash, _ = word.partition("/")
            if not slash or not re.fullmatch(r"[\w./]+(\.(py|md|sh|sbatch|yaml)|/)", word):
                continue
            if first in roots:
                assert (ROOT / word).exists(), f"{page}: {word}"
            elif first in folders and word.endswith((".py", "/")):
                assert (package / word).exists(), f"{page}: {word}"


def commands(page):
    """Return (command, arguments) of every command line in a page."""
    lines = [line for block in blocks(page) for line in block.lines()]
    lines += [f"python -m starflow2_jax.{span}" for span in spans(page) if " --" in span]
    command_lines = []
    for line in lines:
        for match in re.finditer(r"python -m starflow2_jax\.(\w+)(.*)", line):
            if match[1] in COMMANDS:
                words = shlex.split(match[2].split(")")[0], comments=True)
                command_lines.append((match[1], words))
    return command_lines


@pytest.fixture(scope="module")
def flags():
    """Return the names of the flags of every command."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"starflow2_jax.{name}", "--helpfull"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in COMMANDS
    }
    names = {}
    for name, process in processes.items():
        text, _ = process.communicate()
        names[name] = set(re.findall(r"^ +(?:-\w,)?--(?:\[no\])?([\w.]+):", text, re.M))
        names[name] |= {f"no{flag}" for flag in re.findall(r"--\[no\](\w+):", text)}
    return names


@each_page
def test_commands_have_their_verbs_flags_experiments_and_keys(page, flags):
    for name, words in commands(page):
        location = f"{page}: {name} {' '.join(words)}"
        verbs = getattr(importlib.import_module(f"starflow2_jax.{name}"), "VERBS", None)
        if verbs is not None:
            assert words[0] in verbs, location
        for i, word in enumerate(words):
            flag, _, _ = word.partition("=")
            if flag.startswith("--config."):
                key = flag.removeprefix("--config.")
                assert key in config.KEYS or key.startswith("model."), location
            elif flag.startswith("--"):
                assert flag[2:] in flags[name], location
            if flag == "--config" and "$" not in words[i + 1]:
                path, _, variant = cli.experiment_path(words[i + 1]).partition(":")
                get_config = runpy.run_path(str(ROOT / path))["get_config"]
                if not variant.startswith("runs/"):
                    get_config(*variant.split(":", 1) if variant else ())


@each_page
def test_the_keys_that_are_named_exist(page):
    groups = {name.split(".")[0] for name in config.KEYS if "." in name}
    for span in spans(page):
        name, _, _ = span.removeprefix("--config.").partition("=")
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", name) and name.split(".")[0] in groups:
            assert name in config.KEYS, f"{page}: {span}"

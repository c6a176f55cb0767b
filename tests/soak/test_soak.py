"""A short soak test, and that one finds what is wrong."""

import json
import os
import random
import re
import runpy

import pytest

from soak import crash_points, damage_trials, fuzz_trials, kill_trials, snapshots
from soak.assets import Assets
from soak.cases import CASES, Case
from soak.fork_server import LIGHT, ForkServer, Job
from soak.fuzz_trials import Reader
from soak.outcomes import Outcome, Tally
from soak.schedule import Soak

SECONDS = 5.0
# Trials that start no backend of jax.
TRIALS = (
    *("kill/import tar:0", "kill/import tar --overwrite:1", "kill/import llava:0", "kill/show:0"),
    *("damage/stats:0", "damage/sheet:0", "damage/verify data:0", "damage/validate:0"),
    *("fuzz/records:0", "fuzz/llava:0", "fuzz/messages:0", "fuzz/configurations:0"),
)
LIGHT_TARGETS = re.compile(
    "kill/(import|show)|damage/(validate|verify data|stats|sheet)|fuzz/(?!templates|tokenizers)"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("server"), "json")
    yield server
    server.close()


def test_a_short_run_has_no_failure(tmp_path):
    lines = []
    soak = Soak(tmp_path, 1, lines.append, LIGHT, LIGHT_TARGETS.match)
    for trial in TRIALS:
        soak.run_one(trial)
    soak.run(SECONDS)
    soak.close()
    assert not soak.tally.failures, "\n".join(lines)
    assert {group for group, _ in soak.tally.counts} == {"kill", "damage", "fuzz"}
    assert "| kill | trials | good |" in soak.tally.table()


@pytest.fixture
def careless(server, tmp_path):
    """Return the assets and the case of a command with every fault."""
    assets = Assets(tmp_path / "assets", server)
    values = {f"value{number}": number for number in range(4)}
    (assets.folder / "numbers.json").write_text(json.dumps(values))
    arguments = ("numbers.json", "out/numbers.txt")
    (assets.folder / "out").mkdir()
    case = Case(
        "soak.careless", arguments, ("numbers.json", "out"), ("out",), (), ("numbers.json",)
    )
    return assets, case


def outcomes(trials, count):
    return {trials.run(random.Random(number)).kind for number in range(count)}


def test_kills_find_what_is_written_in_place(careless, tmp_path):
    assets, case = careless
    if assets.server.library is None:
        pytest.skip("no C compiler")
    trials = kill_trials.KillTrials("careless", case, assets, tmp_path / "trial")
    assert {"half", "refused"} & outcomes(trials, 12)


def test_damage_finds_values_that_are_not_checked(careless, tmp_path):
    assets, case = careless
    trials = damage_trials.DamageTrials("careless", case, assets, tmp_path / "trial")
    assert {"silent", "traceback"} <= outcomes(trials, 30)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda text: float(text), "unnamed"),
        (lambda text: [][0], "traceback"),
        (lambda text: text, "accepted"),
        (lambda text: os.stat(f"/nowhere/THE{text}"), "good"),
    ],
)
def test_cases_are_judged(read, kind, tmp_path):
    reader = Reader("x", lambda rng, folder: "x", read, lambda value: f"{value} is no number")
    assert fuzz_trials.run_case(reader, random.Random(0), tmp_path / "case").kind == kind


@pytest.mark.parametrize(("statement", "status"), [("os.abort()", -6), ("raise KeyError", 1)])
def test_a_fork_reports_how_it_ended(server, tmp_path, statement, status):
    (tmp_path / "ends.py").write_text(f"import os\n{statement}\n")
    job = Job("soak.test_soak:run_file", (str(tmp_path / "ends.py"),), str(tmp_path), timeout=60)
    ending = server.run(job)
    assert ending.status == status and not ending.timed_out


def test_without_a_compiler_calls_of_python_are_crash_points(tmp_path, monkeypatch):
    monkeypatch.setattr(crash_points.shutil, "which", lambda name: None)
    server = ForkServer(tmp_path / "server", "soak.test_soak")
    (tmp_path / "trial").mkdir()
    job = Job("soak.test_soak:make_folders", (), str(tmp_path / "trial"), 60, "before", 3)
    assert server.run(job).status == -9 and len(os.listdir(tmp_path / "trial")) == 2
    server.close()


def make_folders():
    for name in "abc":
        os.mkdir(name)


def run_file(path):
    runpy.run_path(path)


@pytest.mark.fast
def test_results_that_differ_in_their_duration_alone_are_equal():
    lines = "4 rows in 2.5 s\n{}\n"
    results = [{"correct": 0.5, "seconds": 6.9}, {"correct": 0.5, "seconds": 4.3}, {"correct": 0.4}]
    texts = [snapshots.normalize(lines.format(json.dumps(r, indent=2))) for r in results]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.fast
def test_the_table_counts_by_group():
    tally = Tally()
    for kind in ("good", "good", "silent", "harmless"):
        tally.add("damage", "export", Outcome(kind))
    assert tally.failures == 1
    assert "| export | 4 | 2 | 1 | 1 |" in tally.table() and "all 1" in tally.table()


@pytest.mark.fast
def test_every_case_names_inputs_that_can_be_made(tmp_path):
    from soak import assets

    names = {*assets._COMMANDS, *assets._COPIES, *assets._FUNCTIONS}
    for case in CASES.values():
        sources = [name.partition("=")[0] for name in case.inputs]
        assert {*sources, *(name for _, name in case.before)} <= names

"""Folders of the repository, and the search path of processes that tests start."""

import os
import pathlib

TESTS = pathlib.Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
EXPERIMENTS = ROOT / "experiments"
PYTHONPATH = os.pathsep.join([str(ROOT), str(TESTS)])

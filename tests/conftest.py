"""Eight virtual CPU devices for every test, and the fixtures that several folders share."""

import os
import pathlib
import shutil
import tempfile

import jax
import pytest
from helpers import cpu_devices, starflow2_folders, tiny_fae
from helpers.paths import TESTS

cpu_devices.configure()
PROGRAMS = pytest.StashKey[str]()
# `launch/test.sh` gives each worker one file after the other. The longest files come first, so that
# the workers finish at about the same time.
LONGEST_FILES = (
    *("training/test_processes.py", "test_train.py", "models/test_flow_golden.py"),
    *(
        "training/tasks/test_starflow2.py",
        "inference/test_generate.py",
        "training/tasks/test_fae.py",
    ),
    *("inference/test_decode_loop.py", "training/tasks/test_vlm.py", "training/test_program.py"),
    *("training/tasks/test_fae_start.py", "test_plan.py", "latents/test_batch_encoder.py"),
    *("planning/test_cost.py", "evaluation/test_starflow2.py", "experiments/test_ablations.py"),
)


def pytest_configure(config):
    """Let the workers of this run, and the processes that tests start, share compiled programs."""
    if not hasattr(config, "workerinput"):  # the workers inherit the environment
        config.stash[PROGRAMS] = tempfile.mkdtemp(prefix="starflow2_tests_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[PROGRAMS]
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    order = {TESTS / name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_unconfigure(config):
    if PROGRAMS in config.stash:
        shutil.rmtree(config.stash[PROGRAMS], ignore_errors=True)


@pytest.fixture
def x64():
    """Enable float64 during a test; the caches of traced functions depend on this setting."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Drop compiled programs before they exhaust the memory maps of the process.

    Every program takes several maps, and Linux allows a process 65,530 of them.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Return a folder with a tiny VLM (`vlm`) and codec (`fae`), and a STARFlow2 run of both."""
    return starflow2_folders.make(tmp_path_factory.mktemp("starflow2"))


@pytest.fixture(scope="session")
def codec():
    """Return a random codec of 16 pixels."""
    return tiny_fae.codec()

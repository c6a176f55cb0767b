"""Eight virtual CPU devices for every test, and the fixtures that several folders share."""

import pathlib

import jax
import pytest
from helpers import cpu_devices, starflow2_folders, tiny_fae

cpu_devices.configure()


@pytest.fixture
def x64():
    """Float64 inside the test; caches of traced functions are keyed by this setting."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Compiled programs are mapped into memory piece by piece, and Linux ends a process that asks
    for more than 65,530 pieces: before that, those of the files that are done are let go."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with a tiny VLM in `vlm` and a tiny codec in `fae`, and a STARFlow2 run of both."""
    return starflow2_folders.make_parts(tmp_path_factory.mktemp("starflow2"))


@pytest.fixture(scope="module")
def codec():
    """A random codec of 16 pixels."""
    return tiny_fae.codec()

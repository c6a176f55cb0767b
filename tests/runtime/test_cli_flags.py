"""Numbers of the command line have bounds, and errors in flags are one line."""

import importlib
import math
import sys
from types import SimpleNamespace

import pytest
from absl import flags

from starflow2_jax.runtime import cli, memory

pytestmark = pytest.mark.fast
COMMANDS = ("generate", "serve", "evaluate", "prepare", "bench")


def defined(command):
    values = flags.FlagValues()
    importlib.import_module(f"starflow2_jax.{command}").define(values)
    return values


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_bounds(command):
    numbers = 0
    for name in defined(command):
        flag = defined(command)[name]
        if flag.flag_type() not in ("int", "float"):
            continue
        numbers += 1
        for value in ("-1", str(2**63), "9" * 400) + (
            ("nan", "inf", "1e300") if flag.flag_type() == "float" else ()
        ):
            with pytest.raises(flags.IllegalFlagValueError, match=f"--{name}=") as error:
                defined(command)([command, f"--{name}={value}"])
            assert "expected" in str(error.value) or "range" in str(error.value)
    assert numbers


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--top_k=2147483648"],
            "2147483648 is not an integer in the range [0, 2147483647]",
        ),
        (
            ["--n=1000000000"],
            "1000000000 is not an integer in the range [1, 1000000]",
        ),
        (
            ["--seed=9223372036854775808"],
            "is not an integer in the range [0, 9223372036854775807]",
        ),
        (["--guidance=nan"], "--guidance=nan: expected a number from 0 to 1e+06"),
        (["--top_p=1.5"], "--top_p=1.5: expected a number from 0 to 1"),
        (["--wrong=1"], "Unknown command line flag 'wrong'"),
    ],
)
def test_an_error_in_a_flag_is_one_line(words, message, monkeypatch):
    values = defined("generate")
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit) as error:
        cli._parse_flags(["generate", *words])
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    assert message in str(error.value) and words[0].lstrip("-").partition("=")[0] in str(
        error.value
    )


def test_memory_is_refused_with_its_parts():
    memory.check("a", {"b": 2**30}, 2**30)
    with pytest.raises(ValueError, match=r"a needs at least 1\.5 GiB of memory") as error:
        memory.check("a", {"b": 2**30, "c": 2**29, "d": 0}, 2**30)
    assert "(b 1.0 GiB, c 512.0 MiB), more than there is (1.0 GiB)" in str(error.value)
    assert 0 < memory.capacity() <= memory.host_capacity() < math.inf


def test_reports_to_a_closed_event_loop_are_hidden_and_no_other_errors(monkeypatch):
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", lambda value: errors.append(value.exc_value))
    cli.hide_late_callbacks()
    failure = RuntimeError("Event loop failed")
    for error in (RuntimeError("Event loop is closed"), failure):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert errors == [failure]

"""Signals: training stops after the step in progress, and a command ends in one line."""

import os
import signal
import sys

import pytest

from starflow2_jax.runtime import cli, distributed, interrupts

pytestmark = pytest.mark.fast


@pytest.fixture
def handlers():
    """Restore the handlers of the test's process."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_after_the_step(handlers, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop_requested = distributed.preemption_handler()
    assert not stop_requested(1)
    os.kill(os.getpid(), number)
    assert stop_requested(2)


def test_the_second_interrupt_does_not_wait_and_ignored_ones_stay_ignored(handlers):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    distributed.preemption_handler()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    distributed.preemption_handler()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupted_command_ends_in_one_line(capsys, monkeypatch):
    def main(argv):
        raise KeyboardInterrupt

    def start(run_main, flags_parser):
        run_main(["command"])

    monkeypatch.setattr(cli.app, "run", start)
    monkeypatch.setattr(cli, "_TRACEBACK", type("Flag", (), {"value": False}))
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"
    assert sys.exc_info() == (None, None, None)


def test_a_command_that_saves_first_ends_at_the_second_interrupt(handlers):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupts.interrupt_flag() as interrupted:
        assert not interrupted.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.interrupt_flag() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert not interrupted.is_set()

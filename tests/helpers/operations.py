"""Counts of what code does, for tests of growth that measure no time."""

import sys
import tracemalloc

from helpers.paths import ROOT

PACKAGE = str(ROOT / "starflow2_jax")


def count_lines(run):
    """Return the number of lines of the package that `run()` executes in this thread."""
    count = 0

    def trace_line(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace_line

    def trace_call(frame, event, arg):
        return trace_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def peak_bytes(run):
    """Return the most bytes that Python and numpy hold during `run()`, above those before it."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

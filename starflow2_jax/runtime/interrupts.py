"""Ctrl-C of a command that has something to save before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second one raises KeyboardInterrupt.

    Outside of the main thread, and where Ctrl-C is ignored, the event stays unset.
    """
    event = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield event
        return

    def interrupt(*_):
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

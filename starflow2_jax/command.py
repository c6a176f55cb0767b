"""What every command shares: verbs, one-line errors, help.

A command module defines absl flags and `main`, and ends with

    if __name__ == "__main__":
        command.run(main, VERBS)

Its docstring is the text of `--help`: what it does and three example lines.
"""

import sys
from collections.abc import Callable, Mapping

from absl import app, flags

from starflow2_jax.config import nearest

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where in the code an error was raised")


def parse_verb(argv: list[str], verbs: Mapping[str, str]) -> str:
    """The verb of a command line, its first word.

    Raises:
        app.UsageError: none, or an unknown one; names the nearest and lists all.
    """
    listed = "\n".join(f"  {verb:10} {what}" for verb, what in verbs.items())
    if len(argv) < 2:
        raise app.UsageError(f"a verb is needed:\n{listed}")
    if argv[1] not in verbs:
        raise app.UsageError(f"unknown verb {argv[1]!r}{nearest(argv[1], verbs)}\n{listed}")
    return argv[1]


def run(main: Callable[..., None], verbs: Mapping[str, str] | None = None) -> None:
    """Run a command: `main(words)`, or `main(verb, words)` where it has verbs.

    Bad input (ValueError, OSError, RuntimeError) ends with one line on stderr and exit status 1;
    `--traceback` shows the rest.
    """

    def start(argv: list[str]) -> None:
        # Only here is it known which flags were given.
        args = (argv[1:],) if verbs is None else (parse_verb(argv, verbs), argv[2:])
        if _TRACEBACK.value:
            main(*args)
            return
        try:
            main(*args)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(start)

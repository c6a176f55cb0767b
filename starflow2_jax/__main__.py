"""The command line: `starflow2 COMMAND ...`, or `python -m starflow2_jax COMMAND ...`.

Both run the module of that name exactly as `python -m starflow2_jax.COMMAND ...` does. Nothing else
is imported before the command is known, so the list of commands appears at once.
"""

import runpy
import sys

from starflow2_jax import __version__
from starflow2_jax.config import nearest

COMMANDS = {
    "prepare": "import, check and show datasets; write latents and features",
    "convert": "convert published weights; export, list and verify checkpoints",
    "train": "run or resume an experiment",
    "generate": "draw images and write text with a trained model",
    "serve": "answer requests of OpenAI's clients with a trained model",
    "evaluate": "measure a trained model; write the report of a run",
    "plan": "estimate memory, communication and step time on other machines",
    "bench": "time training, sampling, reading and loading on this machine",
}


def usage() -> str:
    """Return the help text: one line per command."""
    lines = [f"  {name:10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join([
        "usage: starflow2 COMMAND ...", "", *lines, "",
        "starflow2 COMMAND --help lists the flags of a command; --version prints the version.",
    ])  # fmt: skip


def main() -> None:
    """Run the command that the first argument names; without one, list the commands."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("help", "-h", "-help", "--help"):
        print(usage())
    elif command == "--version":
        print(__version__)
    elif command in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"starflow2_jax.{command}", run_name="__main__", alter_sys=True)
    else:
        hint = nearest(command, COMMANDS)
        sys.exit(f"error: unknown command {command!r}{hint}\n\n{usage()}")


if __name__ == "__main__":
    main()

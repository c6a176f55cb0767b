"""The frame of every command: verbs, `--config` values, one-line errors, and help.

A command module defines absl flags and `main`, and ends with

    if __name__ == "__main__":
        cli.run(main, VERBS)

Its docstring is the text of `--help`: a description and three example lines.
"""

import keyword
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags

from starflow2_jax.config import KEYS, checks, nearest, unknown_key
from starflow2_jax.runtime import child_process, distributed

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where in the code an error was raised")


def parse_verb(argv: list[str], verbs: Mapping[str, str]) -> str:
    """Return the verb of a command line, its first argument."""
    usage = "\n".join(f"  {verb:10} {description}" for verb, description in verbs.items())
    if len(argv) < 2:
        raise app.UsageError(f"a verb is needed:\n{usage}")
    if argv[1] not in verbs:
        raise app.UsageError(f"unknown verb {argv[1]!r}{nearest(argv[1], verbs)}\n{usage}")
    return argv[1]


def explain(argv: list[str], error: Exception) -> str:
    """Return a message for an error in `--config` or one of its keys; empty for other errors."""
    for arg, next_arg in zip(argv[1:], [*argv[2:], ""]):
        name, equals, value = arg.lstrip("-").partition("=")
        key = name.removeprefix("config.")
        if name == "config":
            path, _, variant = (value if equals else next_arg).partition(":")
            if variant and error.args == (variant,):
                return f"--config: {path} has no variant {variant!r}"
        elif key != name and not key.startswith("model.") and key not in KEYS:
            return unknown_key(key)
        elif key != name and key.rpartition(".")[2] in str(error):
            return f"config: the experiment does not set {key!r}; only its file can add it"
    return ""


def quote_keywords(arg: str) -> str:
    """Return `--config.init.from=X` as `--config.init['from']=X`, as `from` is a keyword."""
    name, equals, value = arg.partition("=")
    first, *keys = name.split(".")
    if first.lstrip("-") != "config" or first == "config":
        return arg
    quoted = (f"['{key}']" if keyword.iskeyword(key) else f".{key}" for key in keys)
    return "".join([first, *quoted, equals, value])


PACKAGED = "starflow2:"


def experiment_path(value: str) -> str:
    """Return `FILE.py[:variant]` for an experiment of this package, `starflow2:NAME[:variant]`.

    Any other value is returned unchanged. NAME is that of a file in experiments/ without `.py`,
    such as `stage1_t2i` or `ablations/rows`.

    Raises:
        ValueError: If there is no such experiment; lists those that exist.
    """
    if not value.startswith(PACKAGED):
        return value
    name, colon, variant = value.removeprefix(PACKAGED).partition(":")
    # In the package after an installation, next to it in a checkout of the repository.
    package = Path(__file__).parents[1]
    folders = (package / "experiments", package.parent / "experiments")
    folder = next(folder for folder in folders if folder.is_dir())
    files = [p for p in sorted(folder.rglob("*.py")) if "def get_config(" in p.read_text()]
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    if name not in names:
        raise ValueError(f"--config: the package has no experiment {name!r}{nearest(name, names)}; "
                         f"it has {', '.join(names)}")  # fmt: skip
    return f"{folder / name}.py{colon}{variant}"


def locate_experiments(argv: list[str]) -> list[str]:
    """Return a command line in which `experiment_path` has replaced the values of `--config`."""
    args = []
    for previous, arg in zip(["", *argv], argv):
        flag, equals, value = arg.partition("=")
        if equals and flag.lstrip("-") == "config":
            arg = f"{flag}={experiment_path(value)}"
        elif previous.lstrip("-") == "config":
            arg = experiment_path(arg)
        args.append(arg)
    return args


def define_integer(
    name: str,
    default: int | None,
    doc: str,
    low: int = 1,
    high: int = checks.MAX_INT,
    *,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Define a flag for a whole number from `low` to `high`."""
    flags.DEFINE_integer(name, default, doc, low, high, flag_values=flag_values)


def define_number(
    name: str,
    default: float | None,
    doc: str,
    low: float = 0.0,
    high: float = 1e6,
    *,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Define a flag for a number from `low` to `high`."""
    flags.DEFINE_float(name, default, doc, flag_values=flag_values)
    # absl's own bounds let NaN pass.
    flags.register_validator(
        name,
        lambda value: value is None or checks.is_number(value, low, high),
        f"expected a number from {low:g} to {high:g}",
        flag_values=flag_values,
    )


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, or in `JAX_COMPILATION_CACHE_DIR`."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.path.expanduser("~/.cache/starflow2_jax")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse flags as absl does, but report an error in `--config` in one line."""
    try:
        args = locate_experiments([quote_keywords(arg) for arg in argv])
    except ValueError as error:
        sys.exit(f"error: {error}")
    # In place: config_flags looks for the keys in sys.argv.
    argv[:] = sys.argv[:] = args
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except (AttributeError, KeyError) as error:
        problem = explain(argv, error)
        if not problem:
            raise
        sys.exit(f"error: {problem}")
    except OSError as error:
        # config_flags keeps what an experiment could not read until its first key is set.
        sys.exit(f"error: {error.__cause__ or error}")


def hide_late_callbacks() -> None:
    """Let no traceback be printed for reads and writes that end after their event loop has closed.

    When Orbax gives up a step, TensorStore still reports the other arrays to a loop that Orbax has
    closed. The command's own error says what went wrong.
    """
    default_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            default_hook(unraisable)

    sys.unraisablehook = hook


def run(main: Callable[..., None], verbs: Mapping[str, str] | None = None) -> None:
    """Run a command: `main(argv)`, or `main(verb, argv)` if it has verbs.

    Bad input (ValueError, OSError, RuntimeError) or a lack of memory ends with one line on stderr
    and exit status 1; `--traceback` shows the whole error.
    """
    child_process.end_with_parent()
    # Without this, every command on a machine without a TPU starts with a warning of jax.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)

    def start(argv: list[str]) -> None:
        run_main = partial(main, argv[1:])
        if verbs is not None:
            run_main = partial(main, parse_verb(argv, verbs), argv[2:])
        if _TRACEBACK.value:
            run_main()
            return
        hide_late_callbacks()
        try:
            run_main()
        except KeyboardInterrupt as error:
            print("error: interrupted", file=sys.stderr)
            distributed.abort_all(error)
            sys.exit(130)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            print(f"error: {error or type(error).__name__}", file=sys.stderr)
            distributed.abort_all(error)
            sys.exit(1)

    app.run(start, flags_parser=_parse_flags)

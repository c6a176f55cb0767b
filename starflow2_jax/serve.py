"""Serve a trained STARFlow2 with an OpenAI-compatible interface.

python -m starflow2_jax.serve --port 8000
python -m starflow2_jax.serve --model runs/stage3 --port 8000 --max_batch 16
python -m starflow2_jax.serve --model runs/stage3 --host 0.0.0.0 --api_key SECRET

Without --model, the small STARFlow2 that ships with the package is served. The server listens to
this machine alone unless --host says otherwise. docs/serving.md lists the endpoints. It needs the
extra `serve`: pip install 'starflow2_jax[serve]'.
"""

import functools
import importlib.util
import os

from absl import flags

from starflow2_jax.runtime import allocator, cli

SHIPPED = "pretrained/starflow2_tiny"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PACKAGES = ("starlette", "uvicorn", "python_multipart")
# Seconds for which answers in progress may go on when the server is stopped.
_SHUTDOWN_SECONDS = 3


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(cli.define_integer, flag_values=values)
    number = functools.partial(cli.define_number, flag_values=values)
    text("model", SHIPPED, "workdir, step folder, model folder, or hf://user/name")
    text("vlm", None, "folder of the VLM, if it has moved since training")
    text("fae", None, "folder of the codec, if it has moved since training")
    text("name", "starflow2", "name of the model in replies")
    text("host", "127.0.0.1", "address to listen to; 0.0.0.0 for all of this machine's")
    integer("port", 8000, "port to listen to", 1, 65535)
    text("api_key", None, "key that requests must send (default: STARFLOW2_API_KEY, or none)")
    integer(
        "max_batch", 8, "rows that are sampled together; one with guidance counts twice", 2, 1024
    )
    flags.DEFINE_list(
        "lengths",
        [],
        "numbers of tokens and patches that rows have room for, each a program of its own "
        "(default: one for a short exchange, one for a conversation)",
        flag_values=values,
    )
    integer("queue", 64, "requests that may wait; one more is answered with 429", 1, 100_000)
    integer("sessions", 16, "conversations whose caches are kept; 0 keeps none", 0, 100_000)
    integer("max_tokens", 1024, "cap on the text tokens of an answer", 1)
    integer("max_images", 4, "cap on the images of an answer", 1, 1024)
    integer("max_samples", 16, "cap on n x best_of", 1, 1024)
    integer("max_input_images", 16, "cap on the images of a request", 1, 1024)
    integer("max_pixels", 1 << 24, "cap on the pixels of an image")
    integer("max_bytes", 32 << 20, "cap on the bytes of a request")
    number("timeout", 300.0, "seconds until a request ends, time in the queue included", 0.1, 1e5)
    flags.DEFINE_enum(
        "resize",
        "pad",
        ("refuse", "pad", "center_crop"),  # resize.POLICIES, which would import numpy
        "images of another size than the model's: refuse them, scale and pad them, or scale them "
        "and crop the center",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "warm", True, "compile all programs before the first request", flag_values=values
    )


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Load the model and serve it until the process is stopped."""
    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'starflow2_jax[serve]'")
    import uvicorn

    from starflow2_jax.inference.api import STARFlow2
    from starflow2_jax.inference.load import load
    from starflow2_jax.serving import app
    from starflow2_jax.serving.engine import Engine

    settings = _settings(values)
    model = load(values.model, vlm=values.vlm or "", fae=values.fae or "")
    if not isinstance(model, STARFlow2):
        raise ValueError(f"{values.model}: expected a STARFlow2, not a flow of images alone")
    engine = Engine(model, settings)
    if values.warm:
        print("compiling ...", flush=True)
        engine.compile()
    application = app.build_app(
        engine,
        name=values.name,
        api_key=values.api_key or os.environ.get("STARFLOW2_API_KEY", ""),
        is_local=values.host in _LOOPBACK,
    )
    print(f"serving {model.source} at http://{values.host}:{values.port}", flush=True)
    uvicorn.run(
        application,
        host=values.host,
        port=values.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )


def _settings(values: flags.FlagValues):
    from starflow2_jax.serving.settings import Settings

    names = ("max_batch", "queue", "sessions", "max_tokens", "max_images", "max_samples")
    names += ("max_input_images", "max_pixels", "max_bytes", "timeout", "resize")
    lengths = []
    for text in values.lengths:
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1 << 20):
            raise ValueError(f"--lengths: {text!r} is no whole number from 1 to {1 << 20}")
        lengths.append(int(text))
    return Settings(lengths=tuple(lengths), **{name: values[name].value for name in names})


if __name__ == "__main__":
    define(flags.FLAGS)
    allocator.keep_freed_memory()
    cli.use_compilation_cache()
    cli.run(main)

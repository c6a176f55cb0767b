"""Commands of the package that run in this process."""

from absl import flags

from starflow2_jax import evaluate


def run_command(capsys, verb, **options):
    """Run `evaluate VERB` with some flags, and return what it printed."""
    values = flags.FlagValues()
    evaluate.define(values)
    values(["evaluate", *(f"--{name}={value}" for name, value in options.items())])
    evaluate.main(verb, [], values)
    return capsys.readouterr().out

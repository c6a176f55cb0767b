"""The object that `inference.load.load` returns for a STARFlow2."""

from typing import Any

from starflow2_jax.inference import generate, scoring
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import make_options
from starflow2_jax.inference.results import Results


class STARFlow2(Model):
    """A trained STARFlow2 that generates and scores interleaved text and images."""

    def generate(
        self,
        prompts: Any,
        *,
        continue_from: Results | None = None,
        on_chunk: generate.OnChunk | None = None,
        **options: Any,
    ) -> Results:
        """Generate text and images that follow the prompts.

        Args:
            prompts: a list with one prompt per row; `inference.prompts` describes a prompt.
            continue_from: earlier results. Each row reads its prompt as further parts of its
                conversation; an empty prompt continues the row as it stands.
            on_chunk: called with the items of every row after each chunk of steps; all rows end if
                it returns true.
            options: fields of `inference.options.GenerateOptions`.
        """
        return generate.generate(
            self,
            prompts,
            continue_from=continue_from,
            options=make_options(options),
            on_chunk=on_chunk,
        )

    def log_likelihood(self, rows: Any, *, seed: int = 0) -> list[list[float]]:
        """Return the log-likelihood in nats of every part; see `scoring.log_likelihood`."""
        return scoring.log_likelihood(self, rows, seed=seed)

"""The models of lmms-eval 0.7 for a STARFlow2, with exact likelihoods. Requires the extra `lmms`.

    python -m lmms_eval --model starflow2_jax --model_args pretrained=runs/stage3 --tasks TASK

The chat class answers messages. The simple class (`--force_simple`) answers a context and its
images, and also scores the choices of tasks of output type `multiple_choice` or `loglikelihood`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from starflow2_jax.evaluation.harnesses import questions
from starflow2_jax.inference import load
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.resize import UNDERSTANDING_DEFAULT, check_policy
from starflow2_jax.runtime import cli

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as error:
    if error.name != "lmms_eval":
        raise
    # Only lmms-eval loads these classes; without it the module can be imported, but not used.
    GenerationResult = TokenCounts = lmms = object

_IMAGE_MARK = "<image>"  # that some tasks write into the text


class LikelihoodResult(GenerationResult):
    """The pair (NLL, whether greedy), which lmms-eval 0.7.3 would turn into a text as a tuple."""

    def __iter__(self):
        return iter(self.text)


class SimpleSTARFlow2(lmms):
    """A STARFlow2 that reads a text and its images, the images first."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "pretrained/starflow2_tiny",
        batch_size: int | str = 16,
        resize: str = UNDERSTANDING_DEFAULT,
        max_tokens: int = 1024,
        seed: int = 0,
        vlm: str = "",
        fae: str = "",
        **harness_options: Any,
    ):
        """Load the model.

        Args:
            pretrained: a run, a step of a run, or a model folder.
            batch_size: upper bound on the questions of a batch.
            resize: what to do with images of another size, see `inference.resize`.
            max_tokens: the most tokens of an answer, whatever a task asks for.
            seed: of the noise of images.
            vlm: folder of the VLM, if it is not where the run's configuration says.
            fae: folder of the codec, if it is not where the run's configuration says.
            harness_options: lmms-eval's own, such as `device`; JAX chooses the device.
        """
        super().__init__()
        check_policy(resize)
        cli.use_compilation_cache()
        self.model = load.load_starflow2(pretrained, vlm=vlm, fae=fae)
        if self.model.codec is None:
            raise ValueError(f"{pretrained}: the model has no codec; name its folder with fae=")
        self.side = self.model.codec.model.pixels
        self.settings = {"batch_size": int(batch_size), "seed": int(seed)}
        self.resize, self.max_tokens = resize, int(max_tokens)

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Return the answers to requests (context, settings, visuals, document, task, split)."""
        rows = [self._simple_question(r, r.args[0], r.args[2]) for r in requests]
        return self._answer(requests, rows, [r.args[1] for r in requests])

    def loglikelihood(self, requests: list[Any]) -> list[LikelihoodResult]:
        """Return the NLL in nats of each continuation, and whether greedy decoding gives it.

        Its sign is that of the losses that lmms-eval 0.7 takes the smallest of, not of the
        likelihoods that the name and the documentation of this method speak of.
        """
        rows, answers = [], []
        for request in requests:
            context, continuation = request.args[:2]
            if callable(continuation):
                continuation = continuation(self._document(request, *request.args[3:6]))
            answers.append(str(continuation))
            visuals = request.args[2] if len(request.args) > 2 else None
            rows.append(self._simple_question(request, context, visuals))
        scores = questions.score_answers(self.model, rows, answers, **self.settings)
        return [LikelihoodResult(score) for score in scores]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raise NotImplementedError: questions of several rounds are not answered."""
        raise NotImplementedError("starflow2_jax answers tasks of one round")

    def _document(self, request: Any, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _simple_question(self, request: Any, context: Any, visuals: Any) -> list[Any]:
        text = context[0] if isinstance(context, list) else context
        text = str(text).replace(_IMAGE_MARK, "").strip()
        images: Sequence[Any] = ()
        if visuals is not None:
            images = visuals(self._document(request, *request.args[3:6])) or ()
        rows = self._read_images(request, images)
        return [*rows, text] if text or not rows else rows

    def _read_images(self, request: Any, images: Sequence[Any]) -> list[np.ndarray]:
        name = f"{request.task_name} {request.doc_id}"
        return [
            questions.read_image(image, self.side, self.resize, f"{name}, image {i}")
            for i, image in enumerate(images)
        ]

    def _answer(
        self, requests: list[Any], rows: list[list[Any]], settings: list[dict[str, Any]]
    ) -> list[GenerationResult]:
        texts = questions.answer(
            self.model,
            rows,
            [questions.read_settings(row, self.max_tokens) for row in settings],
            [int(request.doc_id) for request in requests],
            **self.settings,
        )
        encode = self.model.tokenizer.encode
        return [GenerationResult(t, TokenCounts(output_tokens=len(encode(t)))) for t in texts]


class ChatSTARFlow2(SimpleSTARFlow2):
    """A STARFlow2 that reads messages of texts and images in order."""

    is_simple = False

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Return the answers to requests (context, messages, settings, document, task, split)."""
        rows = [self._chat_question(request) for request in requests]
        return self._answer(requests, rows, [request.args[2] for request in requests])

    def _chat_question(self, request: Any) -> list[Any]:
        doc_to_messages, doc_id, task, split = request.args[1], *request.args[3:6]
        parts = []
        for message in doc_to_messages(self._document(request, doc_id, task, split)):
            for content in message["content"]:
                if content["type"] == "text":
                    parts.append(Part("text", message["role"], content["text"]))
                    continue
                image = self._read_images(request, [_image(content)])[0]
                parts.append(Part("image", message["role"], image=image))
        return parts


def _image(content: Any) -> Any:
    """Return the image of a part of a message, a PIL image or the path of one.

    Raises:
        ValueError: The part is a video or a sound.
    """
    if content["type"] != "image":
        kind = content["type"]
        raise ValueError(f"starflow2_jax reads texts and images; a message has a part {kind!r}")
    return content["url"]

"""The cost of an answer after k generated images: one cache against a loop that encodes again.

    python tests/peer/interleaved_cost.py --images 1 2 4 8 --repeats 5

One model of the `tiny` preset (random weights; cost does not depend on what they are), float32:

    images    k images are drawn in one pass, then a turn asks and is answered, from the cache
    items     the same turn after text of as many items as the k images are
    again     the same turn by a loop without a cache of what it drew: the k images' pixels are
              encoded by the codec's tower and the whole conversation is read anew
    drawing   the k images alone, by `images` and by the loop, which for each of them encodes
              and reads all before it

Every program is run once before it is timed. Prints the least of the times in ms (other programs
of a machine only add to them), ratios, and the number of items read for the answer.
"""

import argparse
import json
import runpy
import time
from pathlib import Path

import jax

from starflow2_jax import config
from starflow2_jax.benchmarking import timing
from starflow2_jax.checkpoints.convert import teacher
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.inference.api import STARFlow2
from starflow2_jax.inference.prompts import Part
from starflow2_jax.latents import codec
from starflow2_jax.models import starflow2
from starflow2_jax.models.fae import codec as fae, teacher as teachers
from starflow2_jax.models.fae.config import model_config
from starflow2_jax.params import init as init_params

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "fae_features.py"
LETTERS = 7  # The first id that is a letter; each is one token.
ANSWER = 16


def make_model() -> STARFlow2:
    """A tiny model and codec with random weights; a token of text is a letter."""
    cfg = config.to_dict(runpy.run_path(str(EXPERIMENT))["get_config"]("tiny"))
    codec_config = model_config(cfg)
    tower = teacher.teacher_config(cfg, codec_config)
    declared = {**fae.declare(codec_config), "teacher": teachers.declare(tower)}
    codec_params = init_params(jax.random.key(0), declared)
    latent_codec = codec.Codec(cfg, codec_config, tower, codec_params, "")
    tokenizer = Tokenizer(
        encode=lambda text: tuple(LETTERS + ord(c) % 600 for c in text),
        decode=lambda ids: "".join(map(chr, ids)),
        turn_start=1, turn_end=2, vision_start=3, vision_end=4, image=5, pad=0, opening=(),
        vocab_size=640,
    )  # fmt: skip
    starflow2_config = starflow2.tiny()
    params = init_params(jax.random.key(1), starflow2.declare(starflow2_config))
    head = params["deep"]["proj_out"]
    head["weight"] = 0.02 * jax.random.normal(jax.random.key(2), head["weight"].shape)
    down = params["adapter"]["down"]
    down["weight"] = 0.02 * jax.random.normal(jax.random.key(3), down["weight"].shape)
    model_cfg = config.default()
    model_cfg.task, model_cfg.noise.sigma = "starflow2", 0.3
    return STARFlow2(config.to_dict(model_cfg), starflow2_config, params, tokenizer, latent_codec)


def least_ms(run, repeats: int) -> float:
    """The least time of some runs after one that is not timed."""
    run()
    times = []
    for _ in range(repeats):
        start_time = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start_time))
    return min(times)


def compare(model: STARFlow2, k: int, repeats: int) -> dict:
    """A row of the table."""
    draw = {"images": k, "max_tokens": 0}
    say = {"images": 0, "max_tokens": ANSWER, "temperature": 1.0}
    prompt, question = "draw pictures", "what do they show?"
    with_images = model.generate([prompt], **draw)
    items = k * (model.model_config.num_patches + 2)
    text = Part("text", "assistant", "x" * items)
    with_text = model.generate([[prompt, text]], **{**say, "max_tokens": 1})
    pixels = [Part("image", "assistant", image=part.image) for part in with_images[0]]

    def loop():
        """Each image by a call that is given all before it as pixels."""
        parts: list[Part] = []
        for _ in range(k):
            results = model.generate([[prompt, *parts]], images=1, max_tokens=0)
            parts.append(Part("image", "assistant", image=results[0][-1].image))

    answer = lambda results: model.generate([question], continue_from=results, **say)
    before = with_images.session.read
    row = {
        "images": k,
        "items_before": before,
        "items_read": answer(with_images).session.read - before,
        "answer_after_images_ms": least_ms(lambda: answer(with_images), repeats),
        "answer_after_items_ms": least_ms(lambda: answer(with_text), repeats),
        "answer_again_ms": least_ms(
            lambda: model.generate([[prompt, *pixels, question]], **say), repeats
        ),
        "drawing_ms": least_ms(lambda: model.generate([prompt], **draw), repeats),
        "drawing_again_ms": least_ms(loop, repeats),
    }
    row["images_over_items"] = row["answer_after_images_ms"] / row["answer_after_items_ms"]
    row["again_over_images"] = row["answer_again_ms"] / row["answer_after_images_ms"]
    both = row["drawing_again_ms"] + row["answer_again_ms"]
    row["whole_ratio"] = both / (row["drawing_ms"] + row["answer_after_images_ms"])
    return {name: round(v, 2) if isinstance(v, float) else v for name, v in row.items()}


def main() -> None:
    """Prints a JSON line for each number of images, the machine first."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8])
    flags.add_argument("--repeats", type=int, default=5)
    args = flags.parse_args()
    print(json.dumps(timing.describe_machine()), flush=True)
    model = make_model()
    for k in args.images:
        print(json.dumps(compare(model, k, args.repeats)), flush=True)


if __name__ == "__main__":
    main()

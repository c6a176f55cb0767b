"""The verb `judge` of `evaluate`."""

import functools
import json
from pathlib import Path

from absl import flags, logging
from etils import epath

from starflow2_jax.evaluation import result_files
from starflow2_jax.evaluation.command_flags import Output, require
from starflow2_jax.evaluation.judges import client, protocols, replies, run
from starflow2_jax.runtime import atomic, cli


def define(values: flags.FlagValues) -> None:
    """Define the flags of the verb."""
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    flags.DEFINE_enum(
        "bench", None, [*protocols.PROTOCOLS], "judge: the benchmark", flag_values=values
    )
    text("tree", None, "judge: folder of the benchmark's images")
    text("prompts", None, "judge: the benchmark's files of prompts, separated by commas")
    text("official", None, "judge: a checkout of the benchmark, for the judge's prompts")
    text("sources", None, "judge: folder of the benchmark's source images (imgedit, kris, rise)")
    text("judge", None, "judge: address, such as http://HOST:PORT/v1; the key, if it needs one, in "
         f"the variable {client.KEY_VARIABLE}")  # fmt: skip
    text("judge_model", None, "judge: name of the model (the one of the published scores)")
    cli.define_integer("workers", 8, "judge: requests at once", 1, 256, flag_values=values)


def evaluate_judge(values: flags.FlagValues) -> Output:
    """Score a benchmark's tree of images with a judge, and keep its replies."""
    require(values, "judge", "bench", "tree", "prompts", "official", "judge", "out")
    protocol = protocols.PROTOCOLS[values.bench]
    out = Path(values.out)
    file = out / run.SCORES_FILE
    result_files.refuse_existing(epath.Path(file), values.overwrite)
    result = run.score_tree(
        values.bench,
        Path(values.tree),
        client.Judge(values.judge, values.judge_model or protocol.judge),
        prompts=[Path(path) for path in values.prompts.split(",")],
        official=Path(values.official),
        sources=Path(values.sources or values.tree),
        out=out,
        workers=values.workers,
        on_reply=lambda count, total: logging.info("%d of %d items", count, total),
    )
    atomic.write_file(file, json.dumps(result, indent=2) + "\n")
    return result, [*run.summary_lines(result), f"written    {file}, {replies.FILE}"]

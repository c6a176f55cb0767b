"""Every configuration key with its default, its meaning and the check of its value."""

from typing import Any

from starflow2_jax.config import checks
from starflow2_jax.config.checks import Key, choice, count, flag, items, number, positive, text

BYTE_VOCABULARY = 257


def _is_mixture_entry(value: Any) -> bool:
    """Return whether the values of an entry are of the right types; the readers know its keys."""
    return (
        checks.is_mapping(value)
        and all(checks.is_text(v) for k, v in value.items() if k != "weight")
        and checks.is_number(value.get("weight", 1.0))
    )


_DATA = {
    "path": text("", "dataset folder"),
    "mixture": items(
        (),
        "several datasets instead of one path: a list of {path, weight, latents}",
        _is_mixture_entry,
        f"a list of groups of strings, with a weight from 0 to {checks.MAX_NUMBER:g}",
    ),
    "resize": choice("none", "how to treat images of another size", "none", "center_crop"),
    "labels": flag(False, "read meta.label as the class"),
    "text": choice(
        "none", "captions as UTF-8 bytes or as stored features", "none", "bytes", "features"
    ),
    "latents": text("", "dataset folder of latents parallel to `path`, read instead of pixels"),
    "features": text("", "dataset folder of text features parallel to `path`"),
    "shuffle": flag(True, "draw a new global order for every epoch"),
    "threads": positive(4, "decoding threads", checks.MAX_THREADS),
    "processes": count(
        0, "processes that read training data, each with its threads; 0: none", checks.MAX_THREADS
    ),
    "blank_images": flag(False, "replace the images of interleaved rows with gray ones"),
    "packing": choice(
        "dataset",
        "a training row is of one dataset, or of the mixture (weights: shares of rows, of records)",
        *("dataset", "mixture"),
    ),
    "skip_long": count(0, "records longer than a row that may be left out of all rows"),
    "skip_bad": count(0, "records that may fail to decode before the run stops"),
}

TASKS = ("flow", "fae_features", "fae_pixels", "fae_end_to_end", "vlm", "starflow2")

KEYS: dict[str, Key] = {
    "task": choice("flow", "kind of training: a flow, a codec module, a VLM, STARFlow2", *TASKS),
    "seed": count(0, "seed of weights, data order, noise, dropout and samples", checks.MAX_SEED),
    "compute_dtype": choice("float32", "dtype of matmuls", "float32", "bfloat16", "float64"),
    "frozen_dtype": choice("float32", "dtype of a frozen VLM", "float32", "bfloat16"),
    "attention": choice(
        "auto",
        "kernel of causal attention; auto: that of the platform (models/attention.py)",
        *("auto", "plain", "splash", "cudnn"),
    ),
    "layout": text("dp", "sharding of the parameters: a name in mesh.LAYOUTS"),
    "frozen_layout": text("", "layout of the frozen parameters; empty: that of the others"),
    "mesh": text("data=-1", "devices along each mesh axis; -1 takes the rest"),
    "image.pixels": count(0, "height = width of the images; 0 if latents are read"),
    "image.patch": positive(1, "pixels along the side of a token"),
    "image.channel_order": choice(
        "channel_first", "order inside a token", "channel_first", "channel_last"
    ),
    "image.flip": flag(False, "mirror half of the rows, at random in each step"),
    "text.vocabulary": Key(
        0,
        "rows of the trained token embedding; 0: features are read",
        lambda v: checks.is_whole(v) and (v == 0 or v >= BYTE_VOCABULARY),
        f"0, or at least {BYTE_VOCABULARY} (every byte, and 0 as padding)",
    ),
    "text.tokenizer": text("", "folder of the tokenizer of interleaved rows"),
    "text.length": positive(256, "positions of an interleaved row"),
    "text.images": count(0, "maximum number of images in an interleaved row; 0: as many as fit"),
    "text.max_targets": count(0, "maximum number of target tokens in a row; 0: no limit"),
    "text.vlm_positions": count(
        0,
        "stage 1: positions of a row that the VLM reads, at least those before the end of a "
        "prompt; slower, and equal, if a row has more; 0: all",
    ),
    "text.logit_chunk": positive(256, "positions of a row whose logits are computed at a time"),
    "noise.kind": choice("gaussian", "noise added to the data", "gaussian", "uniform", "none"),
    "noise.sigma": number(0.05, "standard deviation of gaussian noise"),
    "noise.context_sigma": Key(
        None,
        "the same for images that are only read; None: noise.sigma",
        lambda v: v is None or checks.is_number(v),
        f"None, or a number from 0 to {checks.MAX_NUMBER:g}",
    ),
    "cfg_dropout.text": number(0.1, "share of rows that lose text and label", 0.0, 1.0),
    "cfg_dropout.all": number(0.0, "share of records that also lose their images", 0.0, 1.0),
    "vlm.text_loss_weight": number(1.0, "weight of the text loss; 0: the tower is trained alone"),
    "vlm.train_tower": flag(True, "train the vision tower; False: it does not change"),
    "vlm.region_loss_weight": number(0.0, "weight of predicting region words from features"),
    "vlm.pixel_loss_weight": number(0.1, "weight of predicting pixels from the tower's features"),
    "vlm.path": text(
        "", "folder of the published VLM, also hf://user/name; empty: random weights from the seed"
    ),
    "loss.text_weight": number(1.0, "weight of nats per token against nats per latent channel"),
    "loss.text_into_flow": flag(True, "let the text's gradient reach the flow through its skip"),
    "loss.latent_penalty": number(1e-4, "weight of the mean square before every block"),
    "teacher.kind": choice("dinov2", "the codec's frozen tower", "dinov2", "qwen"),
    "teacher.path": text(
        "", "its published folder, or pretrained/NAME; empty: a tiny tower, random from the seed"
    ),
    "teacher.tower": Key(
        {},
        "sizes of a new tower if teacher.path is empty; empty: a tiny one",
        checks.is_mapping,
        "a group of keys",
    ),
    "teacher.pixels": positive(64, "side of the images that the tower sees"),
    "fae.path": text(
        "", "workdir or model folder of the codec that encodes a flow's images and decodes samples"
    ),
    "fae.beta": number(1e-6, "weight of the KL in nats of a row against the mean square"),
    "fae.latent_noise": number(0.0, "noise on unit-variance latents for the feature decoder"),
    "fae.train_on_decoded_features": flag(
        False, "learn pixels from decoded latents with latent_noise, not from noisy tower features"
    ),
    "fae.l1": number(0.0, "weight of the mean absolute error of pixels"),
    "fae.l2": number(1.0, "weight of the mean square error of pixels"),
    "fae.gradient": number(
        0.0, "end to end: weight of the error of neighboring pixels' difference"
    ),
    "fae.perceptual": number(1.0, "weight of the perceptual distance"),
    "fae.lpips": text("", "safetensors of LPIPS or VGG16; empty: distance of tower features"),
    "fae.gan": number(0.1, "weight of the adversarial loss"),
    "fae.gan_start": count(0, "first step with a discriminator"),
    "fae.lecam": number(1e-3, "weight of LeCam's regularizer of the discriminator"),
    "fae.discriminator_widths": Key(
        (64, 128, 256, 512),
        "channels of the convolutions, each of which halves the sides",
        lambda v: checks.is_list(v, 16) and v and all(checks.is_whole(n, 1) for n in v),
        "a list of 1 to 16 positive whole numbers",
    ),
    "fae.discriminator_groups": positive(32, "norm groups; must divide all widths but the first"),
    "fae.statistics_decay": number(0.999, "decay of the latents' mean and std", 0.0, 1.0),
    **{f"data.{name}": key for name, key in _DATA.items()},
    **{f"eval_data.{name}": key for name, key in _DATA.items()},
    "train.batch_size": positive(64, "rows of the global batch"),
    "train.steps": positive(1000, "optimizer steps"),
    "train.microbatches": positive(1, "parts of a batch whose gradients are accumulated"),
    "train.ema": number(0.999, "decay of the averaged weights", 0.0, 1.0),
    "train.trainable": items(
        ("flow",),
        "top-level subtrees that are trained; the rest is frozen",
        checks.is_text,
        "a list of strings",
    ),
    "optim.lr": number(1e-4, "peak learning rate"),
    "optim.muon_lr": number(0.0, "peak rate of Muon for the layers' matrices; 0: AdamW instead"),
    "optim.final_lr": number(1e-6, "learning rate at the last step (cosine)"),
    "optim.warmup": count(100, "steps of linear warm-up"),
    "optim.b1": number(0.9, "AdamW beta 1", 0.0, 1.0),
    "optim.b2": number(0.95, "AdamW beta 2", 0.0, 1.0),
    "optim.eps": number(1e-8, "AdamW epsilon"),
    "optim.weight_decay": number(1e-4, "AdamW weight decay, on every weight"),
    "optim.clip": number(1.0, "largest global gradient norm; 0 does not clip"),
    "log.every": positive(10, "steps between rows of metrics.jsonl"),
    "log.trackers": items(
        (),
        "any of tensorboard, wandb, trackio",
        lambda v: isinstance(v, str) and v in ("tensorboard", "wandb", "trackio"),
        "a list of some of tensorboard, wandb, trackio",
    ),
    "log.project": text("starflow2_jax", "project name for wandb and trackio"),
    "log.profile_steps": Key(
        (),
        "(first, last) step of a profiler trace",
        lambda v: (
            checks.is_list(v, 2)
            and all(checks.is_whole(n, 1) for n in v)
            and (not v or (len(v) == 2 and v[0] <= v[1]))
        ),
        "empty, or the numbers of two steps, from 1, the first not after the last",
    ),
    "sample.every": count(500, "steps between sample grids; 0: none"),
    "sample.count": positive(16, "images in a grid"),
    "sample.prompts": items(
        (),
        "captions of the grid, repeated; empty: from the evaluation data",
        checks.is_text,
        "a list of strings",
    ),
    "sample.spread": flag(False, "prompts from all over the data, not from its first records"),
    "sample.guidance": number(0.0, "guidance weight"),
    "sample.guidance_rule": choice(
        "product", "guidance rule", "product", "linear_log_scale", "linear_scale"
    ),
    "sample.image_temperature": number(1.0, "STARFlow2: factor on the noise of patches", 1e-3),
    "sample.denoise": flag(True, "denoise samples by a score step if the noise is gaussian"),
    "evaluate.every": count(500, "steps between evaluations; 0: only at the end"),
    "evaluate.rows": positive(1000, "rows of the evaluation data that are used"),
    "evaluate.batch_size": positive(50, "rows evaluated at a time"),
    "checkpoint.every": positive(500, "steps between checkpoints"),
    "checkpoint.keep": positive(3, "newest checkpoints that are kept"),
    "checkpoint.keep_every": count(0, "never delete those at multiples of this step; 0: none"),
    "distributed.rendezvous_timeout": positive(
        45, "seconds for all to reach the coordinator", checks.MAX_SECONDS
    ),
    "distributed.initialization": positive(
        45, "seconds for jax.distributed to connect them", checks.MAX_SECONDS
    ),
    "distributed.heartbeat": positive(
        20, "seconds of silence until a process counts as lost", checks.MAX_SECONDS
    ),
    "distributed.shutdown": positive(
        30, "seconds to wait for the others at the end", checks.MAX_SECONDS
    ),
    "init.from": text("", "workdir or model folder whose weights start this run"),
    "init.fae": text(
        "", "workdir or model folder of the codec that a codec's training starts from"
    ),
    "init.ema": flag(True, "start from its averaged weights"),
}

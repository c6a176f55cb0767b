"""Exact likelihood of interleaved rows: every image in nats, every token in nats, and their loss.

Axes: B rows, T positions, M image places of a row, N patches, D latent channels, K target tokens of
a row at most.

A batch of rows is a mapping of arrays: `ids`, `segments` int32 [B, T] (0 is padding), `image` int32
[B, T] (m N + n of the patch that stands there, -1 elsewhere), `target` bool [B, T] (the item there
is learnt), `positions` int32 [B, T, 3] (the VLM's), `flow_positions` int32 [B, T, 3] (of the item
to predict), `latent_mean` and `latent_logvar` float32 [B, M, N, D].
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.mesh import constrain
from starflow2_jax.models import backbone, flow, starflow2 as pretzel
from starflow2_jax.models.ablations import mot
from starflow2_jax.models.backbone import Config
from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import Tree
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses.flow import per_dim

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Stage:
    """What a stage computes: the likelihood of `images`, of `text`, or of both.

    Without text the adapter and the skips are off; without images the deep flow is.
    """

    images: bool
    text: bool


def stage_of(trains: Iterable[str], cfg: Config) -> Stage:
    """The stage that trains these subtrees (design.md 4): flows are for images, the adapter and the
    VLM for text, the skips for both. Of a mixture of transformers every one is for both: the text
    sees images by its expert."""
    names = set(trains)
    if isinstance(cfg, mot.Config):
        return Stage(bool(names), bool(names))
    images = bool(names & {"shallow", "deep", "skip"})
    return Stage(images, bool(names & {"adapter", "skip", "vlm"}))


@struct.dataclass
class Terms:
    """What every learnt image and token contributes, in nats; a tuple has one entry a block.

    Attributes:
        image: bool [B, M], which images are learnt; half_square, log_dets, squares: [B, M], of z,
            of each block, and of the tokens before each block; zero where not learnt.
        token: bool [B, K], which of the entries are tokens; at: int [B, K], where their states
            stand (one before them); nll, correct: [B, K], zero where there is no token.
        seen, patches: [B], W_vlm's shares of its sum added up over patches, and their number.
        shared: [B], W_D's shares added up over the tokens.
    """

    image: Any = None
    half_square: Any = None
    log_dets: tuple = ()
    squares: tuple = ()
    token: Any = None
    at: Any = None
    nll: Any = None
    correct: Any = None
    seen: Any = None
    patches: Any = None
    shared: Any = None


def next_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(patch, token), each bool [B, T]: whether what follows a position is a learnt one.

    The first item of a segment follows nothing.
    """
    segments, image = batch["segments"], batch["image"]
    joined = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    learnt = jnp.pad(batch["target"][:, 1:] & joined, ((0, 0), (0, 1)))
    patch = jnp.pad(image[:, 1:] >= 0, ((0, 0), (0, 1)))
    return learnt & patch, learnt & ~patch


def counts(batch: Batch, stage: Stage) -> dict[str, jax.Array]:
    """Learnt latent channels (`dims`) and tokens (`tokens`) of each row, float32 [B]."""
    patch, token = next_targets(batch)
    channels = batch["latent_mean"].shape[-1]
    return {
        "dims": stage.images * channels * patch.sum(1).astype(jnp.float32),
        "tokens": stage.text * token.sum(1).astype(jnp.float32),
    }


def latents(batch: Batch, keys: jax.Array, cfg: Mapping[str, Any]) -> jax.Array:
    """A sample of the posteriors with the experiment's noise: x [B, M, N, D].

    Args:
        keys: of each row [B]; an image place has its own, folded from its row's.
    """
    shape = batch["latent_mean"].shape
    of_row = lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(shape[1]))
    places = jax.vmap(of_row)(keys).reshape(-1)
    each = {n: batch[n].reshape(-1, *shape[2:]) for n in ("latent_mean", "latent_logvar")}
    return preprocess.tokens(each, places, cfg, False).reshape(shape)


def terms(
    params: Tree,
    batch: Batch,
    x: jax.Array,
    cfg: Config,
    stage: Stage,
    *,
    text_into_flow: bool = True,
    text_targets: int = 0,
    text_chunk: int = 256,
) -> Terms:
    """Both streams over a batch of rows, in parallel.

    Args:
        params: all subtrees that the stage reads, `vlm` too; x: latents [B, M, N, D].
        text_into_flow: False stops the text's gradient at W_D.
        text_targets: K, 0 for T; a row with more gives NaN, so that nothing is left out unnoticed.
        text_chunk: positions of a row whose logits are held at a time.
    """
    image, places = batch["image"], x.shape[:2]
    # Not as a mask: kernels of accelerators read segments.
    is_image, segments = image >= 0, batch["segments"]
    outputs, log_dets = pretzel.shallow(params, x.reshape(-1, *x.shape[2:]), cfg)
    u = pretzel.place(outputs[-1].reshape(x.shape), image)
    # No gradient into the flow by way of the VLM (design.md 4).
    eyes = jax.lax.stop_gradient(u) if stage.text else None
    at = (batch["positions"], batch["flow_positions"], None)
    options = {"segments": segments, "images": stage.images, "skips": stage.text}
    y, h, _ = backbone.states(params, batch["ids"], u, eyes, is_image, *at, cfg, **options)
    found = Terms()
    patch, token = next_targets(batch)
    if stage.images:
        square, log_det, learnt = _deep_terms(params, h, u, patch, image, places, cfg)
        of_image = lambda each: jnp.where(learnt, each.reshape(places), 0)
        found = found.replace(
            image=learnt,
            half_square=square,
            log_dets=(*map(of_image, log_dets), log_det),
            squares=tuple(of_image(jnp.square(each).sum((1, 2))) for each in outputs),
        )
        if stage.text and "vlm" in cfg.skips and cfg.crossings == 1:
            share = jnp.where(is_image, _seen_share(params, y, u, cfg), 0)
            found = found.replace(seen=share.sum(1), patches=is_image.sum(1).astype(share.dtype))
    if stage.text:
        args = (token, text_targets, text_chunk, text_into_flow)
        found = found.replace(**_text_terms(params, y, h, batch["ids"], cfg, *args))
    return found


def _deep_terms(params, h, u, patch, image, places, cfg):
    """The deep block's half squares and log_det [B, M], and which images are learnt."""
    scale, mean = pretzel.image_head(params, h, cfg)
    following = lambda a, fill: jnp.concatenate([a[:, 1:], jnp.full_like(a[:, :1], fill)], 1)
    z = (at_least_float32(following(u, 0)) - mean) / scale
    number = jnp.where(patch, following(image, -1) // cfg.patches, -1)
    # By comparison, not a matmul, which accelerators would round.
    mine = number[..., None] == jnp.arange(places[1])
    by_image = lambda each: jnp.where(mine, each.sum(-1, keepdims=True), 0).sum(1)
    return by_image(0.5 * jnp.square(z)), -by_image(jnp.log(scale)), mine.any(1)


def _text_terms(params, y, h, ids, cfg, token, limit, chunk, into_flow):
    """`token`, `at`, `nll`, `correct` and `shared` of `Terms`, of the target positions alone."""
    limit = limit or ids.shape[1]
    at = jnp.argsort(~token, axis=1, stable=True)[:, :limit]
    pick = lambda a: jnp.take_along_axis(a, at.reshape(*at.shape, *(1,) * (a.ndim - 2)), 1)
    here = pick(token)
    found = {"token": here, "at": at}
    y, wanted = pick(y), pick(jnp.roll(ids, -1, 1))
    if h is not None:
        h = pick(h)
        if "deep" in cfg.skips:
            share = _share(y, pretzel.flow_skip(params, h, cfg))
            found["shared"] = jnp.where(here, share, 0).sum(1)
    states = pretzel.text_states(params, y, h, cfg, into_flow=into_flow)
    # Said out loud: left to itself, the partitioner of jax 0.10.2 gives wrong gradients of the
    # gathers above on a mesh of data, fsdp and tensor together.
    states = constrain(states, "batch")
    nll, correct = _cross_entropy(params, states, wanted, cfg, chunk)
    nll = jnp.where(here, nll, 0)
    too_many = (token.sum(1) > limit)[:, None]
    return {**found, "nll": jnp.where(too_many, jnp.nan, nll), "correct": here & correct}


def _cross_entropy(params, states, wanted, cfg, chunk):
    """Nats of tokens [B, K] and whether they are the likeliest, `chunk` positions at a time.

    Logits are computed again in the backward pass: all of them at once would be gigabytes.
    """
    rows, length = wanted.shape
    chunk = min(chunk, length)
    parts = -(-length // chunk)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, parts * chunk - length), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(rows, parts, chunk, *a.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def part(states, wanted):
        logits = pretzel.text_logits(params, states, cfg)
        # By comparison: where the vocabulary is cut over devices, so is this, and a gather is not.
        mine = wanted[..., None] == jnp.arange(logits.shape[-1])
        own = jnp.where(mine, logits, 0).sum(-1)
        return jax.nn.logsumexp(logits, -1) - own, logits.argmax(-1) == wanted

    found = jax.lax.map(lambda now: part(*now), (cut(states), cut(wanted)))
    join = lambda a: a.swapaxes(0, 1).reshape(rows, -1)[:, :length]
    return jax.tree.map(join, found)


def _share(base, added):
    """|added| / (|base| + |added|) over the last axis: 0 is none of it, 1 nothing else."""
    size = lambda a: jnp.linalg.norm(at_least_float32(jax.lax.stop_gradient(a)), axis=-1)
    a, b = size(added), size(base)
    return a / jnp.maximum(a + b, 1e-30)


def _seen_share(params, y, u, cfg):
    base = u if cfg.skip_into == "latent" else flow.embed_tokens(params["deep"], u, cfg.deep)
    return _share(base, pretzel.seen_skip(params, y, cfg))


# -------------------------------------------------------------------------------------------- sums


def sums(found: Terms, batch: Batch, stage: Stage) -> dict[str, jax.Array]:
    """What is logged, each [B]: sums over the images (as `loss.flow_loss` names them) and tokens of
    a row, and their counts."""
    own = counts(batch, stage)
    made: dict[str, Any] = {}
    if stage.images:
        made |= {"count": own["dims"], "half_square": found.half_square.sum(1)}
        for i, (log_det, square) in enumerate(zip(found.log_dets, found.squares)):
            made[f"log_det/{i}"], made[f"latent/{i}"] = log_det.sum(1), square.sum(1)
    if stage.text:
        made |= {"text/count": own["tokens"], "text/nll": found.nll.sum(1)}
        made["text/correct"] = found.correct.sum(1).astype(jnp.float32)
    if found.seen is not None:
        made |= {"skip/vlm": found.seen, "skip/patches": found.patches}
    if found.shared is not None:
        made["skip/deep"] = found.shared
    return made


def row_loss(
    made: Mapping[str, jax.Array],
    totals: Mapping[str, jax.Array],
    *,
    text_weight: float,
    latent_penalty: float,
) -> jax.Array:
    """Each row's share [B] of the loss of its global batch (design.md 4).

    Args:
        made: `sums`; totals: `counts` added up over the global batch, all microbatches of it.
    """
    loss = 0.0
    if "count" in made:
        blocks = [name.split("/")[1] for name in made if name.startswith("log_det/")]
        images = made["half_square"] - sum(made[f"log_det/{i}"] for i in blocks)
        images = images + latent_penalty * sum(made[f"latent/{i}"] for i in blocks)
        loss = loss + images / jnp.maximum(totals["dims"], 1)
    if "text/nll" in made:
        loss = loss + text_weight * made["text/nll"] / jnp.maximum(totals["tokens"], 1)
    return loss


def means(made: Mapping[str, Any]) -> dict[str, Any]:
    """Readable figures from added-up `sums`: nats a latent channel and its parts, nats a token and
    the share of likeliest ones, shares of the skips. What there was nothing of is left out."""
    found: dict[str, Any] = {}
    if made.get("count", 0) > 0:
        found |= per_dim(dict(made))
    if made.get("text/count", 0) > 0:
        found["text_nats"] = made["text/nll"] / made["text/count"]
        found["text_accuracy"] = made["text/correct"] / made["text/count"]
        if "skip/deep" in made:
            found["skip_deep"] = made["skip/deep"] / made["text/count"]
    if made.get("skip/patches", 0) > 0:
        found["skip_vlm"] = made["skip/vlm"] / made["skip/patches"]
    return found

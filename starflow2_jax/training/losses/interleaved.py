"""Exact negative log-likelihood of interleaved rows: every image and every text token, in nats.

A batch of rows is a mapping of arrays:

    ids, segments           int32 [B, T]; segment 0 is padding
    image                   int32 [B, T], m N + n for patch n of image m, -1 at text
    target                  bool [B, T], whether the item is a target of the loss
    positions               int32 [B, T, 3], M-RoPE positions of the VLM
    flow_positions          int32 [B, T, 3], of the item to predict, in the deep flow
    latent_mean, latent_logvar   float32 [B, M, N, D], the posterior of every image

Shapes: B rows, T positions, at most M images per row, N patches of an image, D latent channels, at
most K target tokens per row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax import config
from starflow2_jax.mesh import constrain
from starflow2_jax.models import qwen, starflow2
from starflow2_jax.models.backbone import BackboneConfig, BackboneInputs
from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import Tree
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses.flow import per_dim

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Stage:
    """The parts of the loss that a stage computes: the loss of `images`, of `text`, or both.

    Without text the adapter and the skips are off; without images the deep flow is.
    """

    images: bool
    text: bool


def stage_of(trainable: Iterable[str], cfg: BackboneConfig) -> Stage:
    """Return the stage that trains these subtrees."""
    names = set(trainable)
    return Stage(bool(names & cfg.image_subtrees), bool(names & cfg.text_subtrees))


def reads_fewer_vlm_states(cfg: BackboneConfig, stage: Stage, vlm_positions: int) -> bool:
    """Return whether the VLM is applied to `vlm_positions` positions of a row only."""
    return bool(vlm_positions) and cfg.kind == "pretzel" and not stage.text


@struct.dataclass
class LossTerms:
    """The contribution of every target image and token, in nats; zero where there is no target."""

    image: Any = None  # bool [B, M], which images are targets
    half_square: Any = None  # [B, M], 1/2 |z|^2
    log_dets: tuple = ()  # [B, M] of each block
    squares: tuple = ()  # [B, M] of each block, the square of its input
    token: Any = None  # bool [B, K], which of the K entries are tokens
    target_index: Any = None  # int [B, K], position whose state predicts the token
    nll: Any = None  # [B, K], nats of the token
    correct: Any = None  # bool [B, K], whether the token is the likeliest
    vlm_skip_ratio: Any = None  # [B], the VLM skip's shares summed over patches
    num_patches: Any = None  # [B], the number of those patches
    flow_skip_ratio: Any = None  # [B], the flow skip's shares summed over target tokens


def next_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return (patch, token), each bool [B, T]: whether the next item is a target of that kind.

    The first item of a segment has no predecessor and is no target.
    """
    segments, image = batch["segments"], batch["image"]
    same_segment = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    target = jnp.pad(batch["target"][:, 1:] & same_segment, ((0, 0), (0, 1)))
    is_patch = jnp.pad(image[:, 1:] >= 0, ((0, 0), (0, 1)))
    return target & is_patch, target & ~is_patch


def is_read_by_images(batch: Batch) -> jax.Array:
    """Return bool [B, T]: positions whose VLM states reach a target image, without the VLM's skip.

    These are the text positions before the last target patch of a segment, as inputs of the deep
    flow, and everything before such a text, which the VLM's attention sees. At a patch the deep
    flow reads u alone.
    """

    def is_before(mask):
        """Return bool [B, T]: whether `mask` is true there or later in the segment."""
        segments, length = batch["segments"], mask.shape[1]
        place = jnp.where(mask, jnp.arange(length), length - 1)
        next_place = jax.lax.cummin(place, 1, reverse=True)
        is_true = jnp.take_along_axis(mask, next_place, 1)
        return is_true & (jnp.take_along_axis(segments, next_place, 1) == segments)

    is_text = batch["image"] < 0
    return is_before(is_text & is_before(next_targets(batch)[0])) & (batch["segments"] > 0)


def target_counts(batch: Batch, stage: Stage) -> dict[str, jax.Array]:
    """Return the numbers of target dimensions (`dims`) and `tokens` of each row, float32 [B]."""
    patch, token = next_targets(batch)
    channels = batch["latent_mean"].shape[-1]
    return {
        "dims": stage.images * channels * patch.sum(1).astype(jnp.float32),
        "tokens": stage.text * token.sum(1).astype(jnp.float32),
    }


def sample_latents(batch: Batch, keys: jax.Array, cfg: Mapping[str, Any]) -> jax.Array:
    """Sample noisy latents x [B, M, N, D] from the posteriors, by the rows' keys [B].

    Images that are no targets have the noise `noise.context_sigma`, and clean copies are samples of
    the posterior equal to those of their targets.
    """
    shape = batch["latent_mean"].shape
    context_sigma, sigma = config.context_sigma(cfg), None
    images = jnp.broadcast_to(jnp.arange(shape[1]), shape[:2])
    if context_sigma is not None:
        is_target, is_copy = target_images(batch)
        images = images - is_copy
        sigma = jnp.where(is_target, cfg["noise"]["sigma"], context_sigma).reshape(-1)

    def fold_in_images(key, images):
        return jax.vmap(partial(jax.random.fold_in, key))(images)

    image_keys = jax.vmap(fold_in_images)(keys, images).reshape(-1)
    posterior = {n: batch[n].reshape(-1, *shape[2:]) for n in ("latent_mean", "latent_logvar")}
    return preprocess.tokens(posterior, image_keys, cfg, False, sigma=sigma).reshape(shape)


def target_images(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return (is_target, is_copy), each bool [B, M]: which images are targets, or clean copies.

    In rows with clean copies, the next image of a record after a target is the target's copy.
    """
    num_images, num_patches = batch["latent_mean"].shape[1:3]
    image = batch["image"] // num_patches
    in_slot = image[..., None] == jnp.arange(num_images)
    is_target = (in_slot & batch["target"][..., None]).any(1)
    segment = jnp.where(in_slot, batch["segments"][..., None], 0).max(1)
    same_segment = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
    is_copy = is_target[:, :-1] & ~is_target[:, 1:] & same_segment
    return is_target, jnp.pad(is_copy, ((0, 0), (1, 0)))


def loss_terms(
    params: Tree,
    batch: Batch,
    x: jax.Array,
    cfg: BackboneConfig,
    stage: Stage,
    *,
    text_into_flow: bool = True,
    text_targets: int = 0,
    text_chunk: int = 256,
    vlm_positions: int = 0,
) -> LossTerms:
    """Compute the terms of the loss of a batch of rows.

    Args:
        params: all subtrees that the stage reads, with `vlm`.
        x: latents [B, M, N, D].
        text_into_flow: False stops the text's gradient at W_D.
        text_targets: K, 0 for T. A row with more targets has a loss of NaN.
        text_chunk: positions of a row whose logits are computed at a time.
        vlm_positions: positions of a row to which a stage without text applies the VLM, 0 for T.
            The loss does not depend on it (see `starflow2.vlm_states_at`).
    """
    inputs, outputs, log_dets = backbone_inputs(params, batch, x, cfg, stage)
    is_image, u = inputs.is_image, inputs.latents
    forward = partial(cfg.forward, params, inputs, with_flow=stage.images, with_skips=stage.text)
    if reads_fewer_vlm_states(cfg, stage, vlm_positions):
        states = forward(vlm_states=fewer_vlm_states(params, inputs, batch, cfg, vlm_positions))
    else:
        states = forward()
    terms = LossTerms()
    patch, token = next_targets(batch)
    if stage.images:
        half_square, log_det, is_target = _deep_terms(
            params, states.flow_states, u, patch, batch["image"], x.shape[1], cfg
        )

        def at_targets(a):
            return jnp.where(is_target, a.reshape(is_target.shape), 0)

        terms = terms.replace(
            image=is_target,
            half_square=half_square,
            log_dets=(*map(at_targets, log_dets), log_det),
            squares=tuple(at_targets(jnp.square(tokens).sum((1, 2))) for tokens in outputs),
        )
    if states.vlm_skip_ratio is not None:
        ratio = jnp.where(is_image, states.vlm_skip_ratio, 0)
        num_patches = is_image.sum(1).astype(ratio.dtype)
        terms = terms.replace(vlm_skip_ratio=ratio.sum(1), num_patches=num_patches)
    if stage.text:
        text_terms = _text_terms(
            params, states, batch["ids"], token, cfg, text_into_flow, text_targets, text_chunk
        )
        terms = terms.replace(**text_terms)
    return terms


def backbone_inputs(
    params: Tree, batch: Batch, x: jax.Array, cfg: BackboneConfig, stage: Stage
) -> tuple[BackboneInputs, list[jax.Array], list[jax.Array]]:
    """Return the backbone's inputs for latents x [B, M, N, D], and `shallow_forward`'s results."""
    outputs, log_dets = starflow2.shallow_forward(params, x.reshape(-1, *x.shape[2:]), cfg)
    u = starflow2.latents_at_positions(outputs[-1].reshape(x.shape), batch["image"])
    inputs = BackboneInputs(
        ids=batch["ids"],
        latents=u,
        # The flow gets no gradient through the VLM.
        adapter_input=jax.lax.stop_gradient(u) if stage.text else None,
        is_image=batch["image"] >= 0,
        positions=batch["positions"],
        next_positions=batch["flow_positions"],
        # Segments rather than a mask: accelerator kernels read segments.
        segments=batch["segments"],
    )
    return inputs, outputs, log_dets


def fewer_vlm_states(
    params: Tree, inputs: BackboneInputs, batch: Batch, cfg: BackboneConfig, vlm_positions: int
) -> jax.Array:
    """Return the VLM's states [B, T, V] that images read, from `vlm_positions` of each row."""
    is_read = is_read_by_images(batch)
    return starflow2.vlm_states_at(params, inputs, cfg, is_read, vlm_positions)


def _deep_terms(params, h, u, patch, image, num_images, cfg):
    """Return the deep block's half squares and log_det [B, M], and which images are targets.

    z = (u - mean) / scale,  log_det = -sum log scale  (arXiv 2605.08029, section 3.2).
    """
    scale, mean = starflow2.image_head(params, h, cfg)

    def shift(a, fill):
        return jnp.concatenate([a[:, 1:], jnp.full_like(a[:, :1], fill)], 1)

    z = (at_least_float32(shift(u, 0)) - mean) / scale
    next_image = jnp.where(patch, shift(image, -1) // cfg.num_patches, -1)
    # A comparison rather than a matmul, which accelerators would round.
    of_image = next_image[..., None] == jnp.arange(num_images)

    def sum_by_image(a):
        return jnp.where(of_image, a.sum(-1, keepdims=True), 0).sum(1)

    return sum_by_image(0.5 * jnp.square(z)), -sum_by_image(jnp.log(scale)), of_image.any(1)


def _text_terms(params, states, ids, token, cfg, text_into_flow, text_targets, text_chunk):
    """Return the text fields of `LossTerms`, computed at the target positions only."""
    index = jnp.argsort(~token, axis=1, stable=True)[:, : text_targets or token.shape[1]]

    def at_index(a):
        return jnp.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), 1)

    is_token, targets = at_index(token), at_index(jnp.roll(ids, -1, 1))
    y = at_index(states.vlm_states)
    h = None if states.flow_states is None else at_index(states.flow_states)
    ratio = starflow2.flow_skip_ratio(params, y, h, cfg)
    text_states = starflow2.text_states(params, y, h, cfg, into_flow=text_into_flow)
    # Explicit sharding: without it, the partitioner of jax 0.10.2 computes wrong gradients of the
    # gathers above on a mesh with data, fsdp and tensor axes.
    text_states = constrain(text_states, "batch")
    nll, correct = _cross_entropy(params, text_states, targets, cfg, text_chunk)
    nll = jnp.where(is_token, nll, 0)
    overflow = (token.sum(1) > index.shape[1])[:, None]
    return {
        "token": is_token,
        "target_index": index,
        "nll": jnp.where(overflow, jnp.nan, nll),
        "correct": is_token & correct,
        "flow_skip_ratio": None if ratio is None else jnp.where(is_token, ratio, 0).sum(1),
    }


def _cross_entropy(params, states, targets, cfg, chunk):
    """Return the nats of target tokens [B, K], and whether they are the likeliest [B, K]."""
    batch_size, length = targets.shape
    # Gathered once and not for each chunk.
    params = {**params, "vlm": qwen.gather_head(params["vlm"], cfg.vlm)}
    chunk = min(chunk, length)
    num_chunks = -(-length // chunk)

    def split(a):
        padding = ((0, 0), (0, num_chunks * chunk - length), *((0, 0),) * (a.ndim - 2))
        a = jnp.pad(a, padding)
        return a.reshape(batch_size, num_chunks, chunk, *a.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint  # the logits of all positions at once would take gigabytes
    def chunk_terms(states, targets):
        logits = starflow2.text_logits(params, states, cfg)
        # A comparison rather than a gather, which cannot be sharded over the vocabulary.
        is_target = targets[..., None] == jnp.arange(logits.shape[-1])
        target_logits = jnp.where(is_target, logits, 0).sum(-1)
        nll = jax.nn.logsumexp(logits, -1) - target_logits
        return nll, logits.argmax(-1) == targets

    results = jax.lax.map(lambda chunk: chunk_terms(*chunk), (split(states), split(targets)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch_size, -1)[:, :length], results)


def row_metrics(terms: LossTerms, batch: Batch, stage: Stage) -> dict[str, jax.Array]:
    """Return the sums and counts of each row [B]; those of images as in `flow_loss`."""
    counts = target_counts(batch, stage)
    metrics: dict[str, Any] = {}
    if stage.images:
        metrics |= {"count": counts["dims"], "half_square": terms.half_square.sum(1)}
        for i, (log_det, square) in enumerate(zip(terms.log_dets, terms.squares)):
            metrics[f"log_det/{i}"], metrics[f"latent/{i}"] = log_det.sum(1), square.sum(1)
    if stage.text:
        metrics |= {"text/count": counts["tokens"], "text/nll": terms.nll.sum(1)}
        metrics["text/correct"] = terms.correct.sum(1).astype(jnp.float32)
    if terms.vlm_skip_ratio is not None:
        metrics |= {"skip/vlm": terms.vlm_skip_ratio, "skip/patches": terms.num_patches}
    if terms.flow_skip_ratio is not None:
        metrics["skip/deep"] = terms.flow_skip_ratio
    return metrics


def per_example_loss(
    metrics: Mapping[str, jax.Array],
    totals: Mapping[str, jax.Array],
    *,
    text_weight: float,
    latent_penalty: float,
) -> jax.Array:
    """Return each row's share [B] of the loss of its global batch, from its `row_metrics`.

    L = NLL(images) / dims + text_weight NLL(text) / tokens  (arXiv 2605.08029), with `totals`, the
    `target_counts` summed over the global batch.
    """
    loss = 0.0
    if "count" in metrics:
        blocks = [name.split("/")[1] for name in metrics if name.startswith("log_det/")]
        images = metrics["half_square"] - sum(metrics[f"log_det/{i}"] for i in blocks)
        images = images + latent_penalty * sum(metrics[f"latent/{i}"] for i in blocks)
        loss = loss + images / jnp.maximum(totals["dims"], 1)
    if "text/nll" in metrics:
        loss = loss + text_weight * metrics["text/nll"] / jnp.maximum(totals["tokens"], 1)
    return loss


def finalize_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return readable metrics from summed `row_metrics`, without those that have no targets."""
    metrics: dict[str, Any] = {}
    if sums.get("count", 0) > 0:
        metrics |= per_dim(dict(sums))
    if sums.get("text/count", 0) > 0:
        metrics["text_nats"] = sums["text/nll"] / sums["text/count"]
        metrics["text_accuracy"] = sums["text/correct"] / sums["text/count"]
        if "skip/deep" in sums:
            metrics["skip_deep"] = sums["skip/deep"] / sums["text/count"]
    if sums.get("skip/patches", 0) > 0:
        metrics["skip_vlm"] = sums["skip/vlm"] / sums["skip/patches"]
    return metrics

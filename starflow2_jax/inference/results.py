"""Results of generation: sampled items as parts with their likelihoods.

Shapes: N patches, D latent channels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from starflow2_jax.inference import decode_loop, denoise
from starflow2_jax.inference.denoise import ImageStart
from starflow2_jax.inference.image_latents import shallow_forward, shallow_inverse
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.session import Session, TurnStart, advance_counters, select_rows
from starflow2_jax.latents import codec


class SampledItem(NamedTuple):
    """A sampled token or patch."""

    token: int  #: the token id, or `decode_loop.PATCH`
    u: np.ndarray  #: the patch [D]; zeros for a token
    log_probs: np.ndarray  #: nats [3] as in `decode_loop.StepOutput`


@dataclass(frozen=True, eq=False)
class Results:
    """Generated parts of every row, and the session to continue from."""

    rows: list[list[Part]]  #: lists of parts
    #: Why each row ended: `end` (the model ended its turn or drew all images), `stop` (one of the
    #: stop texts) or `length` (the token limit; the last part is marked as truncated)
    finish: list[str]
    #: Log-likelihood in nats of everything that was sampled, delimiters included
    total: list[float]
    session: Session  #: the rows and their caches; used when the results are continued

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self) -> Iterator[list[Part]]:
        return iter(self.rows)

    def select_rows(self, rows: Sequence[int]) -> "Results":
        """Return the results of some rows alone."""
        return Results(
            rows=[self.rows[i] for i in rows],
            finish=[self.finish[i] for i in rows],
            total=[self.total[i] for i in rows],
            session=select_rows(self.session, rows),
        )


def find_stop(model: Model, items: Sequence[SampledItem], stop: Sequence[str]) -> int | None:
    """Return the number of items before the first stop text; None if no text contains one."""
    tokenizer, special = model.tokenizer, model.special_tokens
    image_tokens = (decode_loop.PATCH, special.vision_start, special.vision_end)
    delimiters = (*image_tokens, *special.turn_ends)
    begin = 0
    for i in range(len(items) + 1):
        if i < len(items) and items[i].token not in delimiters:
            continue
        tokens = [item.token for item in items[begin:i]]
        text = tokenizer.decode(tokens) if tokens else ""
        matches = [index for index in (text.find(s) for s in stop) if index >= 0]
        if matches:
            # The longest prefix of tokens that ends before the stop text.
            size = len(tokens)
            while size and not text[: min(matches)].startswith(tokenizer.decode(tokens[:size])):
                size -= 1
            return begin + size
        begin = i + 1
    return None


def collect_results(
    model: Model,
    session: Session,
    items: Sequence[Sequence[SampledItem]],
    finish: Sequence[str],
    options: GenerateOptions,
    start: TurnStart,
) -> Results:
    """Turn sampled items of every row into parts with likelihoods, and decode the images."""
    rows, images, totals = [], [], []
    for row_items, reason in zip(items, finish):
        parts, row_images, total = _split_into_parts(model, row_items)
        if reason == "length" and parts:
            parts[-1] = dataclasses.replace(parts[-1], truncated=True)
        rows.append(parts)
        images += row_images
        totals.append(total)
    if images:
        _add_images(model, session, items, rows, totals, np.stack(images), options, start)
    if not session.null:
        rows = [
            [dataclasses.replace(part, unconditional_log_likelihood=None) for part in row]
            for row in rows
        ]
    return Results(
        rows=rows,
        finish=list(finish),
        total=[float(t[0] - t[2]) if options.best_of_gain else float(t[0]) for t in totals],
        session=dataclasses.replace(session, part_counts=session.count_parts(rows)),
    )


def _split_into_parts(
    model: Model, items: Sequence[SampledItem]
) -> tuple[list[Part], list[np.ndarray], np.ndarray]:
    """Return the parts of a row, u [N, D] of each of its images, and the nats [3] of all items."""
    special = model.special_tokens
    parts: list[Part] = []
    images: list[np.ndarray] = []
    text_items: list[SampledItem] = []
    patch_items: list[SampledItem] = []
    total, opening_nats = np.zeros(3), 0.0

    def likelihoods(part_items: Sequence[SampledItem]) -> dict[str, float]:
        sums = np.sum([item.log_probs for item in part_items], 0, dtype=np.float64)
        names = ("log_likelihood", "sampling_log_likelihood", "unconditional_log_likelihood")
        return dict(zip(names, map(float, sums)))

    def end_text() -> None:
        if text_items:
            tokens = tuple(item.token for item in text_items)
            text = model.tokenizer.decode(tokens)
            parts.append(Part("text", text=text, tokens=tokens, **likelihoods(text_items)))
            text_items.clear()

    for item in items:
        total = total + item.log_probs
        if item.token == decode_loop.PATCH:
            patch_items.append(item)
            if len(patch_items) == model.model_config.num_patches:
                images.append(np.stack([patch.u for patch in patch_items]))
                parts.append(Part("image", delimiters=opening_nats, **likelihoods(patch_items)))
                patch_items = []
        elif item.token == special.vision_start:
            end_text()
            opening_nats = float(item.log_probs[0])
        elif item.token in special.turn_ends:
            end_text()
            if not parts:
                parts.append(Part("text", log_likelihood=0.0))
            nats = parts[-1].delimiters + float(item.log_probs[0])
            parts[-1] = dataclasses.replace(parts[-1], delimiters=nats)
        elif item.token != special.vision_end:
            text_items.append(item)
    end_text()
    return parts, images, total


def _add_images(model, session, items, rows, totals, u, options, start) -> None:
    """Add pixels, latents and log-determinants: log p(x) = log p(u) + log_det."""
    cfg = model.model_config
    x = shallow_inverse(model.params, u, cfg, options.jacobi)
    log_det = shallow_forward(model.params, x, cfg)[1]
    clean = _denoise_images(model, session, items, x, start) if options.denoise else x
    pixels = None if model.codec is None else codec.decode(model.codec, np.asarray(clean))
    image_index = 0
    for b, parts in enumerate(rows):
        for j, part in enumerate(parts):
            if part.kind != "image":
                continue
            nats = float(log_det[image_index])
            parts[j] = dataclasses.replace(
                part,
                latent=x[image_index],
                image=None if pixels is None else pixels[image_index],
                log_likelihood=part.log_likelihood + nats,
                sampling_log_likelihood=part.sampling_log_likelihood + nats,
                unconditional_log_likelihood=part.unconditional_log_likelihood + nats,
            )
            totals[b] = totals[b] + nats
            image_index += 1


def _denoise_images(model, session, items, x, start) -> np.ndarray:
    """Return images x [I, N, D] after a score step; the training noise must be Gaussian."""
    noise, cfg = model.cfg["noise"], model.model_config
    if noise["kind"] != "gaussian" or not noise["sigma"]:
        raise ValueError(
            f"denoise needs a model that was trained with Gaussian noise, but this one was trained "
            f"with noise.kind={noise['kind']!r}, noise.sigma={noise['sigma']!r}"
        )
    vision_start, clean = model.special_tokens.vision_start, []
    shallow_params = {"shallow": model.params["shallow"]}
    for b, row_items in enumerate(items):
        tokens = [item.token for item in row_items]
        for t in (t for t, token in enumerate(tokens) if token == vision_start):
            counters = advance_counters(model, start, b, tokens[: t + 1])
            vlm_position = int(start.state.next_vlm_position[b]) + counters["position_steps"]
            flow_index = int(start.state.flow_index[b]) + counters["flow_steps"]
            image = jnp.asarray(x[len(clean)])
            denoised = denoise.image_score_step(
                shallow_params,
                session.params,
                session.state,
                b,
                ImageStart(
                    token=jnp.int32(vision_start),
                    slot=jnp.int32(start.slot + t + 1),
                    vlm_position=jnp.int32(vlm_position),
                    flow_index=jnp.int32(flow_index),
                ),
                image,
                jnp.asarray(noise["sigma"], image.dtype),
                cfg=cfg,
            )
            clean.append(np.asarray(denoised))
    return np.stack(clean)


def select_best(results: Results, best_of: int) -> Results:
    """Return, of every `best_of` rows, the one with the largest total."""
    groups = np.asarray(results.total).reshape(-1, best_of)
    rows = np.argmax(groups, 1) + np.arange(len(groups)) * best_of
    return results.select_rows([int(row) for row in rows])

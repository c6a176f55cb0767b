"""What a decode loop drew, as parts with their likelihoods.

Axes: N patches, D latent channels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from starflow2_jax.inference import decode_loop, denoise, session
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.session import Conversation
from starflow2_jax.latents import codec

if TYPE_CHECKING:
    from starflow2_jax.data.chat_layout import Tokenizer  # heavy
    from starflow2_jax.inference.model import Model


@dataclass(frozen=True, eq=False)
class Results:
    """Parts of every row, and what it takes to go on.

    Attributes:
        rows: lists of parts. finish: of each row why it ended: `end` (the model or the number of
            images), `stop` (one of the stop texts), `length` (the number of tokens; the last part
            is marked truncated). total: nats of all that was drawn, delimiters too.
        conversation: give the results as `after` to continue.
    """

    rows: list[list[Part]]
    finish: list[str]
    total: list[float]
    session: Conversation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self) -> Iterator[list[Part]]:
        return iter(self.rows)

    def take(self, rows: Sequence[int]) -> "Results":
        """The results of some rows alone."""
        pick = lambda values: [values[i] for i in rows]
        held = session.take(self.session, rows)
        return Results(pick(self.rows), pick(self.finish), pick(self.total), held)


def stop_at(tokenizer: "Tokenizer", row: Sequence[Any], stop: Sequence[str], ids: decode_loop.Ids):
    """How many picks stay where a text holds one of `stop`; None where none does."""
    marks = (decode_loop.PATCH, ids.vision_start, ids.vision_end, *ids.ends)
    begin = 0
    for i in range(len(row) + 1):
        if i < len(row) and row[i][0] not in marks:
            continue
        said = [pick for pick, _, _ in row[begin:i]]
        text = tokenizer.decode(said) if said else ""
        found = [at for at in (text.find(s) for s in stop) if at >= 0]
        if found:
            size = len(said)
            while size and not text[: min(found)].startswith(tokenizer.decode(said[:size])):
                size -= 1
            return begin + size
        begin = i + 1
    return None


def finished(
    model: "Model",
    held: Conversation,
    records,
    reasons,
    options: GenerateOptions,
    start: Any,
    first: int,
) -> Results:
    """Parts with their likelihoods; images decoded.

    Args:
        records: of every row the (token, u, nats) of what was drawn; reasons: why it ended.
        start: the state before, on the host; first: the slot of the item that was pending then.
    """
    ids, cfg = session.delimiters(model.tokenizer, model.model_config), model.model_config
    rows, drawn, totals = [], [], []
    for row, reason in zip(records, reasons):
        parts, images, total = _parts(model.tokenizer, row, ids, cfg)
        if reason == "length" and parts:
            parts[-1] = dataclasses.replace(parts[-1], truncated=True)
        rows.append(parts)
        drawn += images
        totals.append(total)
    if drawn:
        x = session.shallow_inverse(model.params, np.stack(drawn), cfg, options.jacobi)
        log_det = session.shallow(model.params, x, cfg)[1]
        cleaned = _denoised(model, held, records, x, start, first) if options.denoise else x
        pixels = None if model.codec is None else codec.decode(model.codec, np.asarray(cleaned))
        number = 0
        for b, parts in enumerate(rows):
            for j, part in enumerate(parts):
                if part.kind != "image":
                    continue
                more = float(log_det[number])
                add = lambda nats, more=more: None if nats is None else nats + more
                parts[j] = dataclasses.replace(
                    part,
                    latent=x[number],
                    image=None if pixels is None else pixels[number],
                    log_likelihood=add(part.log_likelihood),
                    sampling_log_likelihood=add(part.sampling_log_likelihood),
                    unconditional_log_likelihood=add(part.unconditional_log_likelihood),
                )
                totals[b] = totals[b] + np.array([more, more, more])
                number += 1
    if not held.null:
        rows = [[dataclasses.replace(p, unconditional_log_likelihood=None) for p in row]
                for row in rows]  # fmt: skip
    parts_ = tuple(n + sum(p.counts for p in row) for n, row in zip(held.parts, rows))
    held = dataclasses.replace(held, parts=parts_)
    totals_ = [float(t[0] - t[2]) if options.best_of_gain else float(t[0]) for t in totals]
    return Results(rows, list(reasons), totals_, held)


def _denoised(model, held, records, x, start, first):
    """x [I, N, D] after a score step each, where the model was trained with Gaussian noise."""
    noise, cfg = model.cfg["noise"], model.model_config
    if noise["kind"] != "gaussian" or not noise["sigma"]:
        raise ValueError(f"denoise: the model was trained with noise.kind={noise['kind']!r}")
    ids, cleaned = session.delimiters(model.tokenizer, cfg), []
    shallow = {"shallow": model.params["shallow"]}
    for b, row in enumerate(records):
        picks = [pick for pick, _, _ in row]
        for t in (t for t, pick in enumerate(picks) if pick == ids.vision_start):
            grown = session.moved(picks[: t + 1], start, b, cfg, ids)
            begin = (
                *(ids.vision_start, first + t + 1),
                int(start.position[b]) + grown["position"],
                int(start.index[b]) + grown["index"],
            )
            now = jnp.asarray(x[len(cleaned)])
            args = (shallow, held.params, held.state, b, tuple(map(jnp.int32, begin)), now)
            done = denoise.image_score_step(*args, jnp.asarray(noise["sigma"], now.dtype), cfg=cfg)
            cleaned.append(np.asarray(done))
    return np.stack(cleaned)


def _parts(tokenizer, row, ids, cfg):
    """A row's parts, its images' u, and the nats [3] of all picks."""
    parts: list[Part] = []
    images, said, patches = [], [], []
    total, opening = np.zeros(3), 0.0

    def nats(of):
        each = np.sum([n for _, _, n in of], 0, dtype=np.float64)
        names = ("log_likelihood", "sampling_log_likelihood", "unconditional_log_likelihood")
        return dict(zip(names, map(float, each)))

    def text():
        if said:
            tokens = tuple(pick for pick, _, _ in said)
            parts.append(Part("text", text=tokenizer.decode(tokens), tokens=tokens, **nats(said)))
            said.clear()

    for entry in row:
        pick, _, own = entry
        total = total + own
        if pick == decode_loop.PATCH:
            patches.append(entry)
            if len(patches) == cfg.patches:
                images.append(np.stack([u for _, u, _ in patches]))
                parts.append(Part("image", delimiters=opening, **nats(patches)))
                patches = []
        elif pick == ids.vision_start:
            text()
            opening = float(own[0])
        elif pick in ids.ends:
            text()
            if not parts:
                parts.append(Part("text", log_likelihood=0.0))
            last = parts[-1]
            parts[-1] = dataclasses.replace(last, delimiters=last.delimiters + float(own[0]))
        elif pick != ids.vision_end:
            said.append(entry)
    text()
    return parts, images, total


def best(results: Results, options: GenerateOptions) -> Results:
    """Of every `best_of` rows the one with the largest total."""
    groups = np.asarray(results.total).reshape(-1, options.best_of)
    rows = np.argmax(groups, 1) + np.arange(len(groups)) * options.best_of
    return results.take([int(row) for row in rows])

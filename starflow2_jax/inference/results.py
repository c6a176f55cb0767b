"""Results of generation: sampled items as parts with their likelihoods.

Shapes: N patches, D latent channels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.clean_copies import CleanImage, clean_image, image_starts
from starflow2_jax.inference.image_latents import shallow_forward, shallow_inverse
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.part_builder import PartBuilder, with_log_det
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.session import Session, select_rows
from starflow2_jax.inference.turn import SampledItem, TurnStart
from starflow2_jax.latents import codec


@dataclass(frozen=True, eq=False)
class Results:
    """Generated parts of every row, and the session to continue from."""

    rows: list[list[Part]]  #: lists of parts
    #: Why each row ended: `end` (the model ended its turn or drew all images), `stop` (one of the
    #: stop texts), `length` (the token limit) or `interrupted` (by `on_chunk`). After the last two
    #: the last part is marked as truncated
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
    clean: dict[tuple[int, int], CleanImage],
) -> Results:
    """Turn sampled items of every row into parts with likelihoods, and decode the images.

    `clean` are the images that were denoised in the turn, by their row and first item.
    """
    rows, images, totals = [], [], []
    for b, (row_items, reason) in enumerate(zip(items, finish)):
        builder = PartBuilder(model, bool(start.state.needs_copy[b]))
        builder.add(row_items)
        builder.end_text()
        parts = builder.parts
        if reason in ("length", "interrupted") and parts:
            parts[-1] = dataclasses.replace(parts[-1], truncated=True)
        rows.append(parts)
        images += [image.u for image in builder.images]
        totals.append(builder.total)
    if images:
        session = _add_images(
            model, session, items, rows, totals, np.stack(images), options, start, clean
        )
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


def _add_images(model, session, items, rows, totals, u, options, start, clean) -> Session:
    """Add pixels, latents and log-determinants: log p(x) = log p(u) + log_det.

    The returned session has the clean copies of the last images that rows have not read again.
    """
    cfg = model.model_config
    x = shallow_inverse(model.params, u, cfg, options.jacobi)
    log_det = shallow_forward(model.params, x, cfg)[1]
    places = [
        (b, t)
        for b, row_items in enumerate(items)
        for t in image_starts(model, start, b, row_items)
    ]
    images = None
    if options.denoise or model.has_clean_copies:
        images = [
            clean.get((b, t)) or clean_image(model, session, start, b, items[b], t, image)
            for (b, t), image in zip(places, x)
        ]
    pixels = None
    if model.codec is not None:
        latents = np.stack([image.denoised for image in images]) if options.denoise else x
        pixels = codec.decode(model.codec, np.asarray(latents))
    for i, ((b, _), part_place) in enumerate(zip(places, _image_places(rows))):
        part, nats = rows[b][part_place], float(log_det[i])
        rows[b][part_place] = dataclasses.replace(
            with_log_det(part, nats),
            latent=x[i],
            clean_latent=images[i].copy if model.has_clean_copies else None,
            image=None if pixels is None else pixels[i],
        )
        totals[b] = totals[b] + nats
    if not model.has_clean_copies:
        return session
    needs_copy = np.asarray(session.state.needs_copy)
    last = {b: i for i, (b, _) in enumerate(places) if needs_copy[b]}
    copies = list(session.copies)
    if last:
        new = np.stack([images[i].copy for i in last.values()])
        for b, copy in zip(last, shallow_forward(model.params, new, cfg)[0]):
            copies[b] = copy
    return dataclasses.replace(session, copies=tuple(copies))


def _image_places(rows: Sequence[Sequence[Part]]) -> list[int]:
    """Return the place within its row of each image, row by row."""
    return [j for parts in rows for j, part in enumerate(parts) if part.kind == "image"]


def select_best(results: Results, best_of: int) -> Results:
    """Return, of every `best_of` rows, the one with the largest total."""
    groups = np.asarray(results.total).reshape(-1, best_of)
    rows = np.argmax(groups, 1) + np.arange(len(groups)) * best_of
    return results.select_rows([int(row) for row in rows])

"""The engine: one thread that admits requests to rows, samples them, and lets rows go.

Rows of all requests are sampled together. Between two chunks of steps the thread looks at its
inbox, so a row that has ended makes room for the next request at once, and a client that has left
frees its row.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.row_caches import ReadRow
from starflow2_jax.inference.row_items import RowItems, layout_conversation
from starflow2_jax.inference.row_pool import RowOptions, RowPool
from starflow2_jax.serving import admission, sessions, settings as server_settings
from starflow2_jax.serving.content import Conversation
from starflow2_jax.serving.draw import DrawnImage, ImageRow, draw
from starflow2_jax.serving.errors import RequestError, internal_error
from starflow2_jax.serving.image_store import ImageStore
from starflow2_jax.serving.requests import Failed, Request
from starflow2_jax.serving.row_answer import RowAnswer
from starflow2_jax.serving.sessions import SessionCache, SessionRows
from starflow2_jax.serving.settings import Settings

_LOG = logging.getLogger("starflow2_jax.serving")
# Seconds between two looks at the deadlines of an idle engine.
_IDLE_SECONDS = 0.5


class Engine:
    """The thread that samples, with its pools of rows and its caches.

    Attributes:
        images: the images that the model has drawn or read.
        counts: numbers of events since the start, for the metrics.
    """

    def __init__(self, model: Model, settings: Settings):
        self.model, self.settings = model, settings
        self.images = ImageStore(settings.stored_images)
        self.counts: Counter[str] = Counter()
        lengths = settings.lengths or server_settings.default_lengths(
            model.model_config.num_patches
        )
        self._make_pools: Callable[[], list[RowPool]] = lambda: [
            RowPool(model, max(settings.max_batch, 2), server_settings.slots(length))
            for length in sorted(lengths)
        ]
        self._pools = self._make_pools()
        self._sessions = SessionCache(settings.sessions)
        self._inbox: deque[Request] = deque()
        self._waiting: deque[tuple[Request, int]] = deque()
        self._num_waiting = 0  # requests among them, for other threads
        self._rows: dict[tuple[int, int], RowAnswer] = {}  # by the number of the pool, and the row
        self._ending: list[RowAnswer] = []  # whose rows are free, but whose images are not decoded
        self._drawing: list[tuple[RowAnswer, int, Future[DrawnImage]]] = []
        self._wake, self._closing = threading.Event(), threading.Event()
        self.worker = ThreadPoolExecutor(1, "starflow2-images")
        self._thread = threading.Thread(target=self._run, name="starflow2-engine", daemon=True)

    # ------------------------------------------------------------------------- for other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; requests in progress fail."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.worker.shutdown(wait=False, cancel_futures=True)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: The queue is full.
        """
        if self.queue_length >= self.settings.queue:
            self.counts["refused"] += 1
            raise RequestError("the queue is full; try again later", 429, code="queue_full")
        self._inbox.append(request)
        self._wake.set()

    def known_parts(self, conversation: Conversation) -> list[Part]:
        """Return the parts of a conversation, its sampled texts with their tokens.

        Raises:
            RequestError: The conversation is longer than any row of this server.
        """
        keys = sessions.prefix_keys(conversation.parts, conversation.digests)
        parts = self._sessions.with_tokens(conversation.parts, keys)
        values = [image.values for image in conversation.images]
        size = len(layout_conversation(self.model, parts, values))
        limit = max(pool.capacity for pool in self._pools)
        if size > limit:
            raise RequestError(
                f"messages: {size} tokens and patches are more than the {limit} of this server",
                param="messages",
                code="context_length_exceeded",
            )
        return parts

    def cancel(self, request: Request) -> None:
        """Drop a request whose client has left."""
        request.cancelled.set()
        self._wake.set()

    @property
    def queue_length(self) -> int:
        """The number of requests that wait for rows."""
        return len(self._inbox) + self._num_waiting

    @property
    def is_alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    def gauges(self) -> dict[str, float]:
        """Return the present numbers of rows, waiting requests, sessions and so on."""
        used = sum(pool.num_rows - pool.num_free for pool in self._pools)
        return {
            "rows_used": used,
            "rows": sum(pool.num_rows for pool in self._pools),
            "queue": self.queue_length,
            "sessions": len(self._sessions),
            "images_stored": len(self.images),
            "programs_compiled": decode_loop.decode_chunk._cache_size(),
            "session_hits": self._sessions.hits,
            "session_misses": self._sessions.misses,
        }

    # ---------------------------------------------------------------------------------- the loop

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            try:
                if not self._turn():
                    self._wake.wait(_IDLE_SECONDS)
            except Exception:  # a fault of the server, which must go on
                _LOG.exception("the engine failed; its requests are dropped")
                self._fail_all(internal_error())
        self._fail_all(RequestError("the server is shutting down", 503, code="shutdown"))

    def _turn(self) -> bool:
        """Do all that can be done at once; return whether there may be more to do."""
        while self._inbox:
            self._prepare(self._inbox.popleft())
        self._drop()
        self._admit()
        self._collect_images()
        is_busy = False
        for number, pool in enumerate(self._pools):
            if pool.is_active:
                self._step(number, pool)
                is_busy = True
        return is_busy

    def _fail_all(self, error: RequestError) -> None:
        requests = [request for request, _ in self._waiting]
        requests += [a.request for a in (*self._rows.values(), *self._ending)]
        requests += list(self._inbox)
        for request in {id(request): request for request in requests}.values():
            self._fail(request, error)
        self._inbox.clear()
        self._waiting.clear()
        self._num_waiting = 0
        self._rows.clear()
        self._ending.clear()
        self._drawing.clear()
        self._pools = [] if self._closing.is_set() else self._make_pools()

    def _fail(self, request: Request, error: RequestError) -> None:
        if not request.cancelled.is_set():
            request.cancelled.set()
            request.emit(Failed(error))

    # ------------------------------------------------------------------------------- admission

    def _prepare(self, request: Request) -> None:
        """Lay out a request's conversation and queue its candidates, or refuse it."""
        try:
            keys = sessions.prefix_keys(request.conversation.parts, request.conversation.digests)
            lengths = [pool.capacity for pool in self._pools]
            planned = admission.plan_request(self.model, request, keys, self._sessions, lengths)
            rows = 2 if planned.null_items else 1
            if rows > self._pools[planned.pool].num_rows:
                raise RequestError("guidance needs a server with --max_batch 2 or more")
        except RequestError as error:
            self._fail(request, error)
            return
        except ValueError as error:
            self._fail(request, RequestError(str(error)))
            return
        request.notes["plan"] = planned
        self._waiting += [(request, i) for i in range(request.options.copies)]

    def _drop(self) -> None:
        """Free the rows of clients that have left, and of requests that took too long."""
        answers = [*self._rows.values(), *self._ending]
        requests = [a.request for a in answers] + [request for request, _ in self._waiting]
        for request in requests:
            if request.is_late:
                limit = f"{self.settings.timeout:g} s"
                self._fail(request, RequestError(f"no answer within {limit}", 504, code="timeout"))
        self._waiting = deque(w for w in self._waiting if not w[0].cancelled.is_set())
        self._ending = [a for a in self._ending if not a.request.cancelled.is_set()]
        for answer, _, future in self._drawing:
            if answer.request.cancelled.is_set():
                future.cancel()
        self._drawing = [d for d in self._drawing if not d[0].request.cancelled.is_set()]
        for (number, row), answer in list(self._rows.items()):
            if answer.request.cancelled.is_set():
                self.counts["rows_freed"] += 1
                self._pools[number].release(row)
                del self._rows[number, row]

    def _admit(self) -> None:
        """Give free rows to candidates, in their order in each pool."""
        full, waiting = set(), deque()
        while self._waiting:
            request, candidate = self._waiting.popleft()
            planned = request.notes["plan"]
            pool, rows = self._pools[planned.pool], 2 if planned.null_items else 1
            if planned.pool in full or pool.num_free < rows:
                full.add(planned.pool)
                waiting.append((request, candidate))
            else:
                self._start(request, candidate, planned, pool)
        self._waiting = waiting
        self._num_waiting = len({id(request) for request, _ in waiting})

    def _start(
        self, request: Request, candidate: int, planned: admission.Plan, pool: RowPool
    ) -> None:
        """Read a request's prompt if no other candidate has, and start a row."""
        notes = request.notes
        if "rows" not in notes:
            notes["rows"] = self._read_prompt(planned, pool)
            self.counts["prompt_items"] += len(planned.items)
            self.counts["cached_items"] += notes["rows"][""][1]
        options = request.options
        null = None
        if planned.null_items is not None:
            null = planned.null_items, notes["rows"][options.null][0]
        read, cached = notes["rows"][""]
        row_options = RowOptions(
            key=row_key(options.seed, candidate),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            image_temperature=options.image_temperature,
            guidance=options.guidance,
            max_tokens=planned.max_tokens,
            max_images=options.image_limit,
            images_required=options.images or 0,
            begins_image=options.image_start,
        )
        row = pool.admit(planned.items, read, row_options, planned.num_parts, null)
        answer = RowAnswer(self.model, request, candidate, (len(planned.items), cached))
        self._rows[planned.pool, row] = answer
        if candidate + 1 == options.copies:
            del notes["rows"]

    def _read_prompt(
        self, planned: admission.Plan, pool: RowPool
    ) -> dict[str, tuple[ReadRow, int]]:
        """Return, for each branch, its row and the number of items that a session had read."""
        rows = planned.session.branches if planned.session else {}
        branches: dict[str, RowItems] = {"": planned.items}
        if planned.null_items is not None:
            branches[planned.null] = planned.null_items
        return {name: pool.read(items, rows.get(name)) for name, items in branches.items()}

    # -------------------------------------------------------------------------------- sampling

    def _step(self, number: int, pool: RowPool) -> None:
        """Run a chunk of a pool's rows, and end those that are done."""
        start = time.perf_counter()
        is_awaited = bool(self._waiting or self._inbox)
        sampled = pool.run_chunk(self.settings.chunk, until_row_ends=is_awaited)
        self.counts["seconds_sampling"] += time.perf_counter() - start
        self.counts["chunks"] += 1
        for row, items in sampled.items():
            answer = self._rows[number, row]
            patches = sum(item.token == decode_loop.PATCH for item in items)
            self.counts["patches"] += patches
            self.counts["tokens"] += len(items) - patches
            is_stopped = answer.add(items)
            for image in answer.new_images():
                self._submit_image(answer, pool, row, image)
            mode = pool.mode(row)
            if is_stopped:
                pool.truncate(row, answer.items)
                self._end_row(number, row, "stop")
            elif mode == decode_loop.OUT_OF_TOKENS:
                self._end_row(number, row, "length" if answer.request.options.max_tokens else "end")
            elif mode == decode_loop.ENDED:
                self._end_row(number, row, "end")
            answer.tell()
        self._collect_images()

    def _submit_image(self, answer: RowAnswer, pool: RowPool, row: int, image: Any) -> None:
        """Let the worker decode an image."""
        options, view = answer.request.options, None
        if options.denoise or self.model.has_clean_copies:
            view = ImageRow(*pool.row_session(row), tuple(answer.items), image.first)
        future = self.worker.submit(draw, self.model, image.u, view, denoise=options.denoise)
        future.add_done_callback(lambda _: self._wake.set())
        self._drawing.append((answer, image.part, future))

    def _collect_images(self) -> None:
        """Hand decoded images to their answers, and to rows that wait for a clean copy."""
        for entry in [entry for entry in self._drawing if entry[2].done()]:
            self._drawing.remove(entry)
            answer, part, future = entry
            try:
                image = future.result()
            except Exception:  # a fault of the server, which must go on
                _LOG.exception("an image could not be decoded")
                self._fail(answer.request, internal_error())
                continue
            self.images.put(image.digest, image.stored)
            self.counts["images"] += 1
            answer.set_drawn(part, image)
            answer.tell()
        for (number, row), answer in self._rows.items():
            if self._pools[number].mode(row) >= decode_loop.COPY_TEXT:
                image = answer.last_drawn()
                if image is not None:
                    values = image.stored.values.clean
                    answer.add([self._pools[number].read_copy(row, values)])
        for answer in [answer for answer in self._ending if answer.is_complete]:
            self._ending.remove(answer)
            self._complete(answer)

    def _end_row(self, number: int, row: int, finish: str) -> None:
        """Free a row whose answer has ended, and keep what it has read."""
        answer, pool = self._rows.pop((number, row)), self._pools[number]
        names = ["", answer.request.options.null]
        session = (
            SessionRows(dict(zip(names, pool.snapshot(row)))) if self.settings.sessions else None
        )
        pool.release(row)
        answer.end(finish, session or SessionRows({}))
        self._ending.append(answer)

    def _complete(self, answer: RowAnswer) -> None:
        """Tell of a complete answer, or of the best candidate once all are complete."""
        best_of = answer.request.options.best_of
        answer.tell()
        if best_of > 1:
            groups = answer.request.notes.setdefault("groups", {})
            group = groups.setdefault(answer.answer, [])
            group.append(answer)
            if len(group) < best_of:
                return
            answer = max(group, key=lambda a: (a.log_likelihood, -a.number))
            answer.tell_all()
            del groups[answer.answer]
        self.counts["answers"] += 1
        self._keep(answer)

    def _keep(self, answer: RowAnswer) -> None:
        """Keep the caches of an answer for the next message of its conversation."""
        conversation, images = answer.request.conversation, answer.drawn_images()
        parts = [part for part in answer.parts if part.kind == "image" or part.text]
        digests = [*conversation.digests, *(image.digest for image in images)]
        keys = sessions.prefix_keys([*conversation.parts, *parts], digests)
        for part, key in zip(parts, keys[len(keys) - len(parts) :]):
            if part.kind == "text":
                self._sessions.put_tokens(key, part.tokens)
        if keys and answer.session.branches:
            self._sessions.put(keys[-1], answer.session)

    # ---------------------------------------------------------------------------------- warm-up

    def compile(self) -> None:
        """Compile every program before the first request; call it before `start`."""
        for pool in self._pools:
            admission.compile_pool(self.model, pool)
        admission.compile_images(self.model)


def row_key(seed: int, candidate: int) -> np.ndarray:
    """Return the key data of a candidate's row: that of a sample of `generate`."""
    return np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), candidate)))

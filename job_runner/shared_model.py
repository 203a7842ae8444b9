"""One model for all attempts of a worker: texts that several of them want vectors of at the same time share its calls.

An attempt that asks waits a few milliseconds for others at most, and gets what the model alone would have given it. Calls
are filled in turns: a text of each knowledge base, and within one a text of each request; so a long document does not keep
a short one waiting. A call that fails is repeated for each request alone, so that it fails for the one that is to blame.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Final

from job_runner.embed import Embedder, make_embedder
from job_runner.watchdog import Pulse, current_pulse

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WAIT_SECONDS: Final = 0.003
"""So long a call waits for further texts: about what the packaged model takes for a short one."""

_party: ContextVar[str] = ContextVar("party", default="")


def embed_for(party: str) -> None:
    """Say for which knowledge base this asyncio task and what it starts ask for vectors: each has its turn."""
    _party.set(party)


class Request:
    """Texts of one attempt that wait for their vectors. Of a length of 1 and more."""

    def __init__(
        self,
        texts: Sequence[str],
        sizes: Sequence[int],
        *,
        party: str = "",
        pulse: Pulse | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        """``sizes``: tokens of each text, or more. ``on_end`` is called by the thread that makes the calls."""
        self.texts = texts
        self.sizes = sizes
        self.party = party
        self.pulse = pulse
        self.next = 0
        """The first text that is in no call yet."""
        self.left = len(texts)
        """Texts that have no vector yet."""
        self.vectors: npt.NDArray[np.float32] | None = None
        self.error: Exception | None = None
        self.on_end = on_end

    @property
    def answer(self) -> "npt.NDArray[np.float32]":
        """The vectors, after its end. Raises what it has failed with."""
        if self.error is not None:
            raise self.error
        assert self.vectors is not None  # noqa: S101 - for the type checker: it has ended well
        return self.vectors


class Line:
    """Requests that wait, and whose turn it is. Not for two threads at once."""

    def __init__(self) -> None:
        self._parties: deque[deque[Request]] = deque()
        self._by_name: dict[str, deque[Request]] = {}
        self.texts = 0
        """How many wait."""

    def __iter__(self) -> Iterator[Request]:
        return (request for party in self._parties for request in party)

    def add(self, request: Request) -> None:
        """Put a request into the line; a knowledge base that was not in it comes last."""
        party = self._by_name.get(request.party)
        if party is None:
            party = self._by_name[request.party] = deque()
            self._parties.append(party)
        party.append(request)
        self.texts += len(request.texts)

    def take(self, most: int, budget: int) -> dict[Request, list[int]]:
        """Return the texts of the next call: request → indices, at most ``most`` of them.

        With padding to the longest they have at most ``budget`` tokens; a longer text is a call of its own. Who had to be
        passed over for that is first in the next call.
        """
        taken: dict[Request, list[int]] = {}
        count = longest = 0
        passed: list[deque[Request]] = []
        while self._parties and count < most:
            party = self._parties.popleft()
            request = party[0]
            size = max(longest, request.sizes[request.next])
            if count and (count + 1) * size > budget:
                passed.append(party)
                continue
            longest = size
            count += 1
            taken.setdefault(request, []).append(request.next)
            request.next += 1
            party.popleft()
            if request.next < len(request.texts):
                party.append(request)
            if party:
                self._parties.append(party)
            else:
                del self._by_name[request.party]
        self._parties.extendleft(reversed(passed))
        self.texts -= count
        return taken

    def drop(self, request: Request) -> None:
        """Take what is left of a request out of the line."""
        party = self._by_name.get(request.party)
        if party is None or request not in party:
            return
        party.remove(request)
        self.texts -= len(request.texts) - request.next
        if not party:
            self._parties.remove(party)
            del self._by_name[request.party]


class SharedModel:
    """An :class:`~job_runner.embed.Embedder` for several attempts at once, before another one. Its calls are made by one
    thread."""

    def __init__(
        self,
        inner: Embedder,
        *,
        batch_size: int,
        may_ask: Callable[[], int] = lambda: 2**31,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """``batch_size``: most texts of a call. ``may_ask``: attempts that may ask for vectors; when all have, a call waits
        for nobody."""
        self._inner = inner
        self._most = batch_size
        self._may_ask = may_ask
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._line = Line()
        self._waiting: set[Request] = set()
        self._computing = threading.Lock()
        self._started = False
        self._warm = False
        self.calls = 0
        self.texts = 0
        """In all calls."""

    @property
    def name(self) -> str:
        """Of the model."""
        return self._inner.name

    @property
    def dimension(self) -> int:
        """Of the model."""
        return self._inner.dimension

    @cached_property
    def fingerprint(self) -> str:
        """Of the model: all weights are read, once."""
        return self._inner.fingerprint

    @property
    def max_tokens(self) -> int | None:
        """Of the model."""
        return self._inner.max_tokens

    @property
    def batch_tokens(self) -> int:
        """Of the model."""
        return self._inner.batch_tokens

    @property
    def room(self) -> int:
        """Texts that all calls together could have had."""
        return self.calls * self._most

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the model makes of a text."""
        return self._inner.count_tokens(text)

    @property
    def at_hand(self) -> bool:
        """Whether it is loaded, and its fingerprint known: then nothing of it blocks but what it computes."""
        return self._warm and "fingerprint" in self.__dict__

    def warm_up(self) -> None:
        """Load the model."""
        if not self._warm:
            self._inner.warm_up()
            self._warm = True

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return one vector a text; other attempts' texts may be in the same call. Raises what the model does for these."""
        if not texts:
            return self._inner.embed(texts)
        small = self._inner.batch_tokens // self._most
        sizes = [size if (size := len(text.encode())) <= small else self._inner.count_tokens(text) for text in texts]
        ended = threading.Event()
        request = self._ask(texts, sizes, ended.set)
        ended.wait()
        return request.answer

    async def embed_counted(self, texts: Sequence[str], tokens: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Do the same without a thread that waits; ``tokens``: of each text, of which there is at least one.

        Who is canceled leaves the line.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

        request = self._ask(texts, tokens, end)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            with self._changed:
                self._line.drop(request)
                self._waiting.discard(request)
            raise
        return request.answer

    def _ask(self, texts: Sequence[str], sizes: Sequence[int], on_end: Callable[[], object]) -> Request:
        request = Request(texts, sizes, party=_party.get(), pulse=current_pulse(), on_end=on_end)
        with self._changed:
            if not self._started:
                self._started = True
                threading.Thread(target=self._work, name="model", daemon=True).start()
            self._line.add(request)
            self._waiting.add(request)
            self._changed.notify()
        return request

    def embed_query(self, text: str) -> "npt.NDArray[np.float32]":
        """Return the vector of a question."""
        with self._computing:
            return self._inner.embed_query(text)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line.texts)
                deadline = time.monotonic() + self._wait_seconds
                while self._line.texts < self._most and len(self._waiting) < self._may_ask():
                    if (left := deadline - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
                call = self._line.take(self._most, self._inner.batch_tokens)
            self._call(call)
            for request in tuple(self._waiting):  # the model goes on: whose turn has not come yet does not hang
                if request.pulse is not None:
                    request.pulse.beat()

    def _call(self, call: dict[Request, list[int]]) -> None:
        try:
            vectors = self._embedded([request.texts[index] for request, indices in call.items() for index in indices])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the texts come from
            if len(call) == 1:
                self._fail(next(iter(call)), error)
                return
            for request, indices in call.items():
                self._call({request: indices})
            return
        start = 0
        for request, indices in call.items():
            self._deliver(request, indices, vectors[start : start + len(indices)])
            start += len(indices)

    def _embedded(self, texts: list[str]) -> "npt.NDArray[np.float32]":
        self.calls += 1
        self.texts += len(texts)
        with self._computing:
            return self._inner.embed(texts)

    def _deliver(self, request: Request, indices: list[int], vectors: "npt.NDArray[np.float32]") -> None:
        if request.error is not None:
            return
        if len(indices) == len(request.texts):
            request.vectors = vectors.copy()  # a view would keep the vectors of all others
        else:
            if request.vectors is None:
                import numpy as np

                request.vectors = np.empty((len(request.texts), self.dimension), dtype=np.float32)
            request.vectors[indices] = vectors
        request.left -= len(indices)
        if not request.left:
            self._end(request)

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        with self._changed:
            self._line.drop(request)
        self._end(request)

    def _end(self, request: Request) -> None:
        with self._changed:
            self._waiting.discard(request)
        request.on_end()


async def vectors_of(embedder: Embedder, texts: Sequence[str], tokens: Sequence[int]) -> "npt.NDArray[np.float32]":
    """Return one vector a text, in order; ``tokens``: of each text. A shared model needs no thread for each that waits."""
    if isinstance(embedder, SharedModel):
        return await embedder.embed_counted(texts, tokens)
    return await asyncio.to_thread(embedder.embed, texts)


class SharedModels:
    """The models of a worker, each made once. Stands where :func:`job_runner.embed.make_embedder` does."""

    def __init__(
        self,
        make: Callable[..., Embedder] = make_embedder,
        *,
        batch_size: int,
        may_ask: Callable[[], int] = lambda: 2**31,
    ) -> None:
        """As those of :class:`SharedModel`."""
        self._make = make
        self._batch_size = batch_size
        self._may_ask = may_ask
        self._made: dict[str, SharedModel] = {}
        self._making = threading.Lock()

    def __call__(self, name: str, *, threads: int = 1) -> SharedModel:
        """Return a model, as ``make_embedder`` does. It blocks where the model was not asked for before."""
        with self._making:
            if name not in self._made:
                inner = self._make(name, threads=threads)
                self._made[name] = SharedModel(inner, batch_size=self._batch_size, may_ask=self._may_ask)
            return self._made[name]

    def known(self, name: str) -> SharedModel | None:
        """Return a model that was made before, without blocking."""
        return self._made.get(name)

    @property
    def totals(self) -> tuple[int, int, int]:
        """Calls, texts in them, and texts that they could have had."""
        made = list(self._made.values())
        return sum(one.calls for one in made), sum(one.texts for one in made), sum(one.room for one in made)

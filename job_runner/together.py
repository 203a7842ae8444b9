"""Calls of several attempts of a worker that are made as one: what comes while a call is under way waits for the next.

So a transaction a task becomes a transaction for all that end about the same time, and a task that is alone waits for
nobody.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

T = TypeVar("T")


class Together(Generic[T]):
    """Makes calls for several who ask, one call at a time."""

    def __init__(
        self, call: Callable[[Sequence[T]], Awaitable[Sequence[Exception | None]]], *, weight: Callable[[T], int], most: int
    ) -> None:
        """``call`` returns what each has failed with; what it raises, all have failed with. What is asked for in one call
        weighs ``most`` in all; what is heavier has a call of its own."""
        self._call = call
        self._weight = weight
        self._most = most
        self._waiting: deque[tuple[T, asyncio.Future[None]]] = deque()
        self._calling: asyncio.Task[None] | None = None

    async def __call__(self, asked: T) -> None:
        """Have it done, alone or with others. Raises what it has failed with.

        Who is canceled before its call has begun is left out of it; later it is done all the same.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, done))
        if self._calling is None or self._calling.done():
            # In no attempt's context: it goes on for whoever asks meanwhile.
            self._calling = asyncio.create_task(self._make_calls(), name="together", context=Context())
        await done

    async def _make_calls(self) -> None:
        while self._waiting:
            part = self._next()
            if not part:
                continue
            failures: Sequence[Exception | None]
            try:
                failures = await self._call([asked for asked, _ in part])
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it was asked for
                failures = [error] * len(part)
            for (_, done), failure in zip(part, failures, strict=True):
                if not done.done():
                    done.set_result(None) if failure is None else done.set_exception(failure)

    def _next(self) -> list[tuple[T, "asyncio.Future[None]"]]:
        part: list[tuple[T, asyncio.Future[None]]] = []
        weight = 0
        while self._waiting:
            asked, done = self._waiting[0]
            weight += self._weight(asked)
            if part and weight > self._most:
                break
            self._waiting.popleft()
            if not done.done():
                part.append((asked, done))
        return part

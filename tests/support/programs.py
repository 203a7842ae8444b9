"""Carries out the client's programs without I/O: a test says what each effect comes to, and time passes in pauses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service_client.programs import Call, Effect, Emit, Open, Pause, Program, Read, Request

T = TypeVar("T")


@dataclass
class Script:
    """What happens, in its order: an outcome for each request, opening and read; an exception is raised."""

    outcomes: list[Any]
    now: float = 1000.0
    seconds: float = 0.0
    """That each effect takes."""
    requests: list[Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    emitted: list[Any] = field(default_factory=list)
    until: Callable[[], bool] = lambda: False
    """When to leave a program that does not end by itself."""

    def clock(self) -> float:
        return self.now

    def run(self, program: Program[T]) -> T | None:
        """Return the value of a program; None when it was left."""
        outcome: Any = None
        error: Exception | None = None
        while True:
            try:
                effect = program.send(outcome) if error is None else program.throw(error)
            except StopIteration as end:
                value: T = end.value
                return value
            outcome, error = None, None
            try:
                outcome = self._perform(effect)
            except Exception as caught:  # noqa: BLE001  # as the drivers do
                error = caught
            if self.until():
                program.close()
                return None

    def _perform(self, effect: Effect) -> Any:
        match effect:
            case Pause(seconds):
                self.pauses.append(seconds)
                self.now += seconds
                return None
            case Emit(value):
                self.emitted.append(value)
                return None
            case Call(function):
                return function()
            case Request():
                self.requests.append(effect)
            case Open(request):
                self.requests.append(request)
            case Read():
                pass
        self.now += self.seconds
        assert self.outcomes, f"nothing is said about {effect}"
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

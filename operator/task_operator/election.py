"""Which of several operators acts: the one that holds a Lease (``coordination.k8s.io/v1``) in the API server.

**No clock of another machine is believed.** A candidate takes a Lease from its holder when the record has not *changed* for
``duration`` by the candidate's own clock, whatever times stand in it: they are written for people. The holder counts from
before it sent the renewal that was answered, and stops to write ``deadline`` after that, which is sooner; so it has stopped
before anybody who saw that very renewal may begin. The clock is that of the boot where there is one: it goes on while the
machine is suspended, and nobody sets it. Wall clocks that jump change nothing.

**No two take it.** A Lease is created (409 for the second) or patched with the resourceVersion that was read (409, too). An
answer that was lost leaves the holder in doubt: it looks, finds its own name, and goes on; or another's, and has lost.

**A Lease that vanishes** tells nothing of who had it, who may still act. Whoever makes it anew holds it, and acts when
``duration`` is over; its holder itself goes on. Only who has never seen one acts at once: that is a new installation.

**What a late leader can still do** (one that was paused right before it sent something, and wakes when another one leads).
:meth:`Election.leads` is asked right before each write, by the clock, and not from what a timer has told; so of a paused
process what is already past that question is left, one request of each of its workers:

==================================  ====================================================================================
write                               what makes it safe
==================================  ====================================================================================
status of a task                    carries the resourceVersion it was decided upon, or tests generation and the status
                                    before: refused (409)
``status.callback``                 carries the resourceVersion of a task that told nothing newer when it was read
Job of an attempt                   its name follows from task and attempt, so of the current attempt it is the one that
                                    is wanted; of an older one, of another stay in the queue or of a finished or absent task
                                    it is deleted by the leader within seconds, and its runner fails at the fence
deletion of a Job                   by uid, and for what never becomes untrue: its task has ended or gone, a later attempt
                                    has a Job, the stay in the queue it was made for is over
deletion of a task                  by uid and resourceVersion
Kubernetes Event                    of a status write that has happened; its name follows from it, so it is told once
rows of ``tasks``, events, attempts one writer at a time, under an advisory lock. Whoever has it asks again whether it leads,
                                    and PostgreSQL ends a transaction that rests for longer than ``duration - deadline``: a
                                    writer that was paused with the lock has lost it before the next one leads
fences, releases, batches           as the row before; and a fence is for what never becomes untrue: the task was to be
                                    canceled, has ended, or is gone
callbacks                           each is leased in PostgreSQL, and settled under that lease; it comes twice with one id
life-cycle events to brokers        an advisory lock of a session that PostgreSQL ends when it is silent for 20 s; the events
                                    in hand may come twice, with the same numbers
sweep Jobs                          their name follows from the end of the sweep before; sweeping twice is harmless
archive                             deletes by age, and passes over rows that another one deletes
==================================  ====================================================================================

No I/O in :func:`decide` and :class:`Candidate`: time and answers are arguments. :class:`Election` is the loop around them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, Protocol

import structlog

from task_operator.metrics import Metrics
from task_platform.kubernetes import (
    LEASES_API,
    Access,
    ClusterError,
    Conflict,
    Forbidden,
    Kubernetes,
    Manifest,
    NotFound,
    path_of,
)

_log = structlog.get_logger(__name__)

_MOST: Final = 300.0  # seconds that a record may ask to be waited for: a number by hand is not to keep everybody out
_STOP: Final = 5.0  # seconds for what a leader did to end
_RELEASE: Final = 2.0  # seconds
_BEGINNING: Final = datetime.fromtimestamp(0, UTC)


def boot_clock() -> float:
    """Return seconds of a clock that nobody sets and that goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. A leader that is killed is replaced within ``duration + look`` and a request or two."""

    duration: float = 10.0
    """A record that has not changed for so long is another's to take."""
    deadline: float = 7.0
    """A leader acts for so long after it sent the last renewal that was answered."""
    renew: float = 2.0
    """From one renewal to the next."""
    look: float = 1.0
    """How often others look: a Lease that was given back is taken within this."""

    @property
    def patience(self) -> float:
        """How long a request may take: there is time for two before a leader has to stop."""
        return (self.deadline - self.renew) / 2

    @property
    def margin(self) -> float:
        """How long a leader has stopped before the next one may begin."""
        return self.duration - self.deadline


@dataclass(frozen=True, slots=True)
class Lease:
    """What stands in a Lease."""

    holder: str = ""
    """Empty: nobody."""
    renewed: str = ""
    """``renewTime``: never read as a time, only compared with what it was."""
    acquired: str = ""
    transitions: int = 0
    duration: float = 0.0
    """Seconds that the holder asks to be waited for."""
    version: str = field(default="", compare=False)
    """The resourceVersion; it changes with labels too, which are no sign of life."""

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Lease":
        """Read a Lease; what is missing or odd in it is as good as nothing."""
        spec: Mapping[str, Any] = manifest.get("spec") or {}
        duration, transitions = spec.get("leaseDurationSeconds"), spec.get("leaseTransitions")
        return cls(
            holder=str(spec.get("holderIdentity") or ""),
            renewed=str(spec.get("renewTime") or ""),
            acquired=str(spec.get("acquireTime") or ""),
            transitions=transitions if isinstance(transitions, int) else 0,
            duration=float(duration) if isinstance(duration, int) else 0.0,
            version=str(manifest["metadata"]["resourceVersion"]),
        )

    def spec(self) -> Manifest:
        """Return the ``spec``; without holder the fields that belong to one are removed."""
        return {
            "holderIdentity": self.holder or None,
            "renewTime": self.renewed or None,
            "acquireTime": self.acquired or None,
            "leaseTransitions": self.transitions,
            "leaseDurationSeconds": max(1, round(self.duration)),
        }


class Act(StrEnum):
    """What a candidate does next."""

    LOOK = "look"
    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"


@dataclass(frozen=True, slots=True)
class View:
    """What a candidate knows; times are of its own clock."""

    certain: bool = False
    """Whether ``lease`` is what was there when it was last asked, and nothing has become of that in the meantime by its own
    doing: after a request of which the answer was lost or bad it is not."""
    lease: Lease | None = None
    since: float = 0.0
    """When it was first seen as it is."""
    looked_at: float = 0.0
    """When it was last seen."""
    met: bool = False
    """Whether there ever was a Lease to be seen."""
    renewed_at: float | None = None
    """When the last renewal of its own was sent that was answered; None: it does not hold the Lease."""
    vanished: bool = False
    """Whether the Lease was gone when it last looked, and another one may still act that had it."""
    acts_from: float = float("-inf")
    """Before that it holds the Lease, and does not act."""


def decide(view: View, *, me: str, now: float, timing: Timing) -> tuple[Act, float]:
    """Return what to do, and when; a moment not after ``now`` is at once."""
    if not view.certain:
        return Act.LOOK, now
    lease = view.lease
    if lease is None:
        # Who had it notices at its next renewal, and goes on.
        return _patiently(Act.CREATE, view, 2 * timing.renew, timing) if view.vanished else (Act.CREATE, now)
    if lease.holder == me:
        # Its own, and by the version nobody has had it since: also after the deadline, or when an answer was lost.
        return (Act.TAKE, now) if view.renewed_at is None else (Act.RENEW, view.renewed_at + timing.renew)
    if not lease.holder:
        return Act.TAKE, now
    return _patiently(Act.TAKE, view, max(timing.duration, min(lease.duration, _MOST)), timing)


def _patiently(act: Act, view: View, wait: float, timing: Timing) -> tuple[Act, float]:
    at = view.since + wait
    return (act, at) if view.looked_at + timing.look >= at else (Act.LOOK, view.looked_at + timing.look)


class Candidate:
    """What one operator knows of the Lease, and whether it leads. No I/O."""

    def __init__(self, me: str, timing: Timing) -> None:
        self.me = me
        self._timing = timing
        self._view = View()
        self._not_before = float("-inf")
        self._stamp = _BEGINNING
        self.term = 0
        """How often it has become the leader: what one term has learned is not to be believed in the next."""

    @property
    def view(self) -> View:
        """What it knows."""
        return self._view

    def leads(self, now: float) -> bool:
        """Whether it may write at this moment."""
        return self._view.acts_from <= now < self.ends

    @property
    def ends(self) -> float:
        """Until when it holds the Lease, unless it renews; in the past (-inf) when it does not."""
        renewed_at = self._view.renewed_at
        return float("-inf") if renewed_at is None else renewed_at + self._timing.deadline

    def next(self, now: float) -> tuple[Act, float]:
        """Return what to do, and when."""
        act, at = decide(self._view, me=self.me, now=now, timing=self._timing)
        return act, max(at, self._not_before)

    def wish(self, act: Act, *, wall: datetime) -> Lease:
        """Return the record to write; ``wall``: the time for people.

        Times in it only go up, by a microsecond where the wall clock stands or was set back: so no record is ever the same
        as one that somebody has seen before.
        """
        lease = self._view.lease or Lease()
        stamp = self._stamp = max(wall, _after(lease.renewed), _after(self._stamp))
        renewed = f"{stamp:%Y-%m-%dT%H:%M:%S.%fZ}"
        return replace(
            lease,
            holder=self.me,
            renewed=renewed,
            acquired=lease.acquired if act is Act.RENEW else renewed,
            transitions=lease.transitions + (act is Act.TAKE and lease.holder != self.me),
            duration=self._timing.duration,
        )

    def saw(self, lease: Lease | None, *, now: float) -> None:
        """Take in what is there."""
        view = self._view
        others = lease is not None and lease.holder != self.me
        holds = now < self.ends and not others
        self._view = View(
            certain=True,
            lease=lease,
            since=view.since if view.lease == lease else now,
            looked_at=now,
            met=view.met or lease is not None,
            renewed_at=view.renewed_at if holds else None,
            vanished=not others and (view.vanished or (lease is None and view.met and not holds)),
            acts_from=view.acts_from if holds else float("-inf"),
        )
        self._not_before = float("-inf")

    def wrote(self, lease: Lease, *, started: float, now: float) -> None:
        """Take in that a write was answered; ``started``: when it was sent."""
        view = self._view
        if view.renewed_at is None:
            self.term += 1
        acts_from = now + self._timing.duration if view.vanished else view.acts_from
        self._view = View(
            certain=True, lease=lease, since=now, looked_at=now, met=True, renewed_at=started, acts_from=acts_from
        )

    def failed(self, *, at_once: bool, started: float, now: float) -> None:
        """Take in that something went wrong: it may have happened, or not. ``at_once``: a look tells what."""
        if now >= self.ends:
            self._view = replace(self._view, renewed_at=None, acts_from=float("-inf"))
        self._view = replace(self._view, certain=False)
        self._not_before = now if at_once else started + self._timing.look

    def resigned(self) -> None:
        """Take in that it gives the Lease back, whatever became of that."""
        self._view = replace(self._view, certain=False, renewed_at=None)


def _after(time: str | datetime) -> datetime:
    """Return the least time after one; of a text that is none, the beginning."""
    try:
        at = time if isinstance(time, datetime) else datetime.fromisoformat(time)
        return at.astimezone(UTC) + timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return _BEGINNING


# -------------------------------------------------------------------------------------------------------------- the loop


class Store(Protocol):
    """Where the Lease is. Methods raise :class:`task_platform.kubernetes.ClusterError`."""

    async def get(self) -> Lease | None: ...  # noqa: D102 - see LeaseStore
    async def create(self, lease: Lease) -> Lease: ...  # noqa: D102
    async def replace(self, lease: Lease) -> Lease: ...  # noqa: D102


class LeaseStore(Kubernetes):
    """One Lease in the API server, over connections of its own: no other request keeps a renewal waiting."""

    def __init__(self, access: Access, *, user_agent: str, namespace: str, name: str, labels: Mapping[str, str]) -> None:
        super().__init__(access, user_agent=user_agent)
        self._namespace = namespace
        self._name = name
        self._labels = dict(labels)

    def _path(self, name: str | None = None) -> str:
        return path_of(LEASES_API, self._namespace, "leases", name)

    async def get(self) -> Lease | None:
        """Return the Lease; None: there is none."""
        try:
            return Lease.from_manifest(await self.ask("GET", self._path(self._name)))
        except NotFound:
            return None

    async def create(self, lease: Lease) -> Lease:
        """Make the Lease; :class:`Conflict` if there is one."""
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace, "labels": self._labels},
            "spec": lease.spec(),
        }
        return Lease.from_manifest(await self.ask("POST", self._path(), body=body))

    async def replace(self, lease: Lease) -> Lease:
        """Write a record over the one of that version; :class:`Conflict` if it is another by now. Labels stay."""
        body = {"metadata": {"resourceVersion": lease.version}, "spec": lease.spec()}
        answer = await self.ask("PATCH", self._path(self._name), body=body, content_type="application/merge-patch+json")
        return Lease.from_manifest(answer)


class Election:
    """Stands for election until cancelled, and does a leader's work while it leads."""

    def __init__(
        self,
        store: Store,
        *,
        me: str,
        timing: Timing,
        metrics: Metrics,
        clock: Callable[[], float] = boot_clock,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``me``: a name that no other process has, ever."""
        self._store = store
        self._timing = timing
        self._metrics = metrics
        self._clock = clock
        self._wall = wall
        self._candidate = Candidate(me, timing)
        metrics.watch_lease(leads=self.leads, age=self._age)

    def leads(self) -> bool:
        """Whether this process may write at this moment. Cheap: to be asked right before each write."""
        return self._candidate.leads(self._clock())

    def _age(self) -> float:
        view = self._candidate.view
        return self._clock() - view.since if view.met else 0.0

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Do ``lead`` while it leads: begun anew with each term, cancelled when one ends. Raises what ``lead`` raises, and
        :class:`Forbidden` where the Lease may not be used.

        When it is cancelled, ``lead`` ends first; the Lease is kept for what is left to do: see :meth:`release`.
        """
        work: asyncio.Future[None] | None = None
        term = 0
        try:
            while True:
                if work is not None and work.done():
                    work.result()
                    raise RuntimeError("the work of a leader has ended by itself")
                if work is not None and not (self.leads() and term == self._candidate.term):
                    _log.warning("this operator does not lead any more", holder=self._holder())
                    await _ended(work)
                    work = None
                if work is None and self.leads():
                    term = self._candidate.term
                    self._metrics.terms.inc()
                    _log.info("this operator leads", identity=self._candidate.me)
                    work = asyncio.ensure_future(lead())
                act, at = self._candidate.next(self._clock())
                if (wait := at - self._clock()) <= 0:
                    await self._do(act)
                elif work is None:
                    await asyncio.sleep(wait)
                else:
                    await asyncio.wait([work], timeout=max(0.0, min(wait, self._candidate.ends - self._clock())))
        finally:
            if work is not None:
                await _ended(work)

    def _holder(self) -> str | None:
        lease = self._candidate.view.lease
        return None if lease is None else lease.holder

    async def _do(self, act: Act) -> None:
        started = self._clock()
        before = self._holder()
        patience = self._timing.patience
        if self._candidate.ends > started:
            patience = min(patience, self._candidate.ends - started)
        try:
            async with asyncio.timeout(patience):
                if act is Act.LOOK:
                    self._candidate.saw(await self._store.get(), now=self._clock())
                else:
                    wish = self._candidate.wish(act, wall=self._wall())
                    written = await (self._store.create if act is Act.CREATE else self._store.replace)(wish)
                    self._candidate.wrote(written, started=started, now=self._clock())
        except Forbidden:
            raise
        except (Conflict, NotFound):
            self._candidate.failed(at_once=True, started=started, now=self._clock())
        except (ClusterError, TimeoutError) as error:
            _log.warning("cannot use the Lease; trying again", act=str(act), error=str(error) or "no answer in time")
            self._candidate.failed(at_once=False, started=started, now=self._clock())
        if self._holder() != before and not self.leads():
            _log.info("this operator stands by", holder=self._holder() or "nobody")

    async def release(self) -> None:
        """Give the Lease back, so that the next one need not wait; to be called when nothing is written any more."""
        lease = self._candidate.view.lease
        if lease is None or not self.leads():
            return
        try:
            async with asyncio.timeout(_RELEASE):
                await self._store.replace(replace(lease, holder="", renewed="", acquired=""))
        except (ClusterError, TimeoutError) as error:
            _log.warning("cannot give the Lease back; the next leader waits until it has run out", error=str(error))
        else:
            _log.info("the Lease is given back")
        self._candidate.resigned()


async def _ended(work: asyncio.Future[None]) -> None:
    """Cancel, and wait until it has ended; one that does not takes the process with it."""
    work.cancel()
    done, _ = await asyncio.wait([work], timeout=_STOP)
    if not done:
        raise RuntimeError(f"the work of a leader did not end within {_STOP:g} s")
    if not work.cancelled() and (error := work.exception()) is not None:
        _log.error("the work of a leader ended badly", error=repr(error))


class Alone:
    """Stands for an election where there is one operator only, as its settings say."""

    def leads(self) -> bool:
        """Return True."""
        return True

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Lead until cancelled."""
        await lead()

    async def release(self) -> None:
        """Keep leading: there is nobody else."""

"""The times of a cron schedule in a time zone. Pure functions; all times that go in and out are aware, those out in UTC.

What the fields mean, and what happens when clocks are changed, is what Debian's cron does (cronsim): a schedule of fixed
times (neither minute nor hour begins with ``*``) whose time is skipped in spring comes right after the gap, and one whose
time there is twice in autumn comes the first time alone; others follow the time that passes.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

_MACROS: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_SPANS: Final = tuple(timedelta(hours=hours) for hours in (1, 24, 24 * 32, 24 * 400, 24 * 366 * 10, 24 * 366 * 51))
"""How far back the latest time is looked for: a schedule of every minute has 60 times in the first of them."""


class BadSchedule(ValueError):
    """A schedule that has no times; ``reason`` is that of a condition."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Cron:
    """A schedule in a time zone."""

    def __init__(self, schedule: str, time_zone: str) -> None:
        """Raises :class:`BadSchedule` with the field and what is wrong with it."""
        try:
            # UTC needs no file, and is a third of the work.
            self._zone = UTC if time_zone == "UTC" else ZoneInfo("" if _of_machine(time_zone) else time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:  # no such file, a file that is none, a folder
            message = f"spec.timeZone: there is no time zone {time_zone!r}; use an IANA name such as Asia/Shanghai"
            raise BadSchedule("UnknownTimeZone", message) from error
        self._fields = _MACROS.get(schedule, schedule)
        wrong = f"spec.schedule: cannot read {schedule!r}"
        if len(self._fields.split()) != 5:  # cronsim takes a sixth, for seconds
            raise BadSchedule("InvalidSchedule", f"{wrong}: it has five fields")
        try:
            CronSim(self._fields, datetime(2000, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise BadSchedule("InvalidSchedule", f"{wrong}: {error}") from error

    def times(self, after: datetime) -> Iterator[datetime]:
        """Go over the times that are later than ``after``, each once and in their order, for the next 50 years."""
        latest = after
        for local in CronSim(self._fields, after.astimezone(self._zone)):
            found = local.astimezone(UTC)
            if found > latest:  # in the hour that there is twice cronsim begins again with the first
                latest = found
                yield found

    def next(self, after: datetime) -> datetime | None:
        """Return the first time later than ``after``; None if there is none in 50 years, as of 30 February."""
        return next(self.times(after), None)

    def is_time(self, at: datetime) -> bool:
        """Whether ``at`` is one of the times."""
        return self.next(at - timedelta(seconds=1)) == at

    def latest(self, until: datetime) -> datetime | None:
        """Return the last time that is not later than ``until``, in little work however many there are."""
        for span in _SPANS:
            found = None
            for at in self.times(until - span):
                if at > until:
                    break
                found = at
            if found is not None:
                return found
        return None


def _of_machine(time_zone: str) -> bool:
    """Whether it is the zone of the machine, or one of clocks that count leap seconds, as those of Kubernetes do not."""
    return time_zone == "localtime" or time_zone.startswith("right/")

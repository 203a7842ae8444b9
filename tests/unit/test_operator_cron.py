"""Times of cron schedules in time zones: what they are, also where clocks are changed, and which schedules have none."""

import time
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_operator.cron import BadSchedule, Cron

# Changes of whole hours: at one of half an hour (Lord Howe) cronsim leaves out times of `*/n`, in one hour a year.
HOURLY = ("UTC", "Asia/Shanghai", "Asia/Kolkata", "Europe/Berlin", "America/New_York", "Africa/Cairo", "America/Santiago")
ZONES = (*HOURLY, "Australia/Lord_Howe", "Antarctica/Troll", "Asia/Kathmandu", "Pacific/Chatham", "Africa/Casablanca")
MOMENTS = st.integers(0, 86_400 * 4000).map(lambda second: datetime(2019, 1, 1, tzinfo=UTC) + timedelta(seconds=second))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def local(cron: str, zone: str, after: str, count: int) -> list[str]:
    return [f"{one.astimezone(ZoneInfo(zone)):%m-%d %H:%M %z}" for one in islice(Cron(cron, zone).times(at(after)), count)]


@pytest.mark.parametrize(
    ("cron", "zone", "after", "times"),
    [
        ("30 2 * * *", "Asia/Shanghai", "2026-11-28T00:00Z", ["11-29 02:30 +0800", "11-30 02:30 +0800"]),
        ("0 9 * * mon-fri", "UTC", "2026-11-27T09:00Z", ["11-30 09:00 +0000", "12-01 09:00 +0000"]),
        ("0 0 13 * 5", "UTC", "2026-11-10T00:00Z", ["11-13 00:00 +0000", "11-20 00:00 +0000"]),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00Z", ["02-29 00:00 +0000"]),
        ("@monthly", "UTC", "2026-11-28T00:00Z", ["12-01 00:00 +0000"]),
        ("*/20 * * * *", "Asia/Kathmandu", "2026-11-28T00:00Z", ["11-28 06:00 +0545", "11-28 06:20 +0545"]),
        # Clocks go from 2:00 to 3:00 on 29 March. What was skipped comes at once, and once.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-29 03:00 +0200", "03-30 02:30 +0200"]),
        ("0,30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-29 03:00 +0200", "03-30 02:00 +0200"]),
        ("*/30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-30 02:00 +0200"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:30Z", ["03-29 03:00 +0200", "03-29 03:30 +0200"]),
        ("0 0 * * *", "Africa/Cairo", "2026-04-23T12:00Z", ["04-24 01:00 +0300", "04-25 00:00 +0300"]),
        # And from 3:00 to 2:00 on 25 October. A fixed time comes the first time alone.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00Z", ["10-25 02:30 +0200", "10-26 02:30 +0100"]),
        ("50 2 * * *", "Europe/Berlin", "2026-10-25T01:45Z", ["10-26 02:50 +0100"]),  # from within the second 2:45
        ("30 * * * *", "Europe/Berlin", "2026-10-25T00:00Z", ["10-25 02:30 +0200", "10-25 02:30 +0100"]),
    ],
)
def test_times(cron: str, zone: str, after: str, times: list[str]) -> None:
    assert local(cron, zone, after, len(times)) == times


@pytest.mark.parametrize(
    ("cron", "zone", "reason", "said"),
    [
        ("61 * * * *", "UTC", "InvalidSchedule", "spec.schedule: cannot read '61 * * * *': Bad minute"),
        ("* * * *", "UTC", "InvalidSchedule", "five fields"),
        ("0 * * * * *", "UTC", "InvalidSchedule", "five fields"),
        ("@every 5m", "UTC", "InvalidSchedule", "five fields"),
        ("0 0 30 2 *", "UTC", "InvalidSchedule", "Bad day-of-month"),
        ("0 0 * * *", "Mars/Base", "UnknownTimeZone", "spec.timeZone: there is no time zone 'Mars/Base'"),
        ("0 0 * * *", "America", "UnknownTimeZone", "spec.timeZone"),
        ("0 0 * * *", "../../etc/passwd", "UnknownTimeZone", "spec.timeZone"),
        ("0 0 * * *", "localtime", "UnknownTimeZone", "spec.timeZone"),
        ("0 0 * * *", "Local", "UnknownTimeZone", "spec.timeZone"),
    ],
)
def test_what_has_no_times_says_why(cron: str, zone: str, reason: str, said: str) -> None:
    with pytest.raises(BadSchedule, match=r"spec\.") as caught:
        Cron(cron, zone)
    assert caught.value.reason == reason
    assert said in str(caught.value)


@settings(max_examples=40)
@given(
    zone=st.sampled_from(ZONES),
    minute=st.integers(0, 59),
    hour=st.integers(0, 23),
    year=st.integers(2019, 2035),
)
def test_a_fixed_time_comes_once_a_day_in_every_zone(zone: str, minute: int, hour: int, year: int) -> None:
    there = ZoneInfo(zone)
    begin = datetime(year, 1, 1, tzinfo=there).astimezone(UTC)
    end = datetime(year + 1, 1, 1, tzinfo=there).astimezone(UTC)
    cron = Cron(f"{minute} {hour} * * *", zone)
    found = list(takewhile(lambda one: one < end, cron.times(begin - timedelta(seconds=1))))
    days = [one.astimezone(there).date() for one in found]
    assert days == [date(year, 1, 1) + timedelta(days=number) for number in range(len(days))]
    assert len(days) in {365, 366}
    for one in found:
        wall = one.astimezone(there)
        if (wall.hour, wall.minute) != (hour, minute):  # the first moment after a gap that held the time
            before = (one - timedelta(seconds=1)).astimezone(there)
            wanted = datetime.combine(wall, clock(hour, minute))
            assert before.replace(tzinfo=None) < wanted < wall.replace(tzinfo=None)
            assert before.utcoffset() != wall.utcoffset()


@settings(max_examples=40)
@given(
    zone=st.sampled_from(HOURLY),
    cron=st.sampled_from(["* * * * *", "*/7 * * * *", "30 * * * *", "*/15 1-3 * * *", "* 2 * * sun", "5 * 25-31 3,10 *"]),
    begin=MOMENTS
    | st.sampled_from([at("2026-03-28T23:00Z"), at("2026-10-24T23:00Z"), at("2026-03-08T05:00Z"), at("2026-11-01T04:00Z")]),
)
def test_what_follows_the_hours_comes_at_every_minute_of_its_form(zone: str, cron: str, begin: datetime) -> None:
    begin = begin.replace(second=0, microsecond=0)
    minutes = [begin + timedelta(minutes=number) for number in range(1, 8 * 60)]
    never_skipped = Cron(cron, "UTC")  # says of a wall time whether it has the form
    expected = [one for one in minutes if never_skipped.is_time(one.astimezone(ZoneInfo(zone)).replace(tzinfo=UTC))]
    assert list(takewhile(lambda one: one <= minutes[-1], Cron(cron, zone).times(begin))) == expected


@settings(max_examples=40)
@given(
    zone=st.sampled_from(ZONES),
    cron=st.sampled_from(["30 2 * * *", "0,30 1,2 * * *", "0 0 1 * *", "@hourly", "15 3 * * 0", "59 23 * * *"]),
    begin=MOMENTS,
    later=st.integers(0, 86_400 * 40),
)
def test_where_one_begins_makes_no_difference(zone: str, cron: str, begin: datetime, later: int) -> None:
    schedule, middle, end = Cron(cron, zone), begin + timedelta(seconds=later), begin + timedelta(days=60)
    whole = list(takewhile(lambda one: one <= end, schedule.times(begin)))
    assert whole == sorted(set(whole))
    assert [one for one in whole if one > middle] == list(takewhile(lambda one: one <= end, schedule.times(middle)))
    assert all(schedule.is_time(one) for one in whole)
    so_far = [one for one in whole if one <= middle]
    if so_far:
        assert schedule.latest(middle) == so_far[-1]


@pytest.mark.parametrize("cron", ["* * * * *", "@yearly", "0 0 29 2 *", "0 0 29 2 1#5"])
def test_the_latest_time_takes_no_longer_for_a_schedule_of_every_minute(cron: str) -> None:
    schedule, begin = Cron(cron, "Asia/Shanghai"), time.process_time()
    found = schedule.latest(at("2026-11-28T03:00:30Z"))
    assert found is not None
    assert schedule.next(found) is not None
    assert time.process_time() - begin < 1

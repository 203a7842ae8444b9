"""Processes that survive their starter, and are never mistaken for others."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from devstack import process
from devstack.process import Process
from devstack.progress import DevstackError

SELF = Path("/proc/self/stat")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEVSTACK_STATE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param("7 (sh) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0", Process(7, 4711), id="sleeping"),
        pytest.param("7 (a) b) (c) R 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0", Process(7, 4711), id="odd name"),
        pytest.param("7 (sh) Z 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0", None, id="zombie"),
        pytest.param("7 (sh) Z 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 2 0 4711 0", Process(7, 4711), id="zombie with a thread"),
        pytest.param("7 (sh) X 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0", None, id="dead"),
        pytest.param("7 (sh) S 1 7", None, id="torn"),
        pytest.param("", None, id="empty"),
    ],
)
def test_stat_line_is_read(line: str, expected: Process | None) -> None:
    assert process.parse_stat(line) == expected


def write_record(state: Path, *, boot: str | None = None, stat: str | None = None) -> None:
    (state / "pid").mkdir(exist_ok=True)
    record = {"boot": boot or process.boot_id(), "stat": stat or SELF.read_text().strip(), "key": "k"}
    (state / "pid" / "it.json").write_text(json.dumps(record))


def with_other_start(stat: str) -> str:
    head, _, tail = stat.rpartition(")")
    fields = tail.split()
    fields[19] = str(int(fields[19]) + 1)
    return f"{head}) {' '.join(fields)}"


def test_recorded_process_is_found(state: Path) -> None:
    write_record(state)
    found = process.find("it")
    assert found is not None
    assert found.pid == os.getpid()


@pytest.mark.parametrize("what", ["recycled pid", "earlier boot", "torn record", "empty record", "no record"])
def test_stranger_is_never_taken_for_ours_nor_stopped(state: Path, what: str) -> None:
    if what == "recycled pid":
        write_record(state, stat=with_other_start(SELF.read_text().strip()))
    elif what == "earlier boot":
        write_record(state, boot="00000000-0000-0000-0000-000000000000")
    elif what != "no record":
        write_record(state)
        record = state / "pid" / "it.json"
        record.write_text(record.read_text()[:20] if what == "torn record" else "")
    assert not process.running("it")
    process.stop("it", kill=True)  # would end this very test run
    assert not process.running("it")


def test_start_runs_once_and_stop_ends_it() -> None:
    assert process.start("it", ["sleep", "60"])
    first = process.find("it")
    assert not process.start("it", ["sleep", "60"])
    assert process.find("it") == first
    assert first is not None
    process.stop("it")
    assert process.find("it") is None
    assert process.parse_stat(read_stat(first.pid)) != first


def read_stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("change", ["command", "environment"])
def test_changed_process_is_replaced(change: str) -> None:
    process.start("it", ["sleep", "60"], env={"A": "1"})
    first = process.find("it")
    process.start("it", ["sleep", "61" if change == "command" else "60"], env={"A": "1" if change == "command" else "2"})
    second = process.find("it")
    process.stop("it")
    assert first is not None
    assert second is not None
    assert first != second


def test_process_that_ignores_sigterm_is_killed_with_its_children() -> None:
    process.start("it", ["sh", "-c", "trap '' TERM; sleep 60 & echo $!; wait; sleep 60"])
    process.wait_until("the child", lambda: bool(process.log_path("it").read_text().strip()), seconds=10)
    child = int(process.log_path("it").read_text())
    process.stop("it", grace=0.2)
    assert not process.running("it")
    process.wait_until("the child's end", lambda: process.parse_stat(read_stat(child)) is None, seconds=10)


def test_process_outlives_the_one_that_started_it(state: Path) -> None:
    code = "from devstack import process; process.start('it', ['sleep', '60']); import os; os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert process.running("it")
    process.stop("it")


def test_log_has_output_and_the_run_before(state: Path) -> None:
    for word in ("one", "two"):
        process.start("it", ["sh", "-c", f"echo {word}; echo to-stderr >&2"])
        process.wait_until("the end", lambda: not process.running("it"), seconds=10)
    assert process.log_path("it").read_text() == "two\nto-stderr\n"
    assert (state / "log" / "it.log.old").read_text() == "one\nto-stderr\n"


def test_waiting_ends_with_the_last_log_lines_when_a_process_dies() -> None:
    process.start("it", ["sh", "-c", "echo no such luck; exit 3"])
    with pytest.raises(DevstackError, match=r"cannot get a thing: it has ended; .*\n.*no such luck"):
        process.wait_until("a thing", lambda: False, seconds=10, processes=["it"])


def test_command_that_does_not_exist_is_named() -> None:
    process.start("it", ["/nonexistent/server"])
    with pytest.raises(DevstackError, match="/nonexistent/server: not found"):
        process.wait_until("a thing", lambda: False, seconds=10, processes=["it"])


def test_failing_check_means_not_yet() -> None:
    answers = iter([ConnectionRefusedError("refused"), ValueError("half an answer"), None])

    def check() -> bool:
        answer = next(answers)
        if answer is not None:
            raise answer
        return True

    process.wait_until("a thing", check, seconds=10)


def test_waiting_in_vain_tells_the_last_failure() -> None:
    def check() -> bool:
        raise ConnectionRefusedError("refused")

    with pytest.raises(DevstackError, match=r"cannot get a thing within 0 s \(ConnectionRefusedError: refused\)"):
        process.wait_until("a thing", check, seconds=0.1)


def test_failed_command_is_one_error_with_its_output() -> None:
    with pytest.raises(DevstackError, match=r"cannot make it: sh ended with 3:\n  because"):
        process.run(["sh", "-c", "echo because >&2; exit 3"], doing="make it")


def test_many_starts_at_once(state: Path) -> None:
    names = [f"it-{number}" for number in range(8)]
    threads = [threading.Thread(target=process.start, args=(name, ["sleep", "60"])) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {process.find(name) for name in names}
    for name in names:
        process.stop(name, kill=True)
    assert len(found - {None}) == 8

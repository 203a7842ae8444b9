"""The cache of builds: keyed by content, built once, never half done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from devstack import cache

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEVSTACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "build"


def tree(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    one = tree(tmp_path / "one", {"a": "1", "b/c": "2"})
    two = tree(tmp_path / "two", {"b/c": "2", "a": "1", "__pycache__/a.pyc": "x"})
    assert cache.digest([one]) == cache.digest([two])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"a": "1", "b/c": "3"}, id="content"),
        pytest.param({"a": "1", "b/d": "2"}, id="name"),
        pytest.param({"a": "1", "b/c": "2", "e": ""}, id="one more"),
        pytest.param({"a": "1b/c2"}, id="run together"),
    ],
)
def test_digest_changes_with_a_folder(tmp_path: Path, other: dict[str, str]) -> None:
    one = tree(tmp_path / "one", {"a": "1", "b/c": "2"})
    assert cache.digest([one]) != cache.digest([tree(tmp_path / "two", other)])


def test_digest_keeps_inputs_apart() -> None:
    assert cache.digest([b"ab", b"c"]) != cache.digest([b"a", b"bc"])
    assert cache.digest([b"a", b"b"]) != cache.digest([b"b", b"a"])


def test_thing_is_built_once() -> None:
    calls: list[Path] = []

    def build(path: Path) -> None:
        calls.append(path)
        path.write_text("built")

    first, second = (cache.cached("thing", [b"1"], build) for _ in range(2))
    assert first == second
    assert first.read_text() == "built"
    assert len(calls) == 1
    assert cache.cached("thing", [b"2"], build) != first


def test_failed_build_leaves_nothing(folder: Path) -> None:
    def build(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        cache.cached("thing", [b"1"], build)
    assert [entry.name for entry in folder.iterdir()] == [".lock"]


def test_killed_build_is_built_anew_and_swept(folder: Path) -> None:
    code = (
        "import os, devstack.cache as c\n"
        "def build(path): path.mkdir(); (path / 'half').write_text(''); os.kill(os.getpid(), 9)\n"
        "c.cached('thing', [b'1'], build)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(entry.name.startswith(".thing-") for entry in folder.iterdir())

    built = cache.cached("thing", [b"1"], lambda path: path.mkdir())
    assert list(built.iterdir()) == []
    assert {entry.name for entry in folder.iterdir()} == {".lock", built.name}


def test_builders_at_once_build_once(tmp_path: Path) -> None:
    code = (
        "import devstack.cache as c, sys, time\n"
        "def build(path):\n"
        "    print('building', flush=True); time.sleep(0.3); path.write_text('x')\n"
        "c.cached('thing', [b'1'], build)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=30)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sorted(outputs) == ["", "", "building\n"]


def test_only_the_newest_are_kept(folder: Path) -> None:
    def build(path: Path) -> None:
        path.write_text("")

    other = cache.cached("thing-else", [b"0"], build)
    paths = [cache.cached("thing", [bytes([number])], build, keep=2) for number in range(2)]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1000 - age, 1000 - age))
    assert cache.cached("thing", [b"\x00"], build, keep=2) == paths[0]  # used again: the newest now
    third = cache.cached("thing", [b"\x02"], build, keep=2)
    assert {entry for entry in folder.iterdir() if entry.name != ".lock"} == {other, paths[0], third}

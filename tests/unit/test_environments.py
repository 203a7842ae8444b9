"""Environments of tests such as those of `make test-torch`: what is said when one cannot be made."""

from dataclasses import replace
from pathlib import Path

import pytest

from devstack import DevstackError
from tests.ocr.__main__ import OCR
from tests.support.environments import Environment, existing
from tests.torch.__main__ import TORCH


def test_a_disk_without_room_is_named_before_anything_is_downloaded(tmp_path: Path) -> None:
    TORCH.require_space(tmp_path, free=TORCH.needed)
    with pytest.raises(
        DevstackError,
        match=rf"cannot install PyTorch: it takes 7 GB in {tmp_path}, and 6\.9 GB are free; make room, or .*DEVSTACK_CACHE",
    ):
        TORCH.require_space(tmp_path, free=6_900_000_000)
    assert existing(tmp_path / "not" / "there") == tmp_path


@pytest.mark.parametrize("environment", [TORCH, OCR], ids=lambda it: it.name)
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing_half_done(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEVSTACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    chosen = replace(environment, needed=0)
    assert chosen.run_tests([]) == 1
    said = capfd.readouterr().err
    assert "127.0.0.1:9" in said
    assert said.splitlines()[-1].startswith(f"cannot install {chosen.what}: uv says why above; check the network")
    assert [path for path in (tmp_path / "cache" / "build").iterdir() if path.name != ".lock"] == []

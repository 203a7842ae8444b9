"""Recall@5 and MRR of the golden set: by meaning, by words, and fused, for each way to split and each embedding backend.

The parts are packaged, sentence-transformers and onnx; the last two need the environment of `make test-torch`. It prints the
table of docs/quality.md; tests/data/golden/baseline.json comes from its figures too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import devstack
from devstack.progress import DevstackError
from job_runner.quality import RANKINGS
from tests.bench.measurement import Measurement
from tests.bench.quality_run import BACKENDS
from tests.support.golden import questions
from tests.torch.__main__ import TORCH

_ByMode = dict[str, dict[str, dict[str, float]]]
"""Way to split → recall or mrr → ranking → value."""
ROOT = Path(__file__).resolve().parents[2]
HOW = "{count} questions over examples/documents, {backend}, processingMode {mode}; baseline: the better store alone"


def run(parts: list[str] | None = None) -> list[Measurement]:
    """Measure the backends that are named, or all."""
    if unknown := sorted({*(parts or [])} - {*BACKENDS}):
        raise DevstackError(f"there is no part {unknown[0]}; the parts are {', '.join(BACKENDS)}")
    urls = devstack.up(["stores"]).host_urls
    found = {backend: _found(backend, urls) for backend in parts or BACKENDS}
    print(table(found))
    return [one for backend, by_mode in found.items() for one in _measurements(backend, by_mode)]


def table(found: Mapping[str, _ByMode]) -> str:
    """Return the table of docs/quality.md: recall@5 / MRR."""
    rows = [
        [backend, f"`{mode}`", *(f"{by['recall'][ranking]:.3f} / {by['mrr'][ranking]:.3f}" for ranking in RANKINGS)]
        for backend, by_mode in found.items()
        for mode, by in by_mode.items()
    ]
    head = ["recall@5 / MRR", "processingMode", *RANKINGS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _found(backend: str, urls: dict[str, str]) -> _ByMode:
    python = sys.executable if backend == "packaged" else str(TORCH.python())
    command = [python, "-m", "tests.bench.quality_run", backend]
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "crds", "operator"))
    environment = os.environ | urls | {"PYTHONPATH": paths}
    ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0:
        raise DevstackError(f"{backend} ended with status {ended.returncode}; standard error says why")
    by_mode: _ByMode = json.loads(ended.stdout.splitlines()[-1])
    return by_mode


def _measurements(backend: str, by_mode: _ByMode) -> list[Measurement]:
    return [
        Measurement(
            metric=f"{backend}, {mode}: {ranking} {metric}",
            value=value,
            unit="share" if metric == "recall@5" else "mean",
            better="higher",
            # What the fusion is for: nobody has to know which store would have been the better one.
            baseline=max(values["dense"], values["keyword"]) if ranking == "fusion" else None,
            target=max(values["dense"], values["keyword"]) if (ranking, metric) == ("fusion", "recall@5") else None,
            how=HOW.format(count=len(questions()), backend=backend, mode=mode),
        )
        for mode, by_metric in by_mode.items()
        for metric, values in (("recall@5", by_metric["recall"]), ("MRR", by_metric["mrr"]))
        for ranking, value in values.items()
    ]

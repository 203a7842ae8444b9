"""The retrieval of the golden set does not become worse: fusion recall@5 within 0.02 of what is committed."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from job_runner.embed import PackagedEmbedder
from job_runner.quality import Quality, evaluate
from job_runner.search import Answers
from task_contract.models import ProcessingMode
from tests.support import golden

pytestmark = pytest.mark.integration

MOST = 0.02
"""How much lower fusion recall@5 may be than the baseline: 1 of 80 questions."""
BASELINE: dict[str, dict[str, float]] = json.loads((golden.GOLDEN / "baseline.json").read_text())
"""Way to split → ranking → recall@5 of the packaged model, as `make bench NAME=quality` has measured."""


def worse(measured: Quality, committed: Mapping[str, float]) -> str | None:
    """Return what has become worse by more than MOST."""
    now, before = measured.recall["fusion"], committed["fusion"]
    if now >= before - MOST - 1e-9:
        return None
    return f"fusion recall@5 is {now:.3f}, was {before:.3f}; not answered: {[one.question for one in measured.missed]}"


@pytest.fixture
def urls(store_urls: dict[str, str], database: str) -> dict[str, str]:
    return {**store_urls, "TASKS_POSTGRES_URL": database}


@pytest.mark.parametrize("mode", ProcessingMode)
async def test_recall_is_no_worse_than_the_baseline(urls: dict[str, str], mode: ProcessingMode) -> None:
    async with golden.filled(urls, mode=mode, embedder=PackagedEmbedder()) as ask:
        measured = await evaluate(golden.questions(), ask)

        async def spoiled(question: str) -> Answers:
            """As when the fusion lost the two best."""
            answers = await ask(question)
            return replace(answers, fused=answers.fused[2:])

        of_a_spoiled_ranking = await evaluate(golden.questions(), spoiled)
    assert worse(measured, BASELINE[mode]) is None
    assert worse(of_a_spoiled_ranking, BASELINE[mode]) is not None, "or nothing would be noticed"

"""The commands that ask a knowledge base: ``search`` and ``quality``, with their options and what they print."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from task_contract.errors import InvalidTask

if TYPE_CHECKING:
    from job_runner.index import Filters, Hit
    from job_runner.quality import Quality
    from job_runner.search import Answers, Ask, Fused, Mode, Place
    from job_runner.settings import Settings

_MODES = ("dense", "keyword", "hybrid")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands with their options."""
    search = commands.add_parser(
        "search",
        help="ask a knowledge base",
        description="Prints the best published chunks, first by meaning (Milvus), then by words (Elasticsearch); with "
        "--mode hybrid one ranking of both.",
    )
    _add_knowledge_base(search)
    search.add_argument("--query", required=True, help="a question, in any language of the model")
    search.add_argument("--top-k", type=_positive, default=3, help="chunks of each ranking [3]")
    search.add_argument(
        "--mode", choices=_MODES, help="by meaning alone, by words alone, or both fused; default: both, one after the other"
    )
    search.add_argument("--explain", action="store_true", help="also say where each store has a chunk, and its score there")
    search.add_argument("--json", action="store_true", help="one JSON object a line, with whole chunks")
    only = search.add_argument_group("only chunks that fit all of these")
    only.add_argument("--document", action="append", default=[], metavar="ID", help="of this document; may be repeated: any")
    only.add_argument("--language", metavar="CODE", help="zh, en or other; after a semantic analysis any code of ISO 639-1")
    only.add_argument(
        "--metadata", action="append", default=[], type=_pair, metavar="KEY=VALUE", help="may be repeated: all"
    )
    only.add_argument("--heading", metavar="TITLE", help="below it: whole titles from the top down, as 'Guide > Backup'")
    only.add_argument("--pages", type=_pages, metavar="FIRST[-LAST]", help="that touch these pages")
    only.add_argument(
        "--keyword", action="append", default=[], help="to which a semantic analysis gave it; may be repeated: all"
    )
    only.add_argument("--without-duplicates", action="store_true", help="of those that say nearly the same the first one")
    quality = commands.add_parser(
        "quality",
        help="measure how well a knowledge base answers",
        description="Asks questions of which the answer is known; prints the share that is answered among the first chunks "
        "(recall) and the mean of 1 / rank (MRR), by meaning, by words, and by both fused.",
    )
    _add_knowledge_base(quality)
    quality.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="FILE",
        help="a JSON object a line: question, documentId, and contains, a piece of the text that answers",
    )
    quality.add_argument("--top-k", type=_positive, default=5, help="chunks that are looked at [5]")
    quality.add_argument("--json", action="store_true", help="one JSON object")


def _add_knowledge_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--namespace", default="default", help="namespace of the tasks [default]")
    parser.add_argument("--kb-id", required=True, help="spec.kbId of the tasks")


def _positive(text: str) -> int:
    if not 1 <= (number := int(text)) <= 100:
        raise argparse.ArgumentTypeError("must be between 1 and 100")
    return number


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _pages(text: str) -> tuple[int, int]:
    first, separator, last = text.partition("-")
    pages = int(first), int(last if separator else first)
    if not 1 <= pages[0] <= pages[1] < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a page or FIRST-LAST")
    return pages


async def search(options: argparse.Namespace, loaded: "Settings") -> int:
    """Carry out ``search``; return the exit code."""
    from job_runner.search import Mode

    # Without a mode both stores answer one after the other, as in release 0.1.0: programs read that.
    mode = Mode(options.mode or Mode.HYBRID)
    async with _asking(options, loaded, mode=mode) as ask:
        answers = await ask(options.query, top_k=options.top_k, filters=_filters(options), mode=mode)
    if options.mode is not None:
        print("\n".join(_ranking(answers, mode, options)))  # noqa: T201 - the command's output
    elif output := as_json(answers) if options.json else as_table(answers):
        print(output)  # noqa: T201 - the command's output
    return 0


def _filters(options: argparse.Namespace) -> "Filters | None":
    from job_runner.index import Filters

    filters = Filters(
        document_ids=tuple(options.document),
        language=options.language,
        metadata=tuple(options.metadata),
        headings=tuple(part.strip() for part in options.heading.split(" > ")) if options.heading else (),
        pages=options.pages,
        keywords=tuple(options.keyword),
        without_duplicates=options.without_duplicates,
    )
    return None if filters == Filters() else filters


async def quality(options: argparse.Namespace, loaded: "Settings") -> int:
    """Carry out ``quality``; return the exit code."""
    from job_runner.quality import evaluate, read_questions
    from job_runner.search import Mode

    try:
        text = await asyncio.to_thread(options.questions.read_text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTask(f"cannot read the questions in {options.questions}: {error}; give a file of JSON lines") from error
    questions = read_questions(text.split("\n"))
    async with _asking(options, loaded, mode=Mode.HYBRID) as ask:
        measured = await evaluate(questions, partial(ask, top_k=options.top_k), top_k=options.top_k)
    print(_quality_json(measured) if options.json else _quality_table(measured, top_k=options.top_k))  # noqa: T201 - output
    return 0


@asynccontextmanager
async def _asking(options: argparse.Namespace, loaded: "Settings", *, mode: "Mode") -> AsyncIterator["Ask"]:
    """Open the generation that serves, with the model that filled it; of words alone none is loaded."""
    from job_runner.embed import find_embedder, make_embedder
    from job_runner.ledger import Ledger
    from job_runner.search import Mode, serving
    from job_runner.stores import opener

    ledger = Ledger(loaded.postgres_url.get_secret_value())
    try:
        known = await ledger.knowledge_base(namespace=options.namespace, kb_id=options.kb_id)
        embedder = None
        if mode is not Mode.KEYWORD and known is not None and known[1]:
            embedder = await asyncio.to_thread(find_embedder, loaded.models, make_embedder, fingerprint=known[1])
        open_stores = opener(loaded, dimension=known[2] if known else 0)
        async with serving(
            namespace=options.namespace, kb_id=options.kb_id, ledger=ledger, embedder=embedder, open_stores=open_stores
        ) as ask:
            yield ask
    finally:
        await ledger.aclose()


# -------------------------------------------------------------------------------------------------------------- output


def _ranking(answers: "Answers", mode: "Mode", options: argparse.Namespace) -> list[str]:
    """Return the lines of one ranking."""
    from job_runner.search import Mode

    if mode is Mode.HYBRID:
        title, name, hits = "Both, by reciprocal-rank fusion", "fusion", [one.hit for one in answers.fused]
    elif mode is Mode.DENSE:
        title, name, hits = "Milvus, by meaning", "milvus", answers.milvus
    else:
        title, name, hits = "Elasticsearch, by words", "elasticsearch", answers.elasticsearch
    if options.json:
        # Of fewer than two stores the fusion has the same order, and says where a row stands in the one that was asked.
        return [
            json.dumps({**_line(name, hit), **(_places(one) if options.explain else {})}, ensure_ascii=False)
            for hit, one in zip(hits, answers.fused, strict=True)
        ]
    lines = [title if hits else f"{title}: nothing found"]
    for rank, (hit, one) in enumerate(zip(hits, answers.fused, strict=True), start=1):
        digits = 4 if mode is Mode.HYBRID else 3
        lines += _shown(rank, hit, digits=digits, why=_why(one, mode) if options.explain else None)
    return lines


def _places(one: "Fused") -> dict[str, Any]:
    def place(found: "Place | None") -> dict[str, Any] | None:
        return None if found is None else {"rank": found.rank, "score": round(found.score, 4)}

    return {"milvus": place(one.milvus), "elasticsearch": place(one.elasticsearch)}


def _why(one: "Fused", mode: "Mode") -> str:
    """Return where a chunk's score comes from, for people."""
    from job_runner.search import K, Mode

    if mode is Mode.DENSE:
        return "the cosine of question and chunk"
    if mode is Mode.KEYWORD:
        return "BM25 over text and headings"
    stores = (("Milvus", "cosine", one.milvus), ("Elasticsearch", "BM25", one.elasticsearch))
    said = [
        f"{store}: {'not among its best' if place is None else f'rank {place.rank} ({score} {place.score:.3f})'}"
        for store, score, place in stores
    ]
    summed = " + ".join(f"1/{K + place.rank}" for _, _, place in stores if place is not None)
    return f"{', '.join(said)}; {summed} = {one.hit.score:.4f}"


def as_json(answers: "Answers") -> str:
    """Return the hits of both stores, one JSON object a line."""
    stores = (("milvus", answers.milvus), ("elasticsearch", answers.elasticsearch))
    return "\n".join(json.dumps(_line(store, hit), ensure_ascii=False) for store, hits in stores for hit in hits)


def _line(store: str, hit: "Hit") -> dict[str, Any]:
    return {
        "store": store,
        "score": round(hit.score, 4),
        "documentId": hit.document_id,
        "version": hit.version,
        "ordinal": hit.ordinal,
        "pageStart": hit.page_start or None,
        "pageEnd": hit.page_end or None,
        "headingPath": hit.heading_path.split("\n") if hit.heading_path else [],
        "text": hit.text,
    }


def as_table(answers: "Answers") -> str:
    """Return the hits of both stores for people."""
    lines = []
    for store, hits in (("Milvus, by meaning", answers.milvus), ("Elasticsearch, by words", answers.elasticsearch)):
        lines.append(store if hits else f"{store}: nothing found")
        for rank, hit in enumerate(hits, start=1):
            lines += _shown(rank, hit)
    return "\n".join(lines)


def _shown(rank: int, hit: "Hit", *, digits: int = 3, why: str | None = None) -> list[str]:
    last = "" if hit.page_end == hit.page_start else f"-{hit.page_end}"
    pages = f", page {hit.page_start}{last}" if hit.page_start else ""
    lines = [f"  {rank}. {hit.score:.{digits}f}  {hit.document_id} (version {hit.version}{pages})"]
    if why is not None:
        lines.append(f"     {why}")
    if hit.heading_path:
        lines.append(f"     {hit.heading_path.replace(chr(10), ' > ')}")
    lines.append(f"     {' '.join(hit.text.split())[:160]}")
    return lines


def _quality_json(measured: "Quality") -> str:
    return json.dumps(
        {
            "questions": measured.questions,
            "recall": {name: round(value, 4) for name, value in measured.recall.items()},
            "mrr": {name: round(value, 4) for name, value in measured.mrr.items()},
            "missed": [{"question": one.question, "documentId": one.document_id} for one in measured.missed],
        },
        ensure_ascii=False,
    )


def _quality_table(measured: "Quality", *, top_k: int) -> str:
    lines = [f"{measured.questions} questions", f"{'':<10} {f'recall@{top_k}':>10} {'MRR':>8}"]
    lines += [f"{name:<10} {recall:>10.3f} {measured.mrr[name]:>8.3f}" for name, recall in measured.recall.items()]
    if measured.missed:
        lines.append("not answered by the fusion:")
        lines += [f"  {one.document_id}: {one.question}" for one in measured.missed]
    return "\n".join(lines)

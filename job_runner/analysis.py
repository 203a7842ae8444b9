"""Semantic analysis of a knowledge base: language, keywords, a summary line and near-duplicates of every published chunk.

All but the duplicates of a row follow from its text and headings alone. What was analyzed by this version of the analysis
keeps it, and a row is written only if something of it changes: by another version, or because the row that it repeats has
come, gone, or been published anew.

Rows of published versions are written again, whole, with their texts and vectors as they were read: Milvus 2.3 cannot change
single columns. This is safe:

- For readers: the row has the same id, text and vector before and after, and both stores replace a row in one step.
- Beside tasks that publish or delete the document: the ledger's row of the document is locked, as of the version that is
  written to, until both stores have taken a batch (:meth:`job_runner.ledger.Ledger.keeping`). A commit of another version
  waits for that, and removes the rows afterwards. So no row comes back after its removal. A pod that was given up for dead
  in the midst of a batch and wakes up later may write stale rows: nobody reads them, and a sweep removes them, as it does
  with what such a pod writes of a document.
- Killed anywhere: Elasticsearch is written first and Milvus last, so that a row of Milvus that has its values says that
  both have them. The next run does the rest.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import structlog

from job_runner.index import Generation, Row
from job_runner.split import language_of
from job_runner.stores import Stores
from job_runner.watchdog import beat
from job_runner.work import Work
from task_contract.errors import InvalidTask, StoreUnavailable
from task_contract.names import digest

_VERSION: Final = "1"
"""Part of a row's fingerprint: raise it whenever the same text would be given other keywords, summary or language."""
_KEYWORDS: Final = 8
"""Of one row at most."""
_KEYWORD_CHARACTERS: Final = 64
_SUMMARY_CHARACTERS: Final = 240
_LETTERS: Final = 40
"""Of a text in Latin or another script that the detector of languages wants; of less it says anything."""
_SURE: Final = 0.9
"""Probability from which it is believed."""
_CHINESE_WORDS: Final = ("n", "vn", "j", "l", "i", "eng")
"""Beginnings of the tags of jieba's that name things: nouns, verbs as nouns, abbreviations, phrases, foreign words."""
_SHINGLE: Final = 5
"""Characters: of any language alike."""
_ALIKE: Final = 0.8
"""Share of shingles that two texts have in common (Jaccard), from which they say the same: about one word in ten differs."""
_HASHES: Final = 64
"""Of one text: the estimate of the share is off by 0.05 (sqrt(0.8 * 0.2 / 64)), and takes 2 kB of memory (measured)."""
_BANDS: Final = 16
"""Of four hashes each: texts that share 0.8 of their shingles meet in one of them with a probability of 0.9998."""
_SEED: Final = 42
"""The one that the library's index takes."""
_LOCK_SECONDS: Final = 10.0
"""How long both stores may take for a batch while the document is locked: a commit waits 15 seconds for it at most."""

_PHRASE: Final = 3
"""Words of a keyword in languages that have words apart."""
_BREAK: Final = re.compile(r"[^\w\s'’-]+|\n")
_WORD: Final = re.compile(r"[^\W_][\w'’-]*")
_SENTENCE_END: Final = re.compile(r"[。！？；]|[.!?](?=\s|$)")
_PROGRESS_SHARE: Final = 2
"""Every document is gone over twice: once to compare it with all others, once to write what has changed."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Enhancement:
    """What an analysis finds in one text."""

    language: str
    keywords: tuple[str, ...]
    summary: str


class Analyzer:
    """The libraries, loaded when they are needed: half a second and 60 MB."""

    def __init__(self) -> None:
        self._stops: dict[str, frozenset[str]] = {}

    def enhance(self, text: str, heading_path: str) -> Enhancement:
        """Return language, keywords and summary line of a chunk."""
        titles = heading_path.split("\n") if heading_path else []
        language = self._language(text)
        return Enhancement(language, self._keywords(text, language), summary_line(text, titles))

    def _language(self, text: str) -> str:
        """Return a code of ISO 639-1, or what the script says: ``zh``, ``en`` or ``other``."""
        by_script = language_of(text)
        if by_script == "zh" or sum(map(str.isalpha, text)) < _LETTERS:
            return by_script
        language, probability = self._detector.classify(text)
        return str(language) if probability >= _SURE else by_script

    def _keywords(self, text: str, language: str) -> tuple[str, ...]:
        found = self._chinese_words(text) if language == "zh" else phrases(text, self._stop_words(language))
        plain = (" ".join(keyword.lower().split()) for keyword in found)
        fitting = (keyword for keyword in plain if 2 <= len(keyword) <= _KEYWORD_CHARACTERS and not keyword.isdigit())
        return tuple(dict.fromkeys(fitting))[:_KEYWORDS]

    def _chinese_words(self, text: str) -> list[str]:
        """Return words that name things, the frequent ones first, of equal ones the longer."""
        words = [word.lower() for word, tag in self._jieba.tag(text) if tag.startswith(_CHINESE_WORDS) and len(word) > 1]
        counts = Counter(words)
        return sorted(counts, key=lambda word: (-counts[word], -len(word), words.index(word)))

    def _stop_words(self, language: str) -> frozenset[str]:
        if language not in self._stops:
            import stopwordsiso

            known = stopwordsiso.has_lang(language)
            self._stops[language] = frozenset(stopwordsiso.stopwords(language) if known else ())
        return self._stops[language]

    @cached_property
    def _jieba(self) -> Any:
        from rjieba import Jieba

        return Jieba()

    @cached_property
    def _detector(self) -> Any:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def phrases(text: str, stops: Collection[str]) -> list[str]:
    """Return words and phrases of up to three, the best first: what stands between stop words and punctuation.

    As in RAKE (Rose, Engel, Cramer and Cowley, 2010), with the sum of the frequencies of its words for a score, so that a
    phrase of words that come again and again is before one of words that come once.
    """
    found: list[tuple[str, ...]] = []
    for piece in _BREAK.split(text.lower()):
        run: list[str] = []
        for word in (*_WORD.findall(piece), ""):
            if len(word) > 1 and word not in stops and not word.isdigit():
                run.append(word)
            else:
                found += [tuple(run[start : start + _PHRASE]) for start in range(0, len(run), _PHRASE)]
                run = []
    counts = Counter(word for phrase in found for word in phrase)
    again = [(word,) for word, count in counts.items() if count > 1]
    scored = {phrase: sum(counts[word] for word in phrase) for phrase in (*found, *again)}
    return [" ".join(phrase) for phrase in sorted(scored, key=lambda phrase: -scored[phrase])]


def summary_line(text: str, titles: Sequence[str]) -> str:
    """Return where a chunk stands and its first sentence: ``Guide > Backup: Every night the tables are copied.``."""
    lines = (line.strip(" #*\t") for line in text.splitlines())
    body = " ".join(" ".join(line for line in lines if line and line not in titles).split())
    end = _SENTENCE_END.search(body)
    sentence = body[: end.end()] if end else body
    line = ": ".join(part for part in (" > ".join(titles), sentence) if part)
    return line if len(line) <= _SUMMARY_CHARACTERS else line[: _SUMMARY_CHARACTERS - 1].rstrip() + "…"


def fingerprint(row: Row) -> str:
    """Return what tells whether a row has been analyzed: by which version, and of which text and headings."""
    return digest(_VERSION, row.text_hash, row.heading_path)


class Duplicates:
    """Which texts say nearly the same, in the order in which they are given: each is compared with those before it."""

    def __init__(self) -> None:
        from rensa import RMinHashDeduplicator

        self._seen = RMinHashDeduplicator(_ALIKE, _HASHES, use_lsh=True, num_bands=_BANDS, seed=_SEED)

    def first(self, row: Row) -> str:
        """Return the id of the first row that says nearly the same; empty if this one is the first."""
        from rensa import RMinHash

        text = " ".join(row.text.lower().split())
        hashes = RMinHash(_HASHES, _SEED)
        hashes.update([text[start : start + _SHINGLE] for start in range(max(1, len(text) - _SHINGLE + 1))])
        if alike := self._seen.get_duplicates(hashes):
            return _id(min(alike))
        # In the order of these keys, whatever the ids are.
        self._seen.add(f"{self._seen.len():012}{row.id}", hashes)
        return ""


def _id(key: str) -> str:
    return key[12:]


async def analyze(
    work: Work,
    generation: Generation,
    stores: Stores,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> int:
    """Bring the analysis of all published rows of a generation up to date in both stores; return how many rows were written.

    The stores are those of the generation, and ensured. ``on_progress`` is called with (documents done, documents in all),
    each twice. May be interrupted, repeated, and run beside tasks that publish: what they publish meanwhile the next run
    analyzes. Two runs at once are wasteful and harmless.

    Raises InvalidTask where the collection has not the columns (:meth:`job_runner.index.VectorIndex.has_all_columns`): an
    earlier release has made it, and Milvus 2.3 cannot add any. Who can rebuild the knowledge base does that before. Raises
    Fenced when the task was canceled, and StoreUnavailable.
    """
    if not await stores.vectors.has_all_columns():
        raise InvalidTask(
            f"cannot analyze {generation.kb_id}: its collection was made by an earlier release and has no columns for it; "
            "set payload.rebuildIndex: true"
        )
    contents = await work.ledger.contents(generation)
    documents = sorted((name, one.version) for name, one in contents.published.items() if one.chunk_count)
    duplicates = await asyncio.to_thread(Duplicates)
    changing: dict[tuple[str, int], dict[int, str]] = {}
    for done, (document_id, version) in enumerate(documents):
        on_progress(done, _PROGRESS_SHARE * len(documents))
        found = await _compared(document_id, version, stores, duplicates)
        if found is not None:
            changing[document_id, version] = found
    written = 0
    analyzer = Analyzer()
    for done, ((document_id, version), repeated) in enumerate(changing.items()):
        on_progress(len(documents) + done * len(documents) // len(changing), _PROGRESS_SHARE * len(documents))
        written += await _written(document_id, version, repeated, work, generation, stores, analyzer)
    log.info("analyzed", documents=len(documents), changed=len(changing), rows=written)
    return written


async def _compared(document_id: str, version: int, stores: Stores, duplicates: Duplicates) -> dict[int, str] | None:
    """Compare a document with those before it; return ordinal → the row it repeats if any of its rows is to change."""

    def compared(rows: Sequence[Row]) -> bool:
        changes = False
        for row in rows:
            first = duplicates.first(row)
            if first:
                repeated[row.ordinal] = first
            changes |= (row.duplicate_of, row.analysis) != (first, fingerprint(row))
            beat()
        return changes

    repeated: dict[int, str] = {}
    changes = False
    async for rows in stores.vectors.read(document_id, version):
        changes |= await asyncio.to_thread(compared, rows)
    return repeated if changes else None


async def _written(
    document_id: str,
    version: int,
    repeated: dict[int, str],
    work: Work,
    generation: Generation,
    stores: Stores,
    analyzer: Analyzer,
) -> int:
    """Write what is to change of one document; return how many rows."""

    def enhanced(row: Row) -> Row:
        row = replace(row, duplicate_of=repeated.get(row.ordinal, ""))
        if row.analysis == (made_of := fingerprint(row)):
            return row
        found = analyzer.enhance(row.text, row.heading_path)
        beat()
        return replace(row, language=found.language, keywords=found.keywords, summary=found.summary, analysis=made_of)

    written = 0
    async for rows, vectors in stores.vectors.read_with_vectors(document_id, version):
        after = await asyncio.to_thread(lambda part: list(map(enhanced, part)), rows)
        changed = [index for index, row in enumerate(after) if row != rows[index]]
        if not changed:
            continue
        async with work.ledger.keeping(generation, document_id=document_id, version=version, task_uid=work.uid) as kept:
            if not kept:
                log.info("published anew meanwhile", document=document_id, version=version)
                return written
            try:
                async with asyncio.timeout(_LOCK_SECONDS):
                    await stores.texts.write([after[index] for index in changed])
                    await stores.vectors.write([after[index] for index in changed], vectors[changed])
            except TimeoutError as error:
                raise StoreUnavailable(
                    f"cannot write the analysis of {document_id}: the stores took longer than {_LOCK_SECONDS:.0f} s for "
                    f"{len(changed)} rows; check their load"
                ) from error
        written += len(changed)
        beat()
    return written

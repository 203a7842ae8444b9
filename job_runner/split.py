"""Cutting a document into chunks: pure, deterministic, and at the ends of sentences in Chinese, Japanese and Latin scripts.

How ``intelligent_split`` works: the text is tiled by *borders* (ends of sentences, paragraphs and list items, edges of
headings); a stretch between two borders that is longer than a chunk gets weaker borders (line ends, commas, spaces; at last
any character). Chunks are then runs of stretches, found by bisection in the list of borders, so the cost hardly depends on
the length of sentences.

``semantic`` does the same, and ends chunks where the topic changes: at borders with meanings on both sides that are far
apart, which it asks the embedding model for.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final

from job_runner.document import Chunk, ParsedDocument, heading_paths
from task_contract.models import ProcessingMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Embed = Callable[[Sequence[str]], "npt.NDArray[np.float32]"]
"""Turns texts into vectors of length 1, one a text, in order."""

SPLITTER_VERSION: Final = "1"
"""Part of the pipeline fingerprint: raise it whenever the same text would be cut differently."""

_CLOSERS = r"""["'”’」』）】》〉)\]]"""
# One leading character class lets the regular expression engine skip to candidates; lookbehinds then tell them apart.
_BORDER: Final = re.compile(
    rf"""[。！？；…｡.!?\n](?:
        (?<=[。！？；…｡]) [。！？；…｡.!?]* {_CLOSERS}* \s*
      | (?<=[.!?]) [.!?]* {_CLOSERS}* (?: \s+ | \Z )
      | (?<=\n) (?: [ \t\u3000]* \n \s* | (?= [ \t]* (?: [-*+•·] | \d{{1,3}}[.)、] | \|) ) )
    )""",
    re.VERBOSE,
)
# fmt: off
_ABBREVIATIONS: Final = frozenset({
    "al", "approx", "art", "ca", "cf", "ch", "dept", "dr", "ed", "eds", "eq", "etc", "e.g", "fig",
    "figs", "gov", "i.e", "inc", "jr", "ltd", "mr", "mrs", "ms", "no", "nos", "pp", "prof", "ref",
    "sec", "sr", "st", "vol", "vs",
})
# fmt: on
_WORD_BEFORE: Final = re.compile(r"[^\s(\[“\"']{1,12}\Z")
# Where to cut a sentence that is longer than a chunk, the best first.
_WEAK_BORDERS: Final = (re.compile(r"\n\s*"), re.compile(r"[，、：,;:]\s*"), re.compile(r"\s+"))
_NON_SPACE: Final = re.compile(r"\S")
_COMBINING: Final = re.compile(r"[\u0300-\u036f\u200d\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]")

# Runs and not single characters: a match costs more than the characters in it.
_HAN: Final = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_KANA_HANGUL: Final = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]+")
_LATIN: Final = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_NO_SCRIPT: Final = tuple(
    bytes(set(range(256)).difference(*blocks))
    for blocks in ((range(0x34, 0xA0), (0xF9, 0xFA)), ((0x30,), range(0xAC, 0xD8)), (range(3),))
)
"""High bytes that no character of a script has: Han but for rare ones; kana and Hangul; Latin."""
_LANGUAGE_SAMPLE: Final = 600
"""Characters that decide the language of a chunk."""

_WINDOW: Final = 3
"""Sentences on either side of a border whose meanings are compared, weighted by length: one alone says too little."""
_TOPIC_SHARE: Final = 0.1
"""Share of the borders of a document that are candidates for a change of topic: those with the largest distances."""
_EMBEDDED_AT_ONCE: Final = 1024
"""Sentences whose vectors are held at a time: 2 MB at 512 dimensions, however long the document is."""


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """How to cut. Sizes are characters (code points); a chunk never exceeds ``chunk_size`` nor ``max_tokens``."""

    chunk_size: int = 1000
    chunk_overlap: int = 200
    mode: ProcessingMode = ProcessingMode.INTELLIGENT_SPLIT
    max_tokens: int | None = None
    """Longest text that the embedding model reads whole; ``None``: it has no limit."""
    count_tokens: Callable[[str], int] | None = None
    """The model's own. Called once a chunk or, with ``max_tokens``, once a stretch, never once a candidate."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"cannot split into chunks of {self.chunk_size} characters: at least 1 is needed")
        if not 0 <= self.chunk_overlap < self.chunk_size:
            raise ValueError(
                f"cannot overlap chunks of {self.chunk_size} characters by {self.chunk_overlap}: "
                "the overlap must be at least 0 and smaller than the chunk"
            )
        if self.max_tokens is not None and (self.max_tokens < 1 or self.count_tokens is None):
            raise ValueError("cannot limit tokens: max_tokens must be at least 1 and needs count_tokens")


def split(document: ParsedDocument, settings: SplitSettings, *, embed: Embed | None = None) -> Iterator[Chunk]:
    """Cut a document into chunks, in order; a document of white space yields none.

    For every chunk ``chunk.text == document.text[chunk.start:chunk.end]``; starts never move back and ends always move on
    from one chunk to the next. With a token limit the same holds for the sum of the tokens of a chunk's stretches.

    ``embed`` is for the semantic mode, which cannot do without, and is given every sentence once.
    """
    if settings.mode is ProcessingMode.SEMANTIC and embed is None:
        raise ValueError("cannot split by meaning without an embedding model")
    sections = _Sections(document)
    spans: Iterator[tuple[int, int, int | None]]
    if settings.mode is ProcessingMode.FIXED:
        spans = _fixed(document.text, settings)
    else:
        spans = _packed(document, settings, embed if settings.mode is ProcessingMode.SEMANTIC else None)
    for ordinal, (start, end, tokens) in enumerate(spans):
        text = document.text[start:end]
        if tokens is None and settings.count_tokens is not None:
            tokens = settings.count_tokens(text)
        yield Chunk(
            ordinal=ordinal,
            text=text,
            start=start,
            end=end,
            page_start=document.page_at(start),
            page_end=document.page_at(end - 1),
            heading_path=sections.path(start, end),
            language=language_of(text),
            tokens=tokens or 0,
        )


def language_of(text: str) -> str:
    """Return ``zh``, ``en`` or ``other`` by the script of the first characters; Latin script counts as ``en``."""
    if text.isascii():
        return "en" if _LATIN.search(text) else "other"
    sample = text[:_LANGUAGE_SAMPLE]
    # The high bytes of UTF-16 tell most Chinese text at a tenth of the cost: at least so many Han, at most so many others.
    high = sample.encode("utf-16-be", "surrogatepass")[::2]
    least_han, most_kana_hangul, most_latin = (len(high.translate(None, others)) for others in _NO_SCRIPT)
    if most_kana_hangul <= least_han // 10 and least_han * 4 > most_latin:
        return "zh"
    han, kana_hangul, latin = (sum(map(len, script.findall(sample))) for script in (_HAN, _KANA_HANGUL, _LATIN))
    if kana_hangul > han // 10 and kana_hangul * 4 > latin:
        return "other"
    if han * 4 > latin:  # a Chinese word has two characters where an English one has five and more
        return "zh"
    return "en" if latin else "other"


class _Sections:
    """Which section of the document a chunk lies in."""

    def __init__(self, document: ParsedDocument) -> None:
        self._starts = [heading.start for heading in document.headings]
        self._paths = heading_paths(document.headings)
        self._length = len(document.text)

    def path(self, start: int, end: int) -> tuple[str, ...]:
        """Return the heading path of the section that fills most of ``[start, end)``; of equal ones the first."""
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, end) - 1
        best, size = first, -1
        for index in range(first, last + 1):
            section_start = self._starts[index] if index >= 0 else 0
            section_end = self._starts[index + 1] if index + 1 < len(self._starts) else self._length
            if (covered := min(end, section_end) - max(start, section_start)) > size:
                best, size = index, covered
        return self._paths[best] if best >= 0 else ()


# --------------------------------------------------------------------------------------------------------------- fixed


def _fixed(text: str, settings: SplitSettings) -> Iterator[tuple[int, int, int | None]]:
    """Windows of ``chunk_size`` characters; white space at the edges is left out, blank windows are skipped."""
    last_end = 0
    start = 0
    while start < len(text):
        size = settings.chunk_size
        while not _fits(text[start : start + size], settings) and size > 1:
            size //= 2
        first, last = _trim(text, start, min(start + size, len(text)))
        if last > max(first, last_end):
            yield first, last, None
            last_end = last
        # An overlap that the halving above left no room for must not bring the windows to a stop.
        start += max(1, size - settings.chunk_overlap)


def _fits(text: str, settings: SplitSettings) -> bool:
    return settings.max_tokens is None or settings.count_tokens is None or settings.count_tokens(text) <= settings.max_tokens


# --------------------------------------------------------------------------------------------------------- intelligent


def _packed(document: ParsedDocument, settings: SplitSettings, embed: Embed | None) -> Iterator[tuple[int, int, int | None]]:
    """Greedy runs of stretches, broken at headings and at changes of topic, overlapping by whole stretches.

    Yield start, end and tokens; these are ``None`` where nothing had to be counted.
    """
    text, size = document.text, settings.chunk_size
    borders, tokens = _borders(document, settings)
    topics = None if embed is None else _Topics(text, borders, embed)
    heads = [heading.start for heading in document.headings]
    lines = {heading.start for heading in document.headings if heading.end > heading.start}
    last = len(borders) - 1
    index = reached = 0
    while found := _NON_SPACE.search(text, borders[index]):
        start = found.start()
        index = bisect_right(borders, start) - 1
        # As many stretches as fit; the white space at the end of the last one does not count.
        stop = max(index + 1, bisect_right(borders, start + size) - 1)
        if stop < last and _trim(text, start, borders[stop + 1])[1] <= start + size:
            stop += 1
        if tokens and settings.max_tokens is not None:
            stop = min(stop, max(index + 1, bisect_right(tokens, tokens[index] + settings.max_tokens) - 1))
        # A heading starts a new chunk, unless so little stands before it that it would make a chunk of a few words.
        whole = stop == last
        for position in range(bisect_right(heads, start), bisect_left(heads, borders[stop])):
            if (heads[position] - start) * 4 >= size:
                stop, whole = bisect_left(borders, heads[position]), True
                break
        changed = False
        if topics is not None:
            stop, changed = topics.stop(start=start, after=max(index, reached), stop=stop, whole=whole, size=size)
        while stop < last and stop > index + 1 and borders[stop - 1] in lines:
            stop -= 1  # no heading at the end of a chunk, away from its text
        yield start, _trim(text, start, borders[stop])[1], tokens[stop] - tokens[index] if tokens else None
        if stop == last:
            return
        reached = stop
        # Two topics have nothing to say in common: no overlap there.
        index = stop if changed else _overlapped(text, borders, heads, tokens, index=index, stop=stop, settings=settings)


def _overlapped(
    text: str,
    borders: list[int],
    heads: list[int],
    tokens: list[int],
    *,
    index: int,
    stop: int,
    settings: SplitSettings,
) -> int:
    """Return the stretch at which the next chunk starts: ``stop``, or earlier by at most the overlap.

    Not beyond a heading, and not so early that the next chunk could not hold the stretch at ``stop``: it must bring text
    that is new.
    """
    end = borders[stop]
    position = bisect_right(heads, end)
    if position and heads[position - 1] == end:
        return stop
    earliest = bisect_left(borders, end - settings.chunk_overlap)
    if position:
        earliest = max(earliest, bisect_left(borders, heads[position - 1]))
    new_end = _trim(text, end, borders[stop + 1])[1]
    earliest = max(earliest, index + 1, bisect_left(borders, new_end - settings.chunk_size))
    while tokens and settings.max_tokens is not None and earliest < stop:
        if tokens[stop + 1] - tokens[earliest] <= settings.max_tokens:
            break
        earliest += 1
    return min(earliest, stop)


def _borders(document: ParsedDocument, settings: SplitSettings) -> tuple[list[int], list[int]]:
    """Return ascending offsets from 0 to the length of the text, and the tokens before each where they are limited.

    No stretch between two borders has more content than a chunk.
    """
    text = document.text
    ends = [match.end() for match in _BORDER.finditer(text) if text[match.start()] != "." or _ends_sentence(text, match)]
    offsets = {0, len(text), *ends}
    for heading in document.headings:
        offsets |= {heading.start, heading.end}
    strong = sorted(offsets)
    if settings.max_tokens is None:
        borders = [0]
        for start, end in pairwise(strong):
            if end - start > settings.chunk_size:
                borders.extend(cut for cut, _ in _cut_long(text, start, end, settings))
            else:
                borders.append(end)
        return borders, []
    cuts = [(0, 0)]
    for start, end in pairwise(strong):
        cuts.extend(_cut_long(text, start, end, settings))
    return [cut for cut, _ in cuts], list(accumulate(count for _, count in cuts))


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Tell whether a full stop ends a sentence; not after abbreviations, initials and numbers of list items."""
    dot, after = match.start(), match.end()
    if after < len(text) and text[after].islower():
        return False
    before = _WORD_BEFORE.search(text, max(0, dot - 12), dot)
    if before is None:
        return True
    word = before.group()
    if word.isdigit():
        line = text.rfind("\n", 0, dot) + 1
        return bool(text[line : before.start()].strip())
    return not ((len(word) == 1 and word.isupper()) or word.lower() in _ABBREVIATIONS)


def _cut_long(text: str, start: int, end: int, settings: SplitSettings) -> Iterator[tuple[int, int]]:
    """Cut ``text[start:end]`` into pieces that fit: yield the end of each, and its tokens where they are limited."""
    most = settings.max_tokens
    count = (lambda piece: 0) if most is None or settings.count_tokens is None else settings.count_tokens
    while (found := _NON_SPACE.search(text, start, end)) is not None:
        first = found.start()
        last = _trim(text, first, end)[1]
        limit = settings.chunk_size
        if last - first <= limit:
            tokens = count(text[start:end])  # with white space, which lies inside of a chunk later on
            if most is None or tokens <= most or count(text[first:last]) <= most:
                yield end, tokens
                return
        while limit > 1 and most is not None and count(text[first : first + limit]) > most:
            limit //= 2
        if last - first <= limit:
            break  # one character that alone has more tokens than the model reads: nothing is left to cut
        cut = _weak_border(text, first, first + limit)
        yield cut, count(text[start:cut])
        start = cut
    yield end, count(text[start:end])


def _weak_border(text: str, start: int, limit: int) -> int:
    """Return where to cut ``text[start:limit]``, in its second half if there is any place better than the last character."""
    middle = start + (limit - start + 1) // 2
    for pattern in _WEAK_BORDERS:
        cut = 0
        for match in pattern.finditer(text, middle, limit):
            cut = match.end()
        if cut > start:
            return cut
    cut = limit
    while cut > middle and _COMBINING.match(text, cut):
        cut -= 1  # an accent or a variation selector stays with its letter
    return cut if cut > middle else limit


# ------------------------------------------------------------------------------------------------------------ semantic


class _Topics:
    """Where the topic changes, by the meanings of the sentences."""

    def __init__(self, text: str, borders: list[int], embed: Embed) -> None:
        spans = [_trim(text, start, end) for start, end in pairwise(borders)]
        filled = [index for index, (start, end) in enumerate(spans) if start < end]
        distances = _distances([text[slice(*spans[index])] for index in filled], embed)
        self._borders = borders
        # A border is that behind a stretch with text in it; white space belongs to what follows.
        self._distances = {index + 1: distance for index, distance in zip(filled[:-1], distances, strict=True)}
        self._changes = [filled[position] + 1 for position in _peaks(distances)]

    def stop(self, *, start: int, after: int, stop: int, whole: bool, size: int) -> tuple[int, bool]:
        """Return the border where a chunk ends that starts at an offset and may go up to ``stop``, and if the topic changes.

        It is the first change of topic that leaves neither less than a quarter of a chunk before it, nor behind it where
        ``stop`` is the end of a section (``whole``). Without one a section that fits stays whole; another is cut in the
        second half of the chunk, where neighbours have least in common.
        """
        least = size / 4
        for border in self._changes[bisect_right(self._changes, after) : bisect_right(self._changes, stop)]:
            before, behind = self._borders[border] - start, self._borders[stop] - self._borders[border]
            if before >= least and not (whole and behind < least):
                return border, True
        if whole:
            return stop, False
        middle = bisect_left(self._borders, (start + self._borders[stop]) / 2)
        second_half = range(max(after + 1, middle), stop + 1)
        return max(second_half, key=lambda border: (self._distances.get(border, 0), border), default=stop), False


def _distances(sentences: list[str], embed: Embed) -> list[float]:
    """Return, for each border between two sentences, 1 - cosine of what stands around it; rounded, as models round too.

    A border with less than a window on one side has 0: a single sentence is far from anything.
    """
    import numpy as np

    if len(sentences) < 2 * _WINDOW:
        return [0.0] * (len(sentences) - 1)
    found = [0.0] * (_WINDOW - 1)
    held = None  # weighted vectors, of those sentences that are within a window of borders to come
    for begin in range(0, len(sentences), _EMBEDDED_AT_ONCE):
        block = sentences[begin : begin + _EMBEDDED_AT_ONCE]
        vectors = np.asarray(embed(block), dtype=np.float64) * np.array([[len(sentence)] for sentence in block])
        held = vectors if held is None else np.concatenate([held, vectors])
        sums = np.concatenate([np.zeros((1, held.shape[1])), held.cumsum(axis=0)])
        left, right = sums[_WINDOW:-_WINDOW] - sums[: -2 * _WINDOW], sums[2 * _WINDOW :] - sums[_WINDOW:-_WINDOW]
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        found += np.round(1 - (left * right).sum(axis=1) / np.maximum(lengths, 1e-9), 4).tolist()
        held = held[-(2 * _WINDOW - 1) :]
    return found + [0.0] * (_WINDOW - 1)


def _peaks(distances: list[float]) -> list[int]:
    """Return the positions of the largest distances, as many as _TOPIC_SHARE says, that no neighbour exceeds."""
    count = max(1, round(len(distances) * _TOPIC_SHARE))
    largest = sorted(range(len(distances)), key=lambda position: (-distances[position], position))[:count]

    def is_peak(position: int) -> bool:
        start = max(0, position - _WINDOW)
        around = range(start, min(len(distances), position + _WINDOW + 1))
        return max(around, key=lambda other: (distances[other], -other)) == position

    return sorted(filter(is_peak, largest))


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the span without white space at its edges; an empty span when there is nothing else."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end

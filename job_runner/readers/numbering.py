"""The numbers that a word processor writes before headings and list items; in the file stands only how to count.

What is there: ECMA-376 part 1, 17.9.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from job_runner.readers.package import Attributes, Package

_LEVELS: Final = 9
_LABEL_LIMIT: Final = 40
"""Characters of a number; a longer one is no number."""
_PLACE: Final = re.compile(r"%([1-9])")
_CHINESE: Final = "零一二三四五六七八九"
_FORMAL: Final = "零壹贰叁肆伍陆柒捌玖"


@dataclass(slots=True)
class _Level:
    start: int = 1
    format: str = "decimal"
    text: str = ""
    style: str | None = None
    """Paragraphs of this style are of this level."""
    legal: bool = False
    """All numbers in the label are decimal."""
    separated: bool = True


@dataclass(slots=True)
class _List:
    """A numbering: its definition, and what it changes."""

    definition: str | None = None
    starts: dict[int, int] = field(default_factory=dict)
    levels: dict[int, _Level] = field(default_factory=dict)


class Numbering:
    """The numberings of a document, and how far each has counted."""

    def __init__(self, package: Package) -> None:
        self._definitions: dict[str, dict[int, _Level]] = {}
        self._linked: dict[str, str] = {}
        """Definitions that are kept elsewhere: the name of the numbering style."""
        self._styled: dict[str, str] = {}
        """Definitions by the name of their numbering style."""
        self._lists: dict[str, _List] = {}
        self._counters: dict[str, dict[int, int]] = {}
        self._begun: set[str] = set()
        part = package.related("numbering")
        if part is not None:
            self._read(package, part)

    def label(self, number_id: str, level: int | None, *, style: str | None) -> tuple[str, int]:
        """Count a paragraph. Returns what stands before its text (``"1.2 "``, ``"- "``, or nothing) and its level, from 0.

        ``level`` is what the paragraph says; without that, the definition tells by the style of the paragraph.
        """
        found = self._lists.get(number_id)
        if found is None or found.definition is None:
            return "", 0
        definition = self._resolved(found.definition)
        levels = self._definitions.get(definition, {}) | found.levels
        if level is None:
            level = next((index for index, one in levels.items() if style is not None and one.style == style), 0)
        level = min(max(level, 0), _LEVELS - 1)
        current = levels.get(level)
        if current is None:
            return "", level
        counters = self._counters.setdefault(definition, {})
        if number_id not in self._begun:
            self._begun.add(number_id)
            for index, start in found.starts.items():
                counters.pop(index, None)
                levels[index] = levels.get(index, _Level())
                counters[index] = start - 1
        counters[level] = counters[level] + 1 if level in counters else current.start
        for deeper in [index for index in counters if index > level]:
            del counters[deeper]
        if current.format == "bullet":
            return "- ", level
        if current.format == "none" and not _PLACE.search(current.text):
            return "", level

        def number(place: re.Match[str]) -> str:
            index = int(place.group(1)) - 1
            one = levels.get(index, _Level())
            value = counters.get(index, one.start)
            return write_number(value, "decimal" if current.legal else one.format)

        label = _PLACE.sub(number, current.text[:_LABEL_LIMIT])[: 2 * _LABEL_LIMIT].strip()
        return (label + " " if label and (current.separated or label[-1].isdigit()) else label), level

    def _resolved(self, definition: str) -> str:
        linked = self._styled.get(self._linked.get(definition, ""))
        return linked if linked is not None else definition

    def _read(self, package: Package, part: str) -> None:
        levels: dict[int, _Level] = {}
        level = _Level()
        definition = ""
        current = _List()
        index = 0

        def start(name: str, attributes: Attributes) -> None:
            nonlocal levels, level, definition, current, index
            value = attributes.get("val", "")
            match name:
                case "abstractNum":
                    definition = attributes.get("abstractNumId", "")
                    levels = self._definitions[definition] = {}
                case "numStyleLink":
                    self._linked[definition] = value
                case "styleLink":
                    self._styled[value] = definition
                case "num":
                    current = self._lists[attributes.get("numId", "")] = _List()
                    levels = current.levels
                case "abstractNumId":
                    current.definition = value
                case "lvlOverride":
                    index = integer(attributes.get("ilvl"), default=0)
                case "startOverride":
                    current.starts[index] = integer(value, default=1)
                case "lvl":
                    index = integer(attributes.get("ilvl"), default=0)
                    level = levels[index] = _Level()
                case "start":
                    level.start = integer(value, default=1)
                case "numFmt":
                    level.format = value
                case "lvlText":
                    level.text = value
                case "pStyle":
                    level.style = value
                case "isLgl":
                    level.legal = value not in {"0", "false", "off"}
                case "suff":
                    level.separated = value != "nothing"

        package.parse(part, start=start, end=lambda name: None)


def integer(text: str | None, *, default: int) -> int:
    """Return a number of at most six digits; the default for anything else."""
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,6}", text) else default


def write_number(value: int, how: str) -> str:
    """Write a number as a numbering format does; those that are not known are decimal."""
    writer = _FORMATS.get(how)
    return writer(value) if writer is not None and value > 0 else str(value)


def _letters(value: int) -> str:
    """26 letters, then each twice, three times ..."""
    times, index = divmod(value - 1, 26)
    return chr(ord("a") + index) * min(times + 1, 5)


def _roman(value: int) -> str:
    if value >= 4000:
        return str(value)
    text = ""
    for size, mark in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("m", "cm", "d", "cd", "c", "xc", "l", "xl", "x", "ix", "v", "iv", "i"),
        strict=True,
    ):
        text += mark * (value // size)
        value %= size
    return text


def _chinese(value: int, *, digits: str = _CHINESE, units: str = "十百千") -> str:
    """12 as 十二, 105 as 一百零五; 10,000 and more in digits."""
    if value >= 10_000:
        return str(value)
    text = ""
    for power in (3, 2, 1, 0):
        digit = value // 10**power % 10
        if digit:
            text += digits[digit] + (units[power - 1] if power else "")
        elif text and value % 10**power and not text.endswith(digits[0]):
            text += digits[0]
    return text.removeprefix(digits[1]) if 10 <= value < 20 and digits is _CHINESE else text


def _circled(value: int) -> str:
    return chr(0x2460 + value - 1) if value <= 20 else str(value)


def _one_of(marks: str) -> Callable[[int], str]:
    return lambda value: marks[value - 1] if value <= len(marks) else str(value)


_FORMATS: Final[dict[str, Callable[[int], str]]] = {
    "decimalZero": lambda value: f"{value:02}",
    "lowerLetter": _letters,
    "upperLetter": lambda value: _letters(value).upper(),
    "lowerRoman": _roman,
    "upperRoman": lambda value: _roman(value).upper(),
    "chineseCounting": _chinese,
    "chineseCountingThousand": _chinese,
    "taiwaneseCounting": _chinese,
    "taiwaneseCountingThousand": _chinese,
    "japaneseCounting": _chinese,
    "ideographDigital": lambda value: "".join("〇一二三四五六七八九"[int(digit)] for digit in str(value)),
    "chineseLegalSimplified": lambda value: _chinese(value, digits=_FORMAL, units="拾佰仟"),
    "decimalEnclosedCircle": _circled,
    "decimalEnclosedCircleChinese": _circled,
    "ideographTraditional": _one_of("甲乙丙丁戊己庚辛壬癸"),
    "ideographZodiac": _one_of("子丑寅卯辰巳午未申酉戌亥"),
    "none": lambda value: "",
}

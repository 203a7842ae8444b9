"""From bytes to text: by a byte order mark, by what the file declares, else UTF-8, GB18030 or the best guess."""

import codecs
import re
from typing import Final

from job_runner.document import READABLE
from job_runner.readers.failure import ReadingFailed

_BYTE_ORDER_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark starts with that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GUESSED: Final = ("big5", "cp932", "euc_jp", "cp949", "cp1252", "cp1250", "cp1251", "koi8_r")
"""Among these the guess is made: with all that Python knows, a few accents make a DOS code page of the Baltic likely."""
# What pages mean by a label, as browsers understand it (the WHATWG encoding standard): the larger set of the same family.
_MEANT: Final = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "x-gbk": "gb18030",
    "gb_2312-80": "gb18030",
    "iso-8859-1": "cp1252",
    "latin1": "cp1252",
    "us-ascii": "cp1252",
    "ascii": "cp1252",
    "big5": "big5hkscs",
    "x-x-big5": "big5hkscs",
    "shift_jis": "cp932",
    "shift-jis": "cp932",
    "x-sjis": "cp932",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
    "iso-8859-9": "cp1254",
}
_OF_PAGES: Final = re.compile(
    r"utf-8|gb18030|big5hkscs|cp932|cp949|euc_jp|iso2022_jp|cp125\d|cp874|cp866|iso8859-\d+|koi8-[ru]|mac-(?:roman|cyrillic)"
)
"""Codecs of that standard; Python has others, for e-mail or slower than linear, that no page is written in."""
_CONVERTED: Final = 16
_NON_ASCII: Final = re.compile(r"[^\x00-\x7f]")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_CHARSET_SAMPLE: Final = 4000
_COMMON_SHARE: Final = 0.75
"""Share of common characters from which a text counts as GB18030. Chinese prose has above 0.95; Big5, Shift-JIS and Latin
texts that happen to decode have far less, as their bytes land on rare characters."""


def decode(data: bytes, *, name: str, declared: str | None = None) -> str:
    r"""Return the text of a file with ``\n`` line ends.

    By its byte order mark, else by the character set that it declares, else as UTF-8, GB18030, or the best guess. A
    declaration that the bytes contradict counts for nothing.
    """
    text = _decode(data, name=name, declared=declared)
    if len(_CONTROL.findall(text, 0, 100_000)) > len(text[:100_000]) // 100:
        raise ReadingFailed(
            "DocumentRefused",
            f"cannot read {name}: it holds binary data, not text; this version reads {READABLE}",
        )
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _decode(data: bytes, *, name: str, declared: str | None) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                message = f"cannot read {name}: it is marked as {encoding} and byte {error.start} is not; save it as UTF-8"
                raise ReadingFailed("DocumentUnreadable", message) from error
    if declared is not None and (text_as_declared := _as_declared(data, declared)) is not None:
        return text_as_declared
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        pass
    else:
        if _common_chinese(text) >= _COMMON_SHARE:
            return text
    # Imported here: most files are UTF-8, and the import costs as much as reading one.
    import charset_normalizer

    best = charset_normalizer.from_bytes(data[:1_000_000], cp_isolation=list(_GUESSED)).best()
    if best is not None:
        try:
            return data.decode(best.encoding)
        except UnicodeDecodeError:
            pass
    raise ReadingFailed("DocumentUnreadable", f"cannot read {name}: its character set is unknown; save it as UTF-8")


def _as_declared(data: bytes, declared: str) -> str | None:
    """Return the text in the declared character set; ``None`` if it is not in it."""
    label = declared.lower()
    try:
        codec = codecs.lookup(_MEANT.get(label, label)).name
        if not _OF_PAGES.fullmatch(codec):
            return None
        text = data.decode(codec)
    except (LookupError, UnicodeError):
        return None
    if codec != "utf-8":
        try:
            as_utf_8 = data.decode("utf-8")
        except UnicodeDecodeError:
            return text
        # Text in another character set that happens to be valid UTF-8 is a few characters long, such as 联通 in GBK.
        # A longer one was converted, and its declaration was not.
        if len(_NON_ASCII.findall(as_utf_8, 0, 100_000)) >= _CONVERTED:
            return as_utf_8
    return text


def _common_chinese(text: str) -> float:
    """Return which share of the characters beyond ASCII is punctuation or first-level characters of GB 2312."""
    sample = "".join(_NON_ASCII.findall(text, 0, 20 * _CHARSET_SAMPLE)[:_CHARSET_SAMPLE])
    if not sample:
        return 0
    leads = sample.encode("gb2312", errors="ignore")[::2]
    return sum(0xA1 <= lead <= 0xA3 or 0xB0 <= lead <= 0xD7 for lead in leads) / len(sample)

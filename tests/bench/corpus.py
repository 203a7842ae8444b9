"""Documents for the benchmarks of the pipeline: made of plain sentences, the same on every machine, no two sentences alike.

Chinese PDFs are set in a standard font that the file does not carry, which every reader reads fastest: a figure of these
files says nothing bad of a library that it would not deserve.
"""

import random
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from tests.support.pdf import PdfPage, make_pdf

LINE: Final = 34
"""Chinese characters of a line of a page; an English one has twice as many letters."""
LINES: Final = 40
"""Lines of a page: 1,300 Chinese characters."""
_CHAPTER_PAGES: Final = 5
_ZH: Final = (
    "知识库 文档 任务 系统 平台 数据 备份 恢复 检索 向量 索引 版本 模型 服务 节点 集群 日志 指标 告警 权限 密钥 网络 存储 "
    "管理员 操作员 审计 流程 规范 报告 实验室 设备 仓库 水位 潮汐 校准 传感器 周期 阈值 记录 清单 预案 演练 值班 通知 会议"
)
_ZH_VERBS: Final = "检查 更新 记录 删除 复制 说明 要求 支持 等待 提交 验证 替换 公布 汇总 分析 启动 停止 比较 保留 通知"
_EN: Final = (
    "backup archive station operator review ledger version store schedule sensor reading valve report document index query "
    "cluster node engine budget invoice manual policy account keeper harbour gauge battery signal window season inspection"
)
_EN_VERBS: Final = "checks updates records removes copies explains requires supports awaits submits verifies replaces"


def chinese(characters: int, *, seed: int = 1) -> Iterator[str]:
    """Yield paragraphs of four to seven sentences, in all so many characters or slightly more."""
    drawn, nouns, verbs = random.Random(seed), _ZH.split(), _ZH_VERBS.split()
    count = made = 0
    while made < characters:
        sentences = []
        for _ in range(drawn.randint(4, 7)):
            count += 1
            parts = [f"{drawn.choice(nouns)}{drawn.choice(verbs)}{drawn.choice(nouns)}" for _ in range(drawn.randint(2, 6))]
            sentences.append(f"第{count}条，{'，'.join(parts)}{drawn.choice('。。。。！？')}")
        paragraph = "".join(sentences)
        made += len(paragraph)
        yield paragraph


def english(characters: int, *, seed: int = 1) -> Iterator[str]:
    """Yield paragraphs as :func:`chinese` does."""
    drawn, nouns, verbs = random.Random(seed), _EN.split(), _EN_VERBS.split()
    count = made = 0
    while made < characters:
        sentences = []
        for _ in range(drawn.randint(4, 7)):
            count += 1
            parts = [
                f"the {drawn.choice(nouns)} {drawn.choice(verbs)} the {drawn.choice(nouns)} of the {drawn.choice(nouns)}"
                for _ in range(drawn.randint(1, 4))
            ]
            sentences.append(f"In case {count} {', and '.join(parts)}{drawn.choice('....!?')}")
        paragraph = " ".join(sentences)
        made += len(paragraph)
        yield paragraph


def markdown(path: Path, paragraphs: Iterator[str]) -> None:
    """Write paragraphs with a heading before each tenth."""
    parts = []
    for number, paragraph in enumerate(paragraphs):
        if number % 10 == 0:
            parts.append(f"## {number // 10 + 1} {paragraph[:12]}")
        parts.append(paragraph)
    path.write_text("\n\n".join(parts) + "\n")


def long_and_short(paragraphs: Iterator[str], *, seed: int = 1) -> Iterator[str]:
    """Join paragraphs by one to six: of the length of a note, and of a page of prose or law."""
    drawn = random.Random(seed)
    while joined := list(islice(paragraphs, drawn.randint(1, 6))):
        yield ("" if not joined[0].isascii() else " ").join(joined)


def chinese_pdf(path: Path, *, pages: int, seed: int = 1) -> None:
    """Write a Chinese PDF of so many pages."""
    _pdf(path, chinese((pages + 1) * LINE * LINES * 2, seed=seed), pages=pages, title="第{}章 管理手册")


def english_pdf(path: Path, *, pages: int) -> None:
    """Write an English PDF of so many pages."""
    _pdf(path, english((pages + 1) * LINE * LINES * 4), pages=pages, title="Part {} of the handbook")


def _pdf(path: Path, paragraphs: Iterator[str], *, pages: int, title: str) -> None:
    """Write chapters of five pages: a large heading, then whole paragraphs for as long as they fit."""
    made: list[PdfPage] = []
    for chapter in range(pages // _CHAPTER_PAGES):
        lines = [(16.0, title.format(chapter + 1))]
        for paragraph in paragraphs:
            rows = [(11.0, row) for row in _rows(paragraph)]
            if len(lines) + len(rows) > _CHAPTER_PAGES * LINES:
                break
            lines += rows
        made += [PdfPage(lines[start : start + LINES]) for start in range(0, _CHAPTER_PAGES * LINES, LINES)]
    path.write_bytes(make_pdf(made))


def _rows(paragraph: str) -> list[str]:
    """Return the lines as set: Chinese is cut at any character, English at spaces."""
    if paragraph.isascii():
        return textwrap.wrap(paragraph, 2 * LINE)
    return [paragraph[start : start + LINE] for start in range(0, len(paragraph), LINE)]

"""Render ``tide-tables.xlsx`` and ``observers-evening.zh.pptx``.

Run it where openpyxl and python-pptx are installed (they are no dependencies of the project)::

    python -m venv /tmp/render && /tmp/render/bin/pip install 'openpyxl>=3.1,<4' 'python-pptx>=1,<2'
    /tmp/render/bin/python examples/documents/src/render_office.py

The output depends on this file and on the versions of the two alone: no date, no random id. Both have what people make: a
title above a table, cells over several rows, percentages and dates, a hidden sheet; bullets, a table, a chart, notes and a
hidden slide.
"""

import datetime
import io
import re
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pptx
from openpyxl.styles import Font
from pptx.chart.data import CategoryChartData
from pptx.enum.chart import XL_CHART_TYPE
from pptx.util import Cm

FOLDER = Path(__file__).parent.parent
MADE = datetime.datetime(2026, 1, 5, 9, 0, 0)  # noqa: DTZ001 - what both formats keep


def workbook() -> Any:
    """Return the tables of the tide station."""
    book = openpyxl.Workbook()
    book.properties.creator = "The processing-tasks authors"
    book.properties.created = book.properties.modified = MADE
    sheet = book.active
    sheet.title = "Springs 2025"
    sheet.append(["Highest water of each spring tide, metres above chart datum"])
    sheet.merge_cells("A1:E1")
    sheet.append([])
    sheet.append(["Season", "Date", "Time", "Height", "Share of the range"])
    rows = [
        ("Winter", datetime.date(2025, 1, 31), datetime.time(12, 40), 4.62, 0.94),
        (None, datetime.date(2025, 3, 1), datetime.time(13, 5), 4.88, 1),
        ("Summer", datetime.date(2025, 6, 26), datetime.time(1, 25), 4.31, 0.865),
        (None, datetime.date(2025, 8, 11), datetime.time(14, 10), 4.57, 0.92),
        ("Autumn", datetime.date(2025, 10, 8), datetime.time(12, 55), 4.93, 1.01),
    ]
    for row in rows:
        sheet.append(row)
        for cell, shown in zip(sheet[sheet.max_row][1:], ("yyyy-mm-dd", "hh:mm", "0.00", "0.0%"), strict=True):
            cell.number_format = shown
    for cell in sheet[3]:
        cell.font = Font(bold=True)
    sheet.merge_cells("A4:A5")
    sheet.merge_cells("A6:A7")
    gauges = book.create_sheet("Gauges")
    for row in (
        ("Gauge", "Model", "Installed", "Interval of checks", "Spare parts"),
        ("Stilling well", "Kestrel FW-3", 1921, "each Monday", "floats and pens in the blue chest"),
        ("Radar sensor", "Lumen R80", 2004, "each quarter", "one head, at the harbour office"),
        ("Pressure cell", "Tarn P2", 2019, "each spring", "none: order nine weeks ahead"),
    ):
        gauges.append(row)
    codes = book.create_sheet("Codes")
    codes.append(["for the macro, not for readers"])
    codes.sheet_state = "hidden"
    return book


def presentation() -> Any:
    """Return the slides of an evening for observers."""
    deck = pptx.Presentation()
    deck.core_properties.author = "The processing-tasks authors"
    first = deck.slides.add_slide(deck.slide_layouts[0])
    first.shapes.title.text = "观潮员之夜"
    first.placeholders[1].text = "灰港验潮站，二〇二六年一月"
    rules = deck.slides.add_slide(deck.slide_layouts[1])
    rules.shapes.title.text = "读数的三条规矩"
    frame = rules.placeholders[1].text_frame
    frame.text = "先看钟，再看水尺"
    for text, level in (("每次读三遍，取中间的一个", 0), ("浪大于半米时读五遍", 1), ("涂改的数字要签名", 0)):
        paragraph = frame.add_paragraph()
        paragraph.text, paragraph.level = text, level
    rules.notes_slide.notes_text_frame.text = "讲到这里请传看一九三七年那本写错的日志。"
    duty = deck.slides.add_slide(deck.slide_layouts[5])
    duty.shapes.title.text = "值班表"
    table = duty.shapes.add_table(4, 3, Cm(2), Cm(5), Cm(20), Cm(6)).table
    for row, values in enumerate(
        (
            ("星期", "值班员", "电话分机"),
            ("星期一", "林素", "四〇一"),
            ("星期四", "何远山", "四〇六"),
            ("星期六", "轮流", "四一五"),
        )
    ):
        for column, value in enumerate(values):
            table.cell(row, column).text = value
    surges = deck.slides.add_slide(deck.slide_layouts[5])
    surges.shapes.title.text = "风暴潮次数"
    data = CategoryChartData()
    data.categories = ["二〇二三年", "二〇二四年", "二〇二五年"]
    data.add_series("高于五米", (2, 1, 4))
    data.add_series("高于五米半", (0, 0, 1))
    surges.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, Cm(2), Cm(5), Cm(20), Cm(11), data)
    hidden = deck.slides.add_slide(deck.slide_layouts[5])
    hidden.shapes.title.text = "备用：旧的值班表"
    hidden._element.set("show", "0")
    return deck


def write(made: Any, target: Path) -> None:
    """Write a file without the times of today."""
    buffer = io.BytesIO()
    made.save(buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            content = source.read(name)
            # Of a chart, the values that are drawn remain, and the workbook to edit them goes: it has the time in it.
            if name == "docProps/thumbnail.jpeg" or "embeddings/" in name:
                continue
            if name.endswith(".rels"):
                content = re.sub(rb"<Relationship [^>]*(?:thumbnail|embeddings)[^>]*/>", b"", content)
            elif "charts/" in name:
                content = re.sub(rb"<c:externalData.*?</c:externalData>", b"", content, flags=re.DOTALL)
            elif name == "docProps/core.xml":
                content = re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+Z", MADE.strftime("%Y-%m-%dT%H:%M:%SZ").encode(), content)
            archive.writestr(zipfile.ZipInfo(name, MADE.timetuple()[:6]), content, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    write(workbook(), FOLDER / "tide-tables.xlsx")
    write(presentation(), FOLDER / "observers-evening.zh.pptx")

"""docs/reference tells everything that can be set or asked, and fails where something has no description."""

import ast
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATE: dict[str, Any] = runpy.run_path(str(ROOT / "docs/generate.py"))


def test_every_part_of_the_gateway_is_in_the_page_of_the_api() -> None:
    main = ast.parse((ROOT / "operator/task_gateway/__main__.py").read_text(encoding="utf-8"))
    [composed] = [
        node.value or node
        for node in ast.walk(main)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "parts"
    ]
    calls = {node.func.id for node in ast.walk(composed) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    of_parts = {
        type(route.handler.__self__).__name__ for route in GENERATE["operations"]() if hasattr(route.handler, "__self__")
    }
    assert {"Batches", "Logs", "Vectors", "Callbacks", "Knowledge", "Statistics"} <= of_parts
    assert {call for call in calls if call[0].isupper()} <= of_parts
    page = (ROOT / "docs/reference/rest.md").read_text(encoding="utf-8")
    assert all(f"\n### {route.method} {route.path}\n" in page for route in GENERATE["operations"]())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("max_items of `a|b` | [x] <y> *z*", "max_items of `a\\|b` \\| \\[x] \\<y> \\*z\\*"),
        ("``a``\n  and _b_", "`a` and \\_b\\_"),
    ],
)
def test_a_description_is_no_markup_but_for_its_code(text: str, shown: str) -> None:
    assert GENERATE["cell"](text) == shown


def test_a_value_without_a_description_is_told_by_its_path() -> None:
    good = "# Of the operator\noperator:\n  # -- How many\n  # there are\n  replicas: 2\n"
    page = "".join(GENERATE["values"](good))
    assert "## operator\n\nOf the operator\n" in page
    assert "| `operator.replicas` | `2` | How many there are |" in page
    with pytest.raises(LookupError, match=r"operator\.limits has no description.*values\.yaml"):
        "".join(GENERATE["values"](good + "  limits: {}\n"))


def test_a_recording_becomes_a_picture_in_which_lines_come_when_they_came() -> None:
    picture = GENERATE["draw"]("0.0\t$ kubectl get ptask -w\n15.0\ta<b   Completed\n30.0\tlast\n")
    root = ElementTree.fromstring(picture)
    texts = root.findall("{*}text")
    assert [text.text for text in texts] == ["$ kubectl get ptask -w", "a<b   Completed", "last"]
    assert [text.find("{*}set").get("end") for text in texts] == ["0.00s", "7.50s", "15.00s"]  # type: ignore[union-attr]
    assert "href" not in picture, "loads nothing"

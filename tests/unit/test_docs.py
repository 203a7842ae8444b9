"""What the pages say is so: the files and functions that they name exist, and every reason is explained."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from task_contract.errors import TaskError
from task_contract.models import Phase

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = {"client", "crds", "devstack", "docs", "examples", "helm", "job_runner", "manifests", "operator", "tests", ".ci"}
"""Inline code that begins with one of these and a slash is a path."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def tokens(page: Path) -> list[Token]:
    """Return all tokens of a page, those inside paragraphs and cells too."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        found += [token, *(token.children or [])]
    return found


def named(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, name in it or nothing) for everything in a page that names a part of this repository."""
    for token in tokens(page):
        if token.type != "code_inline" or not re.fullmatch(r"[\w./-]+(:[A-Za-z_][\w.]*)?", token.content):
            continue
        path, _, name = token.content.partition(":")
        # tasks.zzdsj.io/v1 and processingtasks/status have slashes too.
        if path.partition("/")[0] in FOLDERS and "/" in path:
            yield path, name


@cache
def definitions(path: Path) -> frozenset[str]:
    """Return the functions, classes, methods and variables of a module, as `function` and `Class.method`."""

    def of(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        yield prefix + target.id

    return frozenset(of(ast.parse(path.read_text(encoding="utf-8")).body))


@pages
def test_every_file_and_function_that_is_named_exists(page: Path) -> None:
    wrong = []
    for path, name in named(page):
        file = ROOT / path
        if not file.exists() or (name and name not in definitions(file)):
            wrong.append(f"{path}:{name}" if name else path)
    assert not wrong, f"{page.name} names what is not there: {', '.join(wrong)}; correct the page"


@pages
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = {str(token.attrs["href"]) for token in tokens(page) if token.type == "link_open"}
    files = {link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link) and not link.startswith("#")}
    assert not (missing := [file for file in files if not (page.parent / file).exists()]), missing


def test_the_walkthrough_goes_through_every_part() -> None:
    paths = {path for path, name in named(ROOT / "docs/walkthrough.md") if name}
    assert {path.partition("/")[0] for path in paths} >= {"crds", "operator", "job_runner"}
    assert len(paths) > 20, "names are no longer recognised"


CAMEL = r"[A-Z][A-Za-z]*[a-z][A-Za-z]*"


def reasons_of_the_contract() -> set[str]:
    found, todo = set(), [TaskError]
    while todo:
        error = todo.pop()
        found.add(error.reason)
        todo += error.__subclasses__()
    return found


def reasons_of_the_operator() -> set[str]:
    """Return what the modules that end attempts and waits call them: every word in CamelCase but phases and conditions."""
    words = set()
    for module in ("controller", "reconcile", "verdict", "waits"):
        tree = ast.parse((ROOT / f"operator/task_operator/{module}.py").read_text(encoding="utf-8"))
        words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    no_reasons = {*Phase, "Ready", "Succeeded", "Stalled", "Reconciling", "Deleted"} - {Phase.CANCELED}
    return {word for word in words if re.fullmatch(CAMEL, word)} - no_reasons


def test_troubleshooting_explains_every_reason_and_no_other() -> None:
    explained = set()
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    for row in rows:
        explained |= set(re.findall(f"`({CAMEL})`", row))
    known = reasons_of_the_contract() | reasons_of_the_operator()
    of_kubernetes = {"CreateContainerConfigError"}  # of many that the kubelet has, the one that is met
    assert explained - of_kubernetes == known

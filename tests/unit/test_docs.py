"""What the pages say is so: the files and functions that they name exist, and every reason is explained."""

import ast
import itertools
import re
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from task_contract.errors import TaskError
from task_contract.models import Phase
from tests.docs.blocks import (
    ELSEWHERE,
    IN_THEIR_OWN_WAY,
    LANGUAGES,
    ON_THE_EXAMPLES,
    PAGES,
    ROOT,
    SAYS,
    blocks,
    commands,
    tokens,
)

FOLDERS = {"client", "crds", "devstack", "docs", "examples", "helm", "job_runner", "manifests", "operator", "tests", ".ci"}
"""Inline code that begins with one of these and a slash is a path."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def part_of_the_repository(code: str) -> tuple[str, str] | None:
    """Return (path, name in it or nothing) for inline code that names a part of this repository."""
    if not re.fullmatch(r"[\w./-]+(:[A-Za-z_][\w.]*)?", code):
        return None
    path, _, name = code.partition(":")
    path = re.sub(r"/[A-Z]+(/.*)?$", "", path)  # a placeholder, as in tests/data/NAME
    # tasks.zzdsj.io/v1 and processingtasks/status have slashes too.
    return (path, name) if path.partition("/")[0] in FOLDERS and "/" in path else None


def named(page: Path) -> Iterator[tuple[str, str]]:
    """Yield what a page names of this repository."""
    for token in tokens(page):
        if token.type == "code_inline" and (part := part_of_the_repository(token.content)):
            yield part


def exists(path: str, name: str) -> bool:
    return (ROOT / path).exists() and (not name or name in definitions(ROOT / path))


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
    wrong = [f"{path}:{name}" if name else path for path, name in named(page) if not exists(path, name)]
    assert not wrong, f"{page.name} names what is not there: {', '.join(wrong)}; correct the page"


def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as a code host and the site make them."""
    found: list[str] = []
    for heading, text in itertools.pairwise(tokens(page)):
        if heading.type == "heading_open":
            words = "".join(part.content for part in text.children or [])
            found.append(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    return frozenset(f"{name}-{count}" if (count := found[:at].count(name)) else name for at, name in enumerate(found))


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    links = {str(token.attrs["href"]) for token in tokens(page) if token.type == "link_open"}
    wrong = []
    for link in sorted(link for link in links if not re.match(r"[a-z]+:", link)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong, f"{page.relative_to(ROOT)} has links that lead nowhere: {', '.join(wrong)}"


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    navigation = runpy.run_path(str(ROOT / "docs/conf.py"))["NAVIGATION"]
    named = [page for under in navigation.values() for page in under]
    pages = {str(page.relative_to(ROOT).with_suffix("")) for page in PAGES}
    missing = {
        page for page in pages - {"README"} if not page.startswith(("docs/adr/0", "docs/runbooks/T", "examples/documents/"))
    } - {*named}
    assert not missing, f"add to NAVIGATION in docs/conf.py: {', '.join(sorted(missing))}"
    assert len(named) == len({*named})
    assert all((ROOT / f"{page}.md").exists() for page in named)


def test_the_walkthrough_goes_through_every_part() -> None:
    paths = {path for path, name in named(ROOT / "docs/walkthrough.md") if name}
    assert {path.partition("/")[0] for path in paths} >= {"crds", "operator", "job_runner"}
    assert len(paths) > 20, "names are no longer recognised"


@pages
def test_every_block_says_what_it_is(page: Path) -> None:
    """So that nothing that is there to be typed passes for a drawing."""
    unknown = [str(block) for block in blocks(page) if block.language not in LANGUAGES]
    assert not unknown, f"name the language, one of {sorted(LANGUAGES)}, of {', '.join(unknown)}"


def test_every_command_of_a_page_is_run_by_a_test_or_covered_by_one_that_is_named() -> None:
    followed = {*ON_THE_EXAMPLES, *IN_THEIR_OWN_WAY}
    for page in PAGES:
        for block in commands(page):
            run = block.language != "console" and block.page in followed
            assert block.elsewhere or run, f"write a test in tests/docs that follows {block}"
    for what in ELSEWHERE.values():
        named = [part_of_the_repository(code) for code in re.findall(r"`(.+?)`", what)]
        assert named, f"say by name what covers it: {what}"
        assert all(part and exists(*part) for part in named), f"this is not there: {what}"


def test_the_tables_name_blocks_that_are_there() -> None:
    known = [block for page in PAGES for block in blocks(page)]
    for key in (*ELSEWHERE, *SAYS):
        assert any(block.begins(*key) for block in known), f"no block begins as {key}"


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
    for module in ("controller", "dependencies", "dispatch", "reconcile", "verdict", "waits"):
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

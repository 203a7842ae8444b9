"""The documentation site: the Markdown pages of this repository as they stand, made by Sphinx.

``make docs`` builds it into build/site, which is read without a server and without a network. The source is the whole
repository, so that README, pages, decisions and examples keep the links that they have on a code host. A link or an anchor
that leads nowhere is an error, and so is a page that :data:`NAVIGATION` lacks (ADR 0051).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT: Final = Path(__file__).resolve().parent.parent

_PAGES: Final = {
    "Start": "quickstart concepts install kustomize images migration comparison",
    "Use": "tasks pools schedules cli client gateway callbacks api-routing sources quality",
    "Reference": "reference/processingtask reference/workerpool reference/processingschedule reference/rest reference/ptask "
    "reference/settings reference/values metrics",
    "Operate": "operating scaling security troubleshooting runbooks/README performance ../SECURITY "
    "../manifests/argocd/README",
    "Understand": "architecture operator pipeline walkthrough adr/README ../examples/documents/README",
    "Project": "../CONTRIBUTING ../CHANGELOG",
}
NAVIGATION: Final = {
    heading: [page.removeprefix("../") if page.startswith("../") else f"docs/{page}" for page in pages.split()]
    for heading, pages in _PAGES.items()
}
"""Pages by the heading in the sidebar that they stand under, in their order; decisions and runbooks follow their README."""

# Names that Sphinx reads.
project = "processing-tasks"
html_title = "processing-tasks"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = [f"{page}.md" for pages in NAVIGATION.values() for page in pages] + ["README.md", "docs/**.md"]
exclude_patterns = ["build", ".venv"]
myst_heading_anchors = 4
nitpicky = True
# A command beside what it prints is in no language.
suppress_warnings = ["misc.highlighting_failure"]
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_permalinks_icon = "#"


def with_navigation(name: str, source: list[str]) -> None:
    """Add to the source of the first page what the sidebar shows, which a code host would print as it stands."""
    trees = {}
    if name == root_doc:
        trees = NAVIGATION
    elif name in {"docs/adr/README", "docs/runbooks/README"}:
        folder = (ROOT / name).parent
        trees = {"": [f"docs/{folder.name}/{path.stem}" for path in sorted(folder.glob("[0T]*.md"))]}
    for caption, pages in trees.items():
        options = "\n".join([":hidden:", *([f":caption: {caption}"] if caption else [])])
        entries = "\n".join(f"/{page}" for page in pages)
        source[0] += f"\n```{{toctree}}\n{options}\n\n{entries}\n```\n"


def begin_at_the_readme(app: Sphinx, exception: Exception | None) -> None:
    """Let whoever opens the folder come to the first page."""
    if exception is None:
        (Path(app.outdir) / "index.html").write_text(
            f'<!doctype html><meta charset="utf-8"><title>{project}</title>'
            f'<meta http-equiv="refresh" content="0; url={root_doc}.html"><a href="{root_doc}.html">{project}</a>\n'
        )


def only_of_this_folder(app: Sphinx, exception: Exception | None) -> None:
    """Refuse a page that would load something from elsewhere: the site is read where there is no network."""
    loads = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']*""")
    for page in sorted(Path(app.outdir).rglob("*.html")) if exception is None else ():
        if found := loads.search(page.read_text(encoding="utf-8")):
            raise ValueError(f"{page.name} loads from the network: {found[0]}")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the above to Sphinx."""
    app.connect("source-read", lambda _, name, source: with_navigation(name, source))
    app.connect("build-finished", begin_at_the_readme)
    app.connect("build-finished", only_of_this_folder)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The code blocks of the pages, and what is known of those that no test of this folder runs.

A block of the language `sh` is run as it stands, in the order of its page, by tests/docs/test_commands.py, unless
:data:`ELSEWHERE` says what covers it. tests/unit/test_docs.py holds the tables against the pages: a new page with
commands, an entry without its block and a block without a language fail there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
ON_THE_EXAMPLES = ("README.md", "docs/quickstart.md", "docs/troubleshooting.md", "docs/tasks.md")
"""Pages whose commands run on an installation with the example tasks at their ends."""
IN_THEIR_OWN_WAY = (
    "docs/install.md",
    "docs/kustomize.md",
    "docs/pipeline.md",
    "docs/images.md",
    "docs/client.md",
    "CONTRIBUTING.md",
)
"""Pages that a test of their own follows; tests/integration/test_client_page.py that of the client."""
LANGUAGES = {"sh", "console", "yaml", "json", "python", "sql", "text"}
"""`sh` and `python` are run. `console` shows commands with what they print, and ELSEWHERE says who prints it. `yaml` that
begins with `# NAME.yaml` becomes a file of that name. `sql` is run by
tests/integration/test_operator_history.py and test_callbacks.py."""

ELSEWHERE = {
    ("README.md", "make demo"): "`.ci/run` runs both on every commit",
    ("docs/quickstart.md", "make demo"): "`.ci/run` runs it on every commit",
    ("README.md", "kubectl apply -n knowledge -f manifests"): "`devstack/demo.py:run` prints it",
    (
        "docs/gateway.md",
        "curl -s http://processing-tasks-gateway",
    ): "`tests/integration/gateway/test_gateway_tasks.py:test_each_change_has_an_audit_line` sends one",
    (
        "README.md",
        "pip install 'processing-tasks[cli]'",
    ): "`tests/e2e/test_cli.py:test_a_document_from_the_command_line_to_the_knowledge_base` runs these commands",
    (
        "docs/cli.md",
        "ptask submit --kb",
    ): "`tests/e2e/test_cli.py:test_a_document_from_the_command_line_to_the_knowledge_base` runs these commands",
    ("CONTRIBUTING.md", "make lint"): "`.ci/run` runs the same",
    (
        "docs/images.md",
        "mmdebstrap",
    ): "`devstack/images.py:base` makes the base with the same options, for every test on a pod",
    (
        "docs/install.md",
        "make demo CLUSTER=kind",
    ): "`tests/integration/test_providers.py` runs both blocks, with stand-ins of kind and Docker",
    (
        "docs/install.md",
        "make demo CLUSTER=current",
    ): "`tests/integration/test_providers.py` runs it, line by line",
    ("docs/images.md", "buildah bud --volume"): "`devstack/images.py:build` builds so wherever there is a CA bundle",
    (
        "docs/security.md",
        "kubectl apply -k manifests/policies",
    ): "`tests/integration/test_policies.py:policies` applies them",
    (
        "docs/security.md",
        "kubectl -n knowledge create rolebinding prioritize",
    ): "`tests/integration/test_policies.py:test_high_is_for_who_may_prioritize` grants it with the same command",
    (
        "docs/tasks.md",
        "kubeconform -strict",
    ): "`tests/integration/test_manifests.py:test_the_other_manifests_conform_to_the_schemas` has it compare them",
    ("docs/callbacks.md", "from task_contract.webhooks"): "`tests/unit/test_webhooks.py` runs it",
    ("docs/callbacks.md", "python -m task_operator callbacks"): "`tests/integration/test_callbacks.py` runs the same",
    (
        "docs/quality.md",
        "python -m job_runner search",
    ): "`tests/integration/runner/test_runner_pipeline.py:test_the_command_line_from_a_file_to_an_answer` runs it",
    (
        "docs/quality.md",
        "python -m job_runner quality",
    ): "`tests/integration/runner/test_runner_pipeline.py:test_the_command_line_from_a_file_to_an_answer` runs it",
    (
        "examples/documents/README.md",
        "python -m venv",
    ): "`tests/unit/test_examples.py` holds the rendered files against their source",
}
"""(page, how the block's first line begins) → what covers it, by name."""

SAYS = {
    ("README.md", "kubectl apply -n knowledge -f - <<"): ["condition met"],
    ("README.md", "from datetime"): ["chunks="],
    ("docs/install.md", "kubectl -n knowledge wait ptask/health"): ["handbook", "Completed", "broken"],
    ("docs/install.md", "kubectl get ptask,wpool,psched -A"): ["deleted"],
    ("docs/pipeline.md", "export TASKS_POSTGRES_URL"): [
        "elasticsearch  healthy",
        '"outcome":"Succeeded"',
        "second Tuesday",
        "hold exactly these",
        "are whole in both stores, 0 entered",
    ],
    ("docs/quickstart.md", "kubectl wait -n knowledge ptask/quick-start "): [
        "condition met",
        '"documents":1',
        '"milvusCount":',
    ],
    ("docs/quickstart.md", "kubectl wait -n knowledge ptask/quick-start-missing"): ["DocumentNotFound: cannot"],
    ("docs/tasks.md", "kubectl get ptask -n knowledge -w"): ["handbook", "condition met", "broken", "patched"],
    ("docs/troubleshooting.md", "kubectl get ptask --output=wide"): ["DocumentUnreadable"],
    ("docs/troubleshooting.md", "kubectl get ptask broken"): [
        '"reason":"DocumentUnreadable"',
        "cannot read /data/broken.pdf",
    ],
    ("docs/troubleshooting.md", "kubectl logs"): ["DocumentUnreadable"],
    ("docs/troubleshooting.md", "kubectl --namespace=processing-tasks-system"): ["Running", "operator started"],
    ("docs/troubleshooting.md", "kubectl create"): [
        "milvus\ttrue",
        "elasticsearch\ttrue",
        "postgres\ttrue",
        "documents\ttrue",
    ],
}
"""(page, how the block's first line begins) → what its output must hold."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    """Relative to the repository."""
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} `{self.text.strip().splitlines()[0]}`"

    def begins(self, page: str, beginning: str) -> bool:
        """Whether this is the block that a table names."""
        return (
            self.page == page
            and self.language in {"sh", "python", "console"}
            and self.text.lstrip("$ ").startswith(beginning)
        )

    @property
    def elsewhere(self) -> str | None:
        """What covers it instead, if it is not run."""
        return next((what for key, what in ELSEWHERE.items() if self.begins(*key)), None)

    @property
    def says(self) -> list[str]:
        """What its output must hold."""
        return next((what for key, what in SAYS.items() if self.begins(*key)), [])

    @property
    def file(self) -> str | None:
        """The name of the file that it shows."""
        found = re.match(r"# (\S+\.yaml)\n", self.text) if self.language == "yaml" else None
        return found[1] if found else None


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    """Return all tokens of a page, those inside paragraphs and cells too."""
    found: list[Token] = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        found += [token, *(token.children or [])]
    return tuple(found)


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order, those inside lists too."""
    for token in tokens(page):
        if token.type in {"fence", "code_block"}:
            line = token.map[0] + 1 if token.map else 0
            yield Block(str(page.relative_to(ROOT)), line, token.info.strip(), token.content)


def commands(page: Path) -> list[Block]:
    """Return the blocks of a page that are there to be typed."""
    return [block for block in blocks(page) if block.language in {"sh", "python", "console"}]

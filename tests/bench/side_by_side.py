"""The same files through LangChain's loaders and splitter, llama-index's ingestion pipeline, and ours.

Their libraries are in an environment of their own in the cache, made from `requirements/bench.txt`: nothing of the product
and of its tests depends on them.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from devstack.cache import cached
from devstack.process import run
from devstack.progress import step
from tests.bench import corpus
from tests.bench.measurement import Measurement
from tests.bench.usage import Used, used_by

ROOT: Final = Path(__file__).resolve().parents[2]
LOCK: Final = ROOT / "requirements/bench.txt"
SCRIPT: Final = Path(__file__).with_name("side_by_side_run.py")
SYSTEMS: Final = {
    "ours": "our parser and splitter, 1,000 characters, overlap 200",
    "langchain": "PyPDFLoader or TextLoader, RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=200)",
    "langchain-zh": "the same with Chinese separators, kept at the end",
    "llama-index": "SimpleDirectoryReader, IngestionPipeline with SentenceSplitter() and its defaults (1,024 tokens)",
}


def environment() -> Path:
    """Return the interpreter of the environment, made if it is not there. Raises DevstackError."""
    uv = Path(sys.executable).with_name("uv")

    def build(folder: Path) -> None:
        with step("installing LangChain and llama-index for the comparison (the first time: 100 MB to download)"):
            run([uv, "venv", "--relocatable", "--python", sys.executable, folder], doing="make an environment")
            # Copies, not links: llama-index's library of sentences (nltk) reads no file that has a second name.
            # Compiled, as pip does: else the first run of each would pay for it.
            options = ["--require-hashes", "--link-mode=copy", "--compile-bytecode", f"--python={folder}/bin/python"]
            install: list[str | Path] = [uv, "pip", "install", *options, "--requirements", LOCK]
            run(install, doing="install LangChain and llama-index")

    return cached("bench", [LOCK, Path(__file__)], build, keep=1) / "bin/python"


def measure(folder: Path) -> list[Measurement]:
    """Write the files into a folder and read each with each system."""
    python = environment()
    files = _files(folder)
    measured: list[Measurement] = []
    for file, what in files.items():
        found = {system: _used(python, system, folder / file) for system in SYSTEMS}
        for system, used in found.items():
            answer = used.answer
            how = f"{what}; {SYSTEMS[system]}; {answer['chunks']} chunks, {answer['characters']} characters in all"
            share = 100 * answer["mid_sentence"] / max(answer["chunks"], 1)
            print(f"      {file} {system}: {used.cpu:.1f} CPU-s, {used.memory:.0f} MB, {share:.0f} %, {answer}", flush=True)
            for quantity, value, unit in (
                ("whole process", used.cpu, "CPU-s"),
                ("most memory", used.memory, "MB"),
                ("chunks that end mid-sentence", share, "%"),
            ):
                measured.append(Measurement(metric=f"{file}, {system}: {quantity}", value=value, unit=unit, how=how))
    return measured


def _files(folder: Path) -> dict[str, str]:
    corpus.chinese_pdf(folder / "zh.pdf", pages=300)
    corpus.english_pdf(folder / "en.pdf", pages=300)
    (folder / "zh.md").write_text("\n\n".join(corpus.long_and_short(corpus.chinese(1_000_000))))
    (folder / "en.md").write_text("\n\n".join(corpus.long_and_short(corpus.english(2_000_000))))
    return {
        "zh.pdf": "300 pages of Chinese",
        "en.pdf": "300 pages of English",
        "zh.md": "a million Chinese characters in paragraphs of 100 to 2,000",
        "en.md": "two million English characters in paragraphs of 300 to 3,000",
    }


def _used(python: Path, system: str, file: Path) -> Used:
    if system == "ours":
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'crds'}"}
        return used_by([sys.executable, SCRIPT, system, file], environment=environment, cwd=ROOT)
    # Nothing is asked of the network; -I: neither this project's folder nor its environment is on the path.
    offline = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "HF_HUB_OFFLINE": "1"}
    command: Sequence[str | Path] = [python, "-I", SCRIPT, system, file]
    return used_by(command, environment=offline, cwd=file.parent)

"""One file through one system, in a process of its own: ``python side_by_side_run.py SYSTEM FILE``; prints a line of JSON.

Only the system that is asked for is imported: the others' libraries are in another environment, this project's in neither.
"""

import json
import re
import resource
import sys
import warnings
from collections.abc import Callable

CHINESE_SEPARATORS = ["\n\n", "\n", "。", "！", "？", "；", ". ", "! ", "? ", "，", " ", ""]
_SENTENCE_END = re.compile(r"[。！？；….!?][\"'”’」』）】》)\]]*\Z")


def ours(path: str) -> list[str]:
    import asyncio
    from pathlib import Path

    from job_runner.fetch import opened
    from job_runner.parse import ParserLimits, parse
    from job_runner.split import SplitSettings, split

    async def read() -> list[str]:
        file = Path(path)
        limits = ParserLimits(memory_bytes=2**30, seconds=600, cpu_seconds=300, output_bytes=2**28)
        with opened(file.name, root=file.parent, max_bytes=2**30) as source:
            document = await parse(source, limits=limits, on_progress=lambda *_: None)
        return [chunk.text for chunk in split(document, SplitSettings())]

    return asyncio.run(read())


def langchain(path: str, separators: list[str] | None = None) -> list[str]:
    from langchain_community.document_loaders import PyPDFLoader, TextLoader
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    loader = PyPDFLoader(path) if path.endswith(".pdf") else TextLoader(path, encoding="utf-8")
    options = {} if separators is None else {"separators": separators, "keep_separator": "end"}
    splitter = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=200, **options)
    return [document.page_content for document in splitter.split_documents(loader.load())]


def llama_index(path: str) -> list[str]:
    from llama_index.core import SimpleDirectoryReader
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.node_parser import SentenceSplitter

    documents = SimpleDirectoryReader(input_files=[path]).load_data()
    nodes = IngestionPipeline(transformations=[SentenceSplitter()]).run(documents=documents)
    return [node.get_content() for node in nodes]


SYSTEMS: dict[str, Callable[[str], list[str]]] = {
    "ours": ours,
    "langchain": langchain,
    "langchain-zh": lambda path: langchain(path, CHINESE_SEPARATORS),
    "llama-index": llama_index,
}


def main(system: str, path: str) -> None:
    warnings.simplefilter("ignore")
    chunks = [chunk for chunk in SYSTEMS[system](path) if chunk.strip()]
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    middle = sum(not _SENTENCE_END.search(chunk.rstrip()) for chunk in chunks)
    answer = {
        "chunks": len(chunks),
        "characters": sum(map(len, chunks)),
        "mid_sentence": middle,
        "cpu": sum(one.ru_utime + one.ru_stime for one in usage),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])

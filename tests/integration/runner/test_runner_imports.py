"""What the runner does not import, since each pod would pay for it: pandas, and readers of other kinds of files."""

import builtins
import json
import subprocess
import sys
from typing import Any

import pytest

from job_runner.without_pandas import without_pandas

pytestmark = pytest.mark.integration

NOWHERE = "http://127.0.0.1:9"


def imported(code: str) -> set[str]:
    """Return the names of all modules that a fresh process has imported after running CODE."""
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_a_connection_to_milvus_does_without_pandas() -> None:
    code = f"""
from job_runner import milvus
from task_contract.errors import StoreUnavailable
milvus.TIMEOUT = 0.1
try:
    milvus.connect({NOWHERE!r}, None)
except StoreUnavailable:
    pass
"""
    found = imported(code)
    assert "pymilvus.orm.schema" in found
    assert "pandas" not in found


def test_what_needs_pandas_has_it() -> None:
    code = """
from job_runner import milvus
milvus.load()
from pymilvus.orm import schema, types
assert not schema.is_valid_insert_data(1) and schema.is_valid_insert_data([])
assert "pandas" not in sys.modules
assert types.infer_dtype_bydata([1, 2]) is types.DataType.FLOAT_VECTOR
import pandas
frame = pandas.DataFrame({"id": [1]})
assert schema.is_valid_insert_data(frame) and schema.pd.DataFrame is pandas.DataFrame
assert schema.pd.isna(None)
fields = schema.construct_fields_from_dataframe(frame)
assert [(field.name, field.dtype) for field in fields] == [("id", types.DataType.INT64)]
"""
    assert "pandas" in imported(code)


def test_who_is_not_named_gets_what_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = builtins.__import__

    def watched(name: str, *arguments: Any) -> Any:
        asked.append(name)
        return object() if name == "pandas" else original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", watched)
    with without_pandas("pymilvus"):
        for importer in ("pymilvus.orm.schema", "pymilvus_of_others", "somebody", None):
            exec("import pandas", {"__name__": importer})
    assert asked.count("pandas") == 3
    assert builtins.__import__ is watched, "and afterwards it is as it was"
    with pytest.raises(ZeroDivisionError), without_pandas("pymilvus"):
        _ = 1 / 0
    assert builtins.__import__ is watched


def test_a_document_is_read_by_the_reader_of_its_kind_alone() -> None:
    code = """
import io
import job_runner.attempt, job_runner.parse_child
from job_runner.document import Kind
job_runner.parse_child.read(io.BytesIO(b"a"), kind=Kind.TEXT, name="a")
"""
    found = imported(code)
    assert "job_runner.readers.text" in found
    assert not {f"job_runner.readers.{name}" for name in ("docx", "xlsx", "html", "pdf", "mail")} & found
    assert not {"numpy", "pymilvus", "elasticsearch", "pandas"} & found


def test_the_libraries_of_an_analysis_are_imported_by_an_analysis_alone() -> None:
    found = imported("import job_runner.attempt, job_runner.analysis, job_runner.search_command")
    assert not {"rjieba", "rensa", "py3langid", "stopwordsiso", "numpy", "pymilvus", "elasticsearch"} & found

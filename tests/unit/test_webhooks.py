"""Signatures of callbacks, against the vectors that Standard Webhooks publishes with its libraries."""

import base64
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_contract.webhooks import WebhookRefused, parse_secrets, sign, verify
from tests.docs.blocks import ROOT, blocks

# standard-webhooks/standard-webhooks, libraries/*/test: the same in each of them
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MESSAGE_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
TIMESTAMP = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
OTHER = "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc="
KEYS = parse_secrets(SECRET)

HEADERS = {"webhook-id": MESSAGE_ID, "webhook-timestamp": str(TIMESTAMP), "webhook-signature": SIGNATURE}


def test_signing_gives_the_published_vector() -> None:
    assert sign(BODY, message_id=MESSAGE_ID, timestamp=TIMESTAMP, secrets=KEYS) == HEADERS


def test_without_a_secret_there_is_no_signature() -> None:
    assert "webhook-signature" not in sign(BODY, message_id="one", timestamp=TIMESTAMP, secrets=())


@pytest.mark.parametrize(
    ("changes", "later"),
    [
        pytest.param({}, 0, id="as published"),
        pytest.param({}, 299, id="almost too old"),
        pytest.param({}, -299, id="almost too new"),
        pytest.param({"webhook-signature": f"{OTHER} v2,{SIGNATURE[3:]} {SIGNATURE} {OTHER}"}, 0, id="one of several"),
    ],
)
def test_what_is_signed_and_young_is_believed(changes: dict[str, str], later: float) -> None:
    assert verify(BODY, HEADERS | changes, KEYS, now=TIMESTAMP + later) == MESSAGE_ID


def test_names_of_headers_may_have_any_case() -> None:
    assert verify(BODY, {name.title(): value for name, value in HEADERS.items()}, KEYS, now=TIMESTAMP) == MESSAGE_ID


@pytest.mark.parametrize(
    ("changes", "later", "message"),
    [
        pytest.param({"webhook-id": ""}, 0, "no header webhook-id", id="no id"),
        pytest.param({"webhook-timestamp": ""}, 0, "no header webhook-timestamp", id="no time"),
        pytest.param({"webhook-signature": ""}, 0, "no header webhook-signature", id="no signature"),
        pytest.param({"webhook-signature": OTHER}, 0, "none of the secrets", id="signed with another secret"),
        pytest.param({"webhook-signature": f"v2,{SIGNATURE[3:]}"}, 0, "none of the secrets", id="another version"),
        pytest.param({"webhook-signature": SIGNATURE[3:]}, 0, "none of the secrets", id="without a version"),
        pytest.param({"webhook-signature": "v1,é"}, 0, "none of the secrets", id="beyond ASCII"),
        pytest.param({"webhook-signature": f"{OTHER} " * 32 + SIGNATURE}, 0, "none of the secrets", id="too many"),
        pytest.param({"webhook-id": "msg_2"}, 0, "none of the secrets", id="another id"),
        pytest.param({"webhook-timestamp": str(TIMESTAMP + 1)}, 0, "none of the secrets", id="another time"),
        pytest.param({"webhook-timestamp": "now"}, 0, "no number of seconds", id="no time at all"),
        pytest.param({"webhook-timestamp": "-5"}, 0, "no number of seconds", id="a negative time"),
        pytest.param({"webhook-timestamp": "1" * 5000}, 0, "no number of seconds", id="an endless time"),
        pytest.param({"webhook-timestamp": "²"}, 0, "no number of seconds", id="a digit that int does not read"),
        pytest.param({}, 301, "in the past by 301 s", id="too old"),
        pytest.param({}, -301, "in the future by 301 s", id="too new"),
    ],
)
def test_anything_else_is_refused(changes: dict[str, str], later: float, message: str) -> None:
    with pytest.raises(WebhookRefused, match=message):
        verify(BODY, HEADERS | changes, KEYS, now=TIMESTAMP + later)


def test_a_changed_body_is_refused() -> None:
    with pytest.raises(WebhookRefused, match="none of the secrets"):
        verify(BODY + b" ", HEADERS, KEYS, now=TIMESTAMP)


def test_the_clock_is_that_of_the_machine() -> None:
    now = int(datetime.now(UTC).timestamp())
    assert verify(BODY, sign(BODY, message_id="one", timestamp=now, secrets=KEYS), KEYS) == "one"
    with pytest.raises(WebhookRefused, match="in the past"):
        verify(BODY, HEADERS, KEYS)


def test_nobody_is_believed_without_a_secret() -> None:
    with pytest.raises(ValueError, match="without a secret"):
        verify(BODY, HEADERS, ())


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("whsec_c2VjcmV0", (b"secret",)),
        ("plain words", (b"plain words",)),
        ("知识库", ("知识库".encode(),)),
        ("\n whsec_c2VjcmV0 \r\n\nold\n", (b"secret", b"old")),
    ],
)
def test_a_secret_has_a_key_a_line(text: str, keys: tuple[bytes, ...]) -> None:
    assert parse_secrets(text) == keys


@pytest.mark.parametrize("text", ["", " \n", "whsec_", "whsec_*", "good\nwhsec_é", "whsec_abc"])
def test_a_secret_without_a_key_is_an_error_that_does_not_show_it(text: str) -> None:
    with pytest.raises(ValueError, match="secret") as caught:
        parse_secrets(text)
    assert "good" not in str(caught.value)


Keys = st.lists(st.binary(min_size=1), min_size=1, max_size=3)


@given(body=st.binary(), before=Keys, after=Keys, common=st.binary(min_size=1))
def test_a_secret_that_both_sides_have_is_enough(
    body: bytes, before: list[bytes], after: list[bytes], common: bytes
) -> None:
    headers = sign(body, message_id="task-1", timestamp=TIMESTAMP, secrets=[*before, common])
    assert verify(body, headers, [*after, common], now=TIMESTAMP) == "task-1"


@given(key=st.binary(min_size=1))
def test_every_key_can_be_written_as_base64(key: bytes) -> None:
    assert parse_secrets(f"whsec_{base64.b64encode(key).decode()}") == (key,)


def test_the_receiver_of_the_page_believes_what_is_signed_and_nothing_else() -> None:
    [block] = [one for one in blocks(ROOT / "docs/callbacks.md") if one.language == "python"]
    page: dict[str, Any] = {}
    exec(block.text, page)
    now = int(datetime.now(UTC).timestamp())
    headers = sign(BODY, message_id="task-1", timestamp=now, secrets=KEYS)
    assert page["accept"](BODY, headers, f"{SECRET}\nold") == "task-1"
    assert page["accept"](BODY, headers, "another") is None

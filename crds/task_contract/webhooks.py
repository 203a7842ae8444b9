"""Signatures of callbacks as Standard Webhooks has them (https://www.standardwebhooks.com): HMAC-SHA256, symmetric.

The sender signs ``id.timestamp.body`` with every secret it knows, the receiver accepts a message that any of its secrets
fits: so a secret is replaced without a message being lost. A receiver in three lines::

    secrets = parse_secrets(os.environ["CALLBACK_SECRETS"])
    message_id = verify(await request.read(), request.headers, secrets)  # raises WebhookRefused
    ...  # a message_id that was seen before is the same message once more
"""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from typing import Final

ID_HEADER: Final = "webhook-id"
"""Stable over all deliveries of a message: what a receiver tells repetitions by."""
TIMESTAMP_HEADER: Final = "webhook-timestamp"
"""When this delivery was sent, in whole seconds since 1970."""
SIGNATURE_HEADER: Final = "webhook-signature"
"""Signatures separated by spaces, each with its version: ``v1,BASE64``."""

TOLERANCE: Final = 300.0
"""Seconds that the clocks of sender and receiver may differ, the time on the way included."""

_PREFIX: Final = "whsec_"
_VERSION: Final = "v1"
_MOST_SIGNATURES: Final = 32
"""So many are looked at: who sends more of them only wants to cost time."""


class WebhookRefused(ValueError):
    """A message that is not to be believed: unsigned, signed with another secret, changed, or old; it says which."""


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """Return the keys in a secret's text, one a line; the first is the newest.

    ``whsec_`` is followed by the key in base64; any other line is the key itself, as UTF-8. (The libraries of Standard
    Webhooks read a line without prefix as base64 too: give it a prefix where one of them receives.) Raises ValueError for a
    text without a key, and for one whose base64 is wrong; the message holds nothing of the secret.

    >>> parse_secrets("whsec_c2VjcmV0\\nan older one\\n")
    (b'secret', b'an older one')
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if not word:
            continue
        if word.startswith(_PREFIX):
            try:
                key = base64.b64decode(word.removeprefix(_PREFIX), validate=True)
            except (binascii.Error, ValueError):
                raise ValueError(f"line {number} of the secret: what follows whsec_ is no base64") from None
        else:
            key = word.encode()
        if not key:
            raise ValueError(f"line {number} of the secret: there is no key after whsec_")
        keys.append(key)
    if not keys:
        raise ValueError("the secret is empty: give it a key, whsec_ and base64")
    return tuple(keys)


def sign(body: bytes, *, message_id: str, timestamp: int, secrets: Sequence[bytes]) -> dict[str, str]:
    """Return the headers of a message: id, time (seconds since 1970), and a signature by each secret; none without one."""
    headers = {ID_HEADER: message_id, TIMESTAMP_HEADER: str(timestamp)}
    if secrets:
        signed = [f"{_VERSION},{_signature(body, message_id, str(timestamp), key)}" for key in secrets]
        headers[SIGNATURE_HEADER] = " ".join(signed)
    return headers


def verify(
    body: bytes,
    headers: Mapping[str, str],
    secrets: Sequence[bytes],
    *,
    now: float | None = None,
    tolerance: float = TOLERANCE,
) -> str:
    """Return the id of a message that one of the secrets has signed not long ago. Raises :class:`WebhookRefused`.

    ``body`` is what came over the wire, byte for byte; ``headers`` may have names in any case; ``now`` is in seconds since
    1970.
    """
    if not secrets:
        raise ValueError("cannot verify a message without a secret")
    given = {name.lower(): value for name, value in headers.items()}
    message_id, sent, signatures = (given.get(name, "") for name in (ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER))
    for name, value in ((ID_HEADER, message_id), (TIMESTAMP_HEADER, sent), (SIGNATURE_HEADER, signatures)):
        if not value:
            raise WebhookRefused(f"cannot believe the message: it has no header {name}")
    if not (sent.isascii() and sent.isdecimal() and len(sent) <= 15):
        raise WebhookRefused(f"cannot believe the message: {TIMESTAMP_HEADER} is no number of seconds")
    # Compared as numbers before the signature is looked at: an old message is refused as cheaply as it can be sent.
    age = (time.time() if now is None else now) - int(sent)
    if abs(age) > tolerance:
        raise WebhookRefused(
            f"cannot believe the message: {TIMESTAMP_HEADER} is {'in the past' if age > 0 else 'in the future'} by "
            f"{abs(age):.0f} s; is the clock right?"
        )
    expected = [_signature(body, message_id, sent, key).encode() for key in secrets]
    for entry in signatures.split(" ", _MOST_SIGNATURES)[:_MOST_SIGNATURES]:
        version, _, signature = entry.partition(",")
        if version == _VERSION and any(hmac.compare_digest(signature.encode(), one) for one in expected):
            return message_id
    raise WebhookRefused("cannot believe the message: none of the secrets fits its signature")


def _signature(body: bytes, message_id: str, timestamp: str, key: bytes) -> str:
    signed = f"{message_id}.{timestamp}.".encode() + body
    return base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()

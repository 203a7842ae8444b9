"""The forms of ``payload.filePath``: a path of the document volume, ``s3://bucket/key``, ``https://`` or ``http://``; of
``payload.prefix`` and ``payload.outputPath``; and of ``callback.url``.

The same patterns stand in the CRD, in RE2, and in the models. A URL carries neither user nor query: a specification is
kept by etcd and PostgreSQL and shown by kubectl, and a query is where signatures and tokens stand.
"""

import re
from typing import Final

HTTP_PATTERN: Final = r"^https?://([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[^?#\\]*)?$"
"""Host names in ASCII only (others in their xn-- form); the path may have any script and is encoded when it is asked for."""
S3_PATTERN: Final = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/([^/?#.]|[.][^/?#.]|[.][.][^/?#])[^/?#]*)+$"
"""Bucket by Amazon's rules; the key is made of segments that are neither empty nor ``.`` nor ``..``."""

S3_PREFIX_PATTERN: Final = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/(([^/?#.]|[.][^/?#.]|[.][.][^/?#])[^/?#]*/)*$"
"""As :data:`S3_PATTERN`, ending with the slash of a folder; the bucket alone is its root."""
OUTPUT_PATTERN: Final = r"^(/data/)?outputs/(([^/.]|[.][^/.]|[.][.][^/])[^/]*/)*[^/.][^/]*\.(npy|jsonl|parquet)$"
"""Below the folder ``outputs`` of the document volume, the only one that task pods write to; no part is ``.`` or ``..``."""

CALLBACK_PATTERN: Final = (
    r"^https?://([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
    r"([/?]([^#\\{}\s]|\{(task_id|namespace|kb_id)\})*)?$"
)
"""In RE2, as the CRD has it, and in the models. Host names in ASCII only; fields stand behind the host alone."""
CALLBACK_MESSAGE: Final = (
    "must be http(s)://HOST[:PORT]/PATH without user, password and fragment; {task_id}, {namespace} and {kb_id} in the path"
    " are filled in, other braces are written %7B and %7D"
)

SCHEME_MESSAGE: Final = (
    "a URL begins with s3://, https:// or http:// in lower case; any other path lies below the document volume"
)
HTTP_MESSAGE: Final = (
    "must be https://HOST[:PORT]/PATH without user, password, query and fragment: "
    "specs are stored and shown, so no signed URL belongs in one"
)
PREFIX_MESSAGE: Final = (
    "must be a folder below the document volume, or s3://BUCKET/FOLDER/ with a slash at its end; no part is '..'"
)
OUTPUT_MESSAGE: Final = "must be outputs/NAME.npy, .jsonl or .parquet, below the document volume; folders may stand between"
S3_MESSAGE: Final = "must be s3://BUCKET/KEY without query and fragment; parts of the key are neither empty nor '.' nor '..'"


def is_url(file_path: str) -> bool:
    """Tell a URL from a path of the document volume."""
    return "://" in file_path


def check_file_path(file_path: str) -> str:
    """Return the path as it is. Raises ValueError for a URL of another form; paths are checked where they are opened."""
    if not is_url(file_path):
        return file_path
    for schemes, pattern, message in (
        (("s3://",), S3_PATTERN, S3_MESSAGE),
        (("https://", "http://"), HTTP_PATTERN, HTTP_MESSAGE),
    ):
        if file_path.startswith(schemes):
            if re.fullmatch(pattern, file_path) is None:
                raise ValueError(message)
            return file_path
    raise ValueError(SCHEME_MESSAGE)


def check_prefix(prefix: str) -> str:
    """Return the prefix as it is. Raises ValueError for one of another form; folders are checked where they are opened."""
    bad = re.fullmatch(S3_PREFIX_PATTERN, prefix) is None if is_url(prefix) else ".." in prefix.split("/")
    if bad:
        raise ValueError(PREFIX_MESSAGE)
    return prefix


def check_output_path(path: str) -> str:
    """Return the path as it is. Raises ValueError for one of another form."""
    if re.fullmatch(OUTPUT_PATTERN, path) is None:
        raise ValueError(OUTPUT_MESSAGE)
    return path


def check_callback_url(url: str) -> str:
    """Return the URL as it is. Raises ValueError for one of another form."""
    if re.fullmatch(CALLBACK_PATTERN, url) is None:
        raise ValueError(CALLBACK_MESSAGE)
    return url


def bucket_and_key(file_path: str) -> tuple[str, str]:
    """Return bucket and key of a checked ``s3://`` URL.

    >>> bucket_and_key("s3://manuals/2026/handbook.pdf")
    ('manuals', '2026/handbook.pdf')
    """
    bucket, _, key = file_path.removeprefix("s3://").partition("/")
    return bucket, key

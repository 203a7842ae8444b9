"""Where a service is: by the environment, else by the cluster's DNS.

For ``knowledge-service``, the first of these that is there:

1. ``KNOWLEDGE_SERVICE_URL``: ``http://localhost:8082``
2. ``SERVICE_URLS``: ``knowledge-service=http://localhost:8082,gateway-service=https://gateway.example.com``
3. ``http://knowledge-service.NAMESPACE:PORT``. NAMESPACE is ``SERVICE_NAMESPACE``, else the pod's own; PORT is
   ``KNOWLEDGE_SERVICE_PORT``, else that of :data:`PORTS`, else 80.

A name with a dot, ``knowledge-service.other-team``, brings its namespace along.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

PORTS: Final[Mapping[str, int]] = {"task-manager-service": 8084, "gateway-service": 8080}
"""Ports of this product's own services."""

NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where Kubernetes tells a pod its namespace."""

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


class DiscoveryError(ValueError):
    """A name that is none of a service, or a variable of the environment that is no URL; the message says which."""


def service_url(name: str, *, environment: Mapping[str, str] = os.environ, namespace_file: Path = NAMESPACE_FILE) -> str:
    """Return the base URL of a service, without a slash at its end. Raises :class:`DiscoveryError`.

    >>> service_url("knowledge-service", environment={"SERVICE_NAMESPACE": "rag", "KNOWLEDGE_SERVICE_PORT": "8082"})
    'http://knowledge-service.rag:8082'
    """
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise DiscoveryError(f"cannot find the service {name!r}: a name has lower-case letters, digits, '-' and '.'")
    word = re.sub(r"[.-]", "_", name).upper()
    if url := environment.get(f"{word}_URL"):
        return base_url(url, said_by=f"{word}_URL")
    for entry in filter(None, (one.strip() for one in environment.get("SERVICE_URLS", "").split(","))):
        key, _, url = entry.partition("=")
        if key.strip() == name:
            return base_url(url.strip(), said_by="SERVICE_URLS")
    namespace = "" if "." in name else environment.get("SERVICE_NAMESPACE") or _own_namespace(namespace_file)
    host = f"{name}.{namespace}" if namespace else name
    port = _port(f"{word}_PORT", environment) or PORTS.get(name.partition(".")[0], 80)
    return f"http://{host}" + ("" if port == 80 else f":{port}")


def base_url(url: str, *, said_by: str) -> str:
    """Return a URL without a slash at its end. Raises :class:`DiscoveryError` for one that requests cannot be made below."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in {"http", "https"} and parts.hostname and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        whole = False
    if not whole:
        raise DiscoveryError(f"cannot use {said_by}={url!r}: give a URL such as http://localhost:8082, without a query")
    return url.rstrip("/")


def _own_namespace(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""  # not in a pod: the name alone, as the machine resolves it


def _port(variable: str, environment: Mapping[str, str]) -> int | None:
    # For a Service of the pod's own namespace Kubernetes sets NAME_PORT=tcp://10.0.0.7:8082 itself.
    text = environment.get(variable, "").rpartition(":")[2]
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise DiscoveryError(f"cannot use {variable}={environment[variable]!r}: give a number from 1 to 65535")
    return int(text)

"""Which servers a document may be fetched from: a task names a URL, and must not reach what only the cluster can reach.

A host name is resolved once, every address of it is checked, and the connection goes to an address that was checked: a name
that points elsewhere a moment later (DNS rebinding) changes nothing. What is not known to
be public is refused.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from task_contract.errors import DocumentNotFound, DocumentRefused, SourceUnavailable
from task_contract.networks import METADATA, NUMBER, PRIVATE, Address, AllowList, forms, is_public, within

if TYPE_CHECKING:
    from yarl import URL

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""From a host name to the addresses of it. Raises ``socket.gaierror``."""

_INNER: Final = frozenset(
    {"localhost", "local", "internal", "svc", "arpa", "localdomain", "intranet", "lan", "home", "corp"}
)
"""Last labels of names that the public DNS never has (RFC 6761, 6762, 8375 and ICANN's reservations)."""
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")


async def resolve(host: str) -> list[str]:
    """Ask the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL and the addresses to which a connection for it may go."""

    url: "URL"
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules for one process."""

    allowed: AllowList
    ports: frozenset[int]
    allow_http: bool
    api_servers: frozenset[Address] = frozenset()
    """Addresses of the Kubernetes API, as pods find them in their environment."""
    resolve: Resolve = resolve

    async def check(self, url: "URL") -> Target:
        """Return where a connection for a URL may go.

        Raises DocumentRefused for a place that is not allowed, DocumentNotFound for a name that nobody has, and
        SourceUnavailable where names cannot be resolved now. Messages name the host and nothing else of the URL.
        """
        host = self._host(url)
        literal = _literal(host)
        if literal is not None:
            self._check_address(literal, host=host)
            return Target(url, (literal,))
        named = self.allowed.has_name(host)
        if not named and _inner(host):
            raise _refused(host, "it is a name inside the cluster or the network")
        try:
            # The final dot keeps the resolver from the search domains of the cluster, where "postgres.stores" is a Service.
            found = await self.resolve(host if named else f"{host}.")
        except socket.gaierror as error:
            if error.errno in {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}:
                raise DocumentNotFound(f"cannot find the host {host}: no such name; correct payload.filePath") from error
            raise SourceUnavailable(
                f"cannot resolve {host}: {error.strerror}; look at the DNS of the cluster and at its network policies"
            ) from error
        except UnicodeError as error:  # a label of more than 63 characters
            raise DocumentNotFound(f"cannot find the host {host}: no such name; correct payload.filePath") from error
        addresses = tuple(dict.fromkeys(ip_address(text.partition("%")[0]) for text in found))
        for address in addresses:
            self._check_address(address, host=host, named=named)
        if not addresses:
            raise DocumentNotFound(f"cannot find the host {host}: it has no address; correct payload.filePath")
        return Target(url, addresses)

    def _host(self, url: "URL") -> str:
        """Check everything but addresses; return the host in lower case."""
        host = (url.raw_host or "").lower()
        if not _HOST.fullmatch(host) or ".." in host or host.endswith("."):
            raise DocumentRefused("cannot fetch the document: its URL has no proper host; correct payload.filePath")
        if url.scheme != "https" and not (url.scheme == "http" and self.allow_http):
            raise _refused(host, f"{url.scheme} is not allowed", remedy="use https, or set TASKS_SOURCE_ALLOW_HTTP=true")
        if url.raw_user is not None or url.raw_password is not None:
            raise _refused(host, "the URL carries user and password", remedy="leave them out")
        if url.port not in self.ports:
            raise _refused(host, f"port {url.port} is not allowed", remedy="name it in TASKS_SOURCE_PORTS")
        return host

    def _check_address(self, address: Address, *, host: str, named: bool = False) -> None:
        for form in forms(address):
            if form in self.api_servers and not self.allowed.has_exactly(form):
                raise _refused(host, "it is the Kubernetes API")
            if form in METADATA and not self.allowed.has_exactly(form):
                raise _refused(host, "it is a metadata service")
        real = forms(address)[-1]
        if self.allowed.has_address(address) or self.allowed.has_address(real):
            return
        if not (is_public(real) or (named and within(real, PRIVATE))):
            raise _refused(host, "it is not a public address")


def _refused(host: str, why: str, *, remedy: str = "if that is meant, name it in TASKS_SOURCE_ALLOW") -> DocumentRefused:
    return DocumentRefused(f"cannot fetch from {host}: {why}; {remedy}")


def _literal(host: str) -> Address | None:
    """Return the address that a host is; None for a name. Forms that not all readers take for the same one are refused."""
    if ":" in host or NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            return ip_address(host)
        except ValueError:
            raise _refused(
                host, "it is no address in its usual form", remedy="write it as 192.0.2.1 or [2001:db8::1]"
            ) from None
    return None


def _inner(host: str) -> bool:
    """Tell whether a name is of the cluster or a local network: one label, a reserved end, a Service's or a pod's name."""
    labels = host.split(".")
    return len(labels) == 1 or labels[-1] in _INNER or not {"svc", "pod"}.isdisjoint(labels[1:])

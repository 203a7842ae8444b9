"""Which servers a document may be fetched from: a task names a URL, and must not reach what only the cluster can reach.

A host name is resolved once, every address of it is checked, and the connection goes to an address that was checked: a name
that points elsewhere a moment later (DNS rebinding) changes nothing. The addresses are those of the IANA registries of
special purposes; what is not known to be public is refused.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final

from task_contract.errors import DocumentNotFound, DocumentRefused, SourceUnavailable

if TYPE_CHECKING:
    from yarl import URL

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""From a host name to the addresses of it. Raises ``socket.gaierror``."""


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ip_network(part) for part in text.split())


_PRIVATE: Final = _networks("10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.168.0.0/16 fc00::/7")
"""Networks of an organisation (RFC 1918, carrier-grade NAT, ULA)."""
_NOT_PUBLIC: Final = _networks(
    # https://www.iana.org/assignments/iana-ipv4-special-registry: this host, loopback, link-local, protocol assignments,
    # documentation, 6to4 relays, benchmarks, multicast, reserved and broadcast
    "0.0.0.0/8 127.0.0.0/8 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 "
    "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
    # https://www.iana.org/assignments/iana-ipv6-special-registry, within the one block of public addresses: Teredo, ORCHID
    # and others, documentation, 6to4 (an IPv4 address in disguise), documentation again
    "2001::/23 2001:db8::/32 2002::/16 3fff::/20"
)
_PUBLIC_IPV6: Final = IPv6Network("2000::/3")
"""The only block from which public IPv6 addresses are given; loopback, link-local, multicast and others lie outside."""
_NAT64: Final = IPv6Network("64:ff9b::/96")
"""An IPv4 address as a network without IPv4 reaches it; what it stands for is checked."""
_METADATA: Final = frozenset(
    ip_address(text)
    # Amazon, Google, Azure, OpenStack and others; Amazon by IPv6; Alibaba; Azure's host; Oracle
    for text in ("169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)
"""They hand credentials of a node to whoever asks. Only an entry of exactly such an address opens it."""

_INNER: Final = frozenset(
    {"localhost", "local", "internal", "svc", "arpa", "localdomain", "intranet", "lan", "home", "corp"}
)
"""Last labels of names that the public DNS never has (RFC 6761, 6762, 8375 and ICANN's reservations)."""
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


async def resolve(host: str) -> list[str]:
    """Ask the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True, slots=True)
class AllowList:
    """What is allowed beyond public addresses.

    A name, or ``*.domain`` for all names below a domain, may lead to private networks. Nothing but an address or a network
    opens loopback and link-local addresses; nothing but the address itself opens the Kubernetes API or a metadata service.
    """

    names: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, entries: Sequence[str]) -> "AllowList":
        """Read entries such as ``files.example.com``, ``*.example.com``, ``10.1.2.3``, ``10.20.0.0/16``, ``fd00::/8``.

        Raises ValueError, which names the entry.
        """
        names, networks = set(), []
        for entry in entries:
            name = entry.lower().rstrip(".")
            bare = name.removeprefix("*.")
            if re.fullmatch(r"[a-z0-9._-]*[a-z_-][a-z0-9._-]*", bare) and not _NUMBER.fullmatch(bare.rpartition(".")[2]):
                names.add(name)
                continue
            try:
                networks.append(ip_network(entry))
            except ValueError:
                raise ValueError(f"{entry!r} is no host name, address or network such as 10.20.0.0/16") from None
        return cls(frozenset(names), tuple(networks))

    def has_name(self, host: str) -> bool:
        """Tell whether a host name is listed, itself or by a domain above it."""
        labels = host.split(".")
        return host in self.names or any(f"*.{'.'.join(labels[first:])}" in self.names for first in range(1, len(labels)))

    def has_address(self, address: Address) -> bool:
        """Tell whether an address is listed, itself or by its network."""
        return any(address.version == network.version and address in network for network in self.networks)

    def has_exactly(self, address: Address) -> bool:
        """Tell whether an address is listed by an entry of its own."""
        return ip_network(address) in self.networks


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
        for form in _forms(address):
            if form in self.api_servers and not self.allowed.has_exactly(form):
                raise _refused(host, "it is the Kubernetes API")
            if form in _METADATA and not self.allowed.has_exactly(form):
                raise _refused(host, "it is a metadata service")
        real = _forms(address)[-1]
        if self.allowed.has_address(address) or self.allowed.has_address(real):
            return
        if not (_public(real) or (named and _within(real, _PRIVATE))):
            raise _refused(host, "it is not a public address")


def _refused(host: str, why: str, *, remedy: str = "if that is meant, name it in TASKS_SOURCE_ALLOW") -> DocumentRefused:
    return DocumentRefused(f"cannot fetch from {host}: {why}; {remedy}")


def _literal(host: str) -> Address | None:
    """Return the address that a host is; None for a name. Forms that not all readers take for the same one are refused."""
    if ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]):
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


def _forms(address: Address) -> tuple[Address, ...]:
    """Return an address, and the IPv4 address that it stands for if there is one."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address, address.ipv4_mapped
        if address in _NAT64:
            return address, IPv4Address(int(address) & 0xFFFFFFFF)
    return (address,)


def _public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _PUBLIC_IPV6:
        return False
    return address not in _METADATA and not _within(address, _PRIVATE) and not _within(address, _NOT_PUBLIC)


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)

"""Which receivers may be called: a task names a URL, and must not reach what only the operator can reach.

Services of the task's own namespace may be called, whatever they are named: ``hook``, ``hook.team-a``, ``hook.team-a.svc``.
Everything else, public or not, has to be allowed by the settings. A name is resolved once and as a full name, every address
of it is checked, and the connection goes to an address that was checked: a name that points elsewhere a moment later (DNS
rebinding) changes nothing. Loopback, link-local, multicast and other special addresses are opened by nothing but an entry
of their address or network; metadata services and the Kubernetes API by nothing but one of the very address.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from yarl import URL

from task_contract.networks import METADATA, NUMBER, PRIVATE, Address, AllowList, forms, is_public, within

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""From a host name to the addresses of it. Raises ``socket.gaierror``."""

_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_NO_SUCH_NAME: Final = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
_REMEDY: Final = "correct spec.callback.url, or allow it in OPERATOR_CALLBACKS_ALLOW (callbacks.allow of the chart)"


class TargetRefused(Exception):
    """A receiver that may not be called. Trying again does not help; the message says what does."""


class TargetUnknown(Exception):
    """A receiver whose addresses cannot be found now."""


class Target(NamedTuple):
    """A URL, and the addresses to which a connection for it may go."""

    url: URL
    addresses: tuple[Address, ...]


class _Place(NamedTuple):
    name: str
    """As the resolver is asked for it."""
    own: bool
    """A Service of the task's namespace."""
    named: bool
    """The settings name it."""


async def resolve(host: str) -> list[str]:
    """Ask the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def api_servers(environment: Mapping[str, str], server: str) -> frozenset[Address]:
    """Return the addresses of the Kubernetes API that are known: of its Service, and where this process reaches it."""
    hosts = (environment.get("KUBERNETES_SERVICE_HOST"), urlsplit(server).hostname)
    return frozenset(address for host in hosts if host and (address := _address(host)) is not None)


@dataclass(frozen=True, slots=True)
class Targets:
    """The rules for one operator."""

    allowed: AllowList
    api_servers: frozenset[Address] = frozenset()
    cluster_domain: str = "cluster.local"
    resolve: Resolve = resolve

    async def check(self, url: str, *, namespace: str) -> Target:
        """Return where a connection for the callback of a task in ``namespace`` may go.

        Raises :class:`TargetRefused` and :class:`TargetUnknown`. Messages name the host and nothing else of the URL.
        """
        try:
            parsed = URL(url)
            host = (parsed.raw_host or "").lower()
            port = parsed.port
        except ValueError:
            host, port = "", None
        if not _HOST.fullmatch(host) or ".." in host or not port or parsed.scheme not in {"http", "https"}:
            raise TargetRefused("cannot call back: the URL has no proper host and port; correct spec.callback.url")
        if parsed.raw_user is not None or parsed.raw_password is not None:
            raise TargetRefused(f"cannot call back to {host}: the URL carries user and password; correct spec.callback.url")
        if ":" in host or NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            literal = _address(host)
            if literal is None:
                raise TargetRefused(
                    f"cannot call back to {host}: it is no address in its usual form; write it as 192.0.2.1 or [2001:db8::1]"
                )
            self._check(literal, host=host, place=_Place(host, own=False, named=False))
            return Target(parsed, (literal,))
        place = self._place(host.rstrip("."), namespace=namespace)
        if not place.own and not place.named and not self.allowed.networks:
            raise TargetRefused(f"cannot call back to {host}: it is no Service of the task's namespace; {_REMEDY}")
        addresses = await self._addresses(host, place.name)
        for address in addresses:
            self._check(address, host=host, place=place)
        return Target(parsed, addresses)

    def _place(self, host: str, *, namespace: str) -> _Place:
        """Tell what a name stands for, and how the resolver is to be asked for it."""
        labels = host.removesuffix(f".{self.cluster_domain}").split(".")
        # "a.b" is a Service a of namespace b where b is the task's namespace, or else whatever the DNS makes of it.
        service = (len(labels) == 3 and labels[2] == "svc") or len(labels) == 1
        if len(labels) == 2 and labels[1] == namespace:
            labels, service = [*labels, "svc"], True
        name, *rest = labels
        where = rest[0] if rest else namespace
        if name == "kubernetes" and (where == "default" or labels[1:2] == ["default"]):
            raise TargetRefused(f"cannot call back to {host}: it is the Kubernetes API; correct spec.callback.url")
        named = any(self.allowed.has_name(form) for form in (host, ".".join(labels), f"{name}.{where}" if service else host))
        if service:
            # A name of one label is one of the task's namespace, also where the operator's own has one like it. The full
            # name keeps the resolver from the search domains of the operator's pod.
            return _Place(f"{name}.{where}.svc.{self.cluster_domain}.", own=where == namespace, named=named)
        return _Place(host if named else f"{host}.", own=False, named=named)

    async def _addresses(self, host: str, name: str) -> tuple[Address, ...]:
        try:
            found = await self.resolve(name)
        except socket.gaierror as error:
            why = "no such name" if error.errno in _NO_SUCH_NAME else error.strerror
            raise TargetUnknown(
                f"cannot find {host}: {why}; is spec.callback.url right, and does the DNS answer?"
            ) from error
        except UnicodeError as error:  # a label of more than 63 characters
            raise TargetRefused(f"cannot call back to {host}: it is no host name; correct spec.callback.url") from error
        addresses = tuple(dict.fromkeys(ip_address(text.partition("%")[0]) for text in found))
        if not addresses:
            raise TargetUnknown(f"cannot find {host}: it has no address; is spec.callback.url right?")
        return addresses

    def _check(self, address: Address, *, host: str, place: _Place) -> None:
        for form in forms(address):
            if form in self.api_servers and not self.allowed.has_exactly(form):
                raise TargetRefused(f"cannot call back to {host}: it is the Kubernetes API; {_REMEDY}")
            if form in METADATA and not self.allowed.has_exactly(form):
                raise TargetRefused(f"cannot call back to {host}: it is a metadata service; {_REMEDY}")
        real = forms(address)[-1]
        if self.allowed.has_address(address) or self.allowed.has_address(real):
            return
        if not (is_public(real) or within(real, PRIVATE)):
            raise TargetRefused(
                f"cannot call back to {host}: its address is loopback, link-local or otherwise special; {_REMEDY}"
            )
        if not (place.own or place.named):
            raise TargetRefused(f"cannot call back to {host}: it is no Service of the task's namespace; {_REMEDY}")


def _address(host: str) -> Address | None:
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None

"""Addresses and what they stand for: the pure part of deciding where a request may go that somebody else has chosen.

The runner fetches documents from servers that a task names, the operator calls back to receivers that a task names: both
have rules of their own, and these networks in common. They are those of the IANA registries of special purposes; what is not
known to be public is not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ip_network(part) for part in text.split())


PRIVATE: Final = _networks("10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.168.0.0/16 fc00::/7")
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
METADATA: Final = frozenset(
    ip_address(text)
    # Amazon, Google, Azure, OpenStack and others; Amazon by IPv6; Alibaba; Azure's host; Oracle
    for text in ("169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)
"""They hand credentials of a node to whoever asks. Only an entry of exactly such an address opens it."""

NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
"""The last label of a host that some reader takes for an address, whatever stands before it."""


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
            if re.fullmatch(r"[a-z0-9._-]*[a-z_-][a-z0-9._-]*", bare) and not NUMBER.fullmatch(bare.rpartition(".")[2]):
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


def forms(address: Address) -> tuple[Address, ...]:
    """Return an address, and the IPv4 address that it stands for if there is one."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address, address.ipv4_mapped
        if address in _NAT64:
            return address, IPv4Address(int(address) & 0xFFFFFFFF)
    return (address,)


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the public Internet, and none of a metadata service."""
    if isinstance(address, IPv6Address) and address not in _PUBLIC_IPV6:
        return False
    return address not in METADATA and not within(address, PRIVATE) and not within(address, _NOT_PUBLIC)


def within(address: Address, networks: Sequence[Network]) -> bool:
    """Tell whether an address lies in one of the networks."""
    return any(address.version == network.version and address in network for network in networks)

"""What a URL of a task may reach, as tables."""

import socket
from collections.abc import Sequence
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from job_runner.guard import Guard
from task_contract.errors import DocumentNotFound, DocumentRefused, SourceUnavailable, TaskError
from task_contract.networks import AllowList, is_public

PUBLIC = "93.184.216.34"


class Names:
    """Stands in for the resolver: answers one after the other, the last one for ever."""

    def __init__(self, *answers: Sequence[str] | OSError) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


def guard(*allowed: str, ports: Sequence[int] = (80, 443), http: bool = False, names: Names | None = None) -> Guard:
    return Guard(
        allowed=AllowList.parse(allowed),
        ports=frozenset(ports),
        allow_http=http,
        api_servers=frozenset({ip_address("10.96.0.1")}),
        resolve=names or Names([PUBLIC]),
    )


NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "10.96.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "169.254.1.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "4000::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]


def url_of(address: str) -> URL:
    return URL(f"https://[{address}]/a" if ":" in address else f"https://{address}/a")


@pytest.mark.parametrize("address", NOT_PUBLIC)
async def test_addresses_that_are_not_public_are_refused_as_literals_and_behind_names(address: str) -> None:
    with pytest.raises(DocumentRefused, match="TASKS_SOURCE_ALLOW"):
        await guard().check(url_of(address))
    for answer in ([address], [PUBLIC, address]):
        with pytest.raises(DocumentRefused, match=r"cannot fetch from files\.example\.com: it is"):
            await guard(names=Names(answer)).check(URL("https://files.example.com/a"))


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"],
)
async def test_public_addresses_are_reached(address: str) -> None:
    behind = await guard(names=Names([address])).check(URL("https://files.example.com/a"))
    assert behind.addresses == (ip_address(address),)
    if not address.startswith("::ffff"):
        assert (await guard().check(url_of(address))).addresses == (ip_address(address),)


@given(st.ip_addresses())
def test_nothing_passes_that_the_standard_library_calls_special(address: object) -> None:
    found = ip_address(str(address))
    if is_public(found):
        assert found.is_global
        assert not any((found.is_multicast, found.is_reserved, found.is_loopback, found.is_link_local))


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "127.0.0.01",
        "0",
        "1.2.3.4.5",
        "256.1.1.1",
        "a.1",
        "a.0x1",
    ],
)
async def test_odd_forms_of_addresses_are_refused(host: str) -> None:
    names = Names([PUBLIC])
    with pytest.raises(DocumentRefused, match="no address in its usual form"):
        await guard(names=names).check(URL(f"https://{host}/a"))
    assert names.asked == []


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "a.localhost",
        "kubernetes",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "postgres.stores.svc",
        "postgres.stores.svc.example.com",
        "10-0-0-1.stores.pod.cluster.local",
        "metadata.google.internal",
        "printer.local",
        "nas.lan",
    ],
)
async def test_names_of_the_inside_are_refused_without_asking(host: str) -> None:
    names = Names([PUBLIC])
    with pytest.raises(DocumentRefused, match="a name inside the cluster or the network"):
        await guard(names=names).check(URL(f"https://{host}/a"))
    assert names.asked == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://files.example.com/a", "http is not allowed; use https, or set TASKS_SOURCE_ALLOW_HTTP=true"),
        ("ftp://files.example.com/a", "ftp is not allowed"),
        ("https://user@files.example.com/a", "carries user and password"),
        ("https://user:pass@files.example.com/a", "carries user and password"),
        ("https://:pass@files.example.com/a", "carries user and password"),
        ("https://files.example.com:22/a", "port 22 is not allowed; name it in TASKS_SOURCE_PORTS"),
        ("https://files.example.com:0/a", "port 0 is not allowed"),
        ("https://files.example.com./a", "no proper host"),
        ("https://files..example.com/a", "no proper host"),
        ("file:///etc/passwd", "no proper host"),
        ("/relative", "no proper host"),
    ],
)
async def test_other_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(DocumentRefused) as refused:
        await guard().check(URL(url))
    assert message in refused.value.message
    assert "pass@" not in refused.value.message


ALLOWED: list[tuple[str, str, str, bool]] = [
    # entry, host, what it resolves to, allowed
    ("files.corp", "files.corp", "10.1.2.3", True),
    ("files.corp", "FILES.corp", "10.1.2.3", True),
    ("*.corp", "files.corp", "10.1.2.3", True),
    ("*.corp", "a.files.corp", "fd00::1", True),
    ("*.corp", "corp", "10.1.2.3", False),
    ("files.corp", "other.corp", "10.1.2.3", False),
    ("files.corp", "a.files.corp", "10.1.2.3", False),
    ("minio", "minio", "10.1.2.3", True),
    ("minio.storage.svc", "minio.storage.svc", "10.1.2.3", True),
    ("files.corp", "files.corp", "127.0.0.1", False),
    ("files.corp", "files.corp", "169.254.169.254", False),
    ("files.corp", "files.corp", "100.100.100.200", False),
    ("files.corp", "files.corp", "10.96.0.1", False),
    ("10.0.0.0/8", "files.example.com", "10.1.2.3", True),
    ("10.0.0.0/8", "files.example.com", "::ffff:10.1.2.3", True),
    ("10.0.0.0/8", "files.corp", "10.1.2.3", False),
    ("10.0.0.0/8", "10.1.2.3", "", True),
    ("10.0.0.0/8", "10.96.0.1", "", False),
    ("10.96.0.1", "10.96.0.1", "", True),
    ("127.0.0.0/8", "127.0.0.1", "", True),
    ("169.254.0.0/16", "169.254.169.254", "", False),
    ("169.254.169.254/32", "169.254.169.254", "", True),
    ("0.0.0.0/0", "169.254.169.254", "", False),
    ("::/0", "[fd00:ec2::254]", "", False),
    ("fd00::/8", "[fd00::1]", "", True),
]


@pytest.mark.parametrize(("entry", "host", "address", "good"), ALLOWED)
async def test_the_allow_list_opens_what_it_names_and_no_more(entry: str, host: str, address: str, good: bool) -> None:
    checking = guard(entry, names=Names([address])).check(URL(f"https://{host}/a"))
    if good:
        assert (await checking).addresses == (ip_address(address or host.strip("[]")),)
    else:
        with pytest.raises(DocumentRefused):
            await checking


async def test_only_listed_names_are_looked_for_in_the_search_domains_of_the_cluster() -> None:
    names = Names(["10.1.2.3"])
    await guard("minio.storage.svc", names=names).check(URL("https://minio.storage.svc/a"))
    with pytest.raises(DocumentRefused):
        await guard(names=names).check(URL("https://postgres.stores/a"))
    assert names.asked == ["minio.storage.svc", "postgres.stores."]


@pytest.mark.parametrize(
    "entry", ["", "*", "https://files.corp", "10.1.2.3/8", "10.1", "files.corp:443", "a b", "文件.corp"]
)
def test_a_bad_entry_of_the_allow_list_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is no host name, address or network"):
        AllowList.parse([entry])


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), DocumentNotFound, "no such name"),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), SourceUnavailable, "look at the DNS"),
        ([], DocumentNotFound, "no address"),
    ],
)
async def test_names_that_are_not_resolved(answer: list[str] | OSError, error: type[TaskError], message: str) -> None:
    with pytest.raises(error, match=message):
        await guard(names=Names(answer)).check(URL("https://files.example.com/a"))

"""Which receivers a callback may go to."""

import socket
from collections.abc import Sequence
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_contract.networks import AllowList
from task_operator.targets import TargetRefused, Targets, TargetUnknown, api_servers

NAMES = {
    "hook.team-a.svc.cluster.local.": ["10.96.4.1"],
    "hook.team-b.svc.cluster.local.": ["10.96.4.2"],
    "odd.team-a.svc.cluster.local.": ["169.254.169.254"],
    "loop.team-a.svc.cluster.local.": ["127.0.0.1"],
    "api.team-a.svc.cluster.local.": ["10.96.0.1"],
    "mixed.team-a.svc.cluster.local.": ["10.96.4.1", "127.0.0.1"],
    "outside.team-a.svc.cluster.local.": ["93.184.216.34"],
    "hooks.example.com.": ["93.184.216.34"],
    "hooks.example.com": ["93.184.216.34"],
    "inner.example.com": ["10.20.0.7"],
    "rebound.example.com": ["127.0.0.1"],
    "stolen.example.com": ["fd00:ec2::254"],
    "network.example.com.": ["10.20.0.9"],
    "hook.team-b": ["10.96.4.2"],
    "nothing.example.com": [],
}
API = ip_address("10.96.0.1")


def targets(*allowed: str) -> Targets:
    async def resolve(host: str) -> Sequence[str]:
        if host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return NAMES[host]

    return Targets(allowed=AllowList.parse(allowed), api_servers=frozenset({API}), resolve=resolve)


async def check(url: str, *allowed: str) -> list[str]:
    return [str(one) for one in (await targets(*allowed).check(url, namespace="team-a")).addresses]


@pytest.mark.parametrize(
    "host",
    [
        "hook",
        "HOOK",
        "hook.",
        "hook.team-a",
        "hook.team-a.svc",
        "hook.team-a.svc.cluster.local",
        "hook.team-a.svc.cluster.local.",
    ],
)
@pytest.mark.parametrize("rest", ["", ":8080", "/api?x=1"])
async def test_a_service_of_the_tasks_namespace_may_be_called_by_each_of_its_names(host: str, rest: str) -> None:
    assert await check(f"http://{host}{rest}") == ["10.96.4.1"]


@pytest.mark.parametrize(
    ("url", "allowed", "address"),
    [
        ("https://hooks.example.com/x", "hooks.example.com", "93.184.216.34"),
        ("https://hooks.example.com/x", "*.example.com", "93.184.216.34"),
        ("https://inner.example.com/x", "*.example.com", "10.20.0.7"),
        ("https://network.example.com/x", "10.20.0.0/16", "10.20.0.9"),
        ("http://10.20.0.9/x", "10.20.0.0/16", "10.20.0.9"),
        ("http://127.0.0.1:8080/x", "127.0.0.0/8", "127.0.0.1"),
        ("http://[::1]:8080/x", "::1", "::1"),
        ("http://rebound.example.com/x", "127.0.0.1", "127.0.0.1"),
        ("http://169.254.169.254/x", "169.254.169.254", "169.254.169.254"),
        ("https://10.96.0.1/x", "10.96.0.1", "10.96.0.1"),
        ("http://hook.team-b.svc/x", "hook.team-b.svc", "10.96.4.2"),
        ("http://hook.team-b.svc.cluster.local/x", "hook.team-b.svc", "10.96.4.2"),
        ("http://hook.team-b.svc/x", "hook.team-b", "10.96.4.2"),
        ("http://hook.team-b/x", "hook.team-b", "10.96.4.2"),
        ("http://hook.team-b.svc/x", "10.96.4.2", "10.96.4.2"),
    ],
)
async def test_what_the_settings_allow_may_be_called(url: str, allowed: str, address: str) -> None:
    names = "rebound.example.com" if "rebound" in url else allowed
    assert await check(url, allowed, names) == [address]


@pytest.mark.parametrize(
    ("url", "allowed", "message"),
    [
        ("https://hooks.example.com/x", "", "no Service of the task's namespace; .*OPERATOR_CALLBACKS_ALLOW"),
        ("https://hooks.example.com/x", "10.0.0.0/8", "no Service of the task's namespace"),
        ("https://hooks.example.com/x", "example.com", "no Service of the task's namespace"),
        ("http://hook.team-b/x", "", "no Service of the task's namespace"),
        ("http://hook.team-b.svc/x", "10.20.0.0/16", "no Service of the task's namespace"),
        ("http://93.184.216.34/x", "", "no Service of the task's namespace"),
        ("http://10.96.4.1/x", "", "no Service of the task's namespace"),
        ("http://odd/x", "", "metadata service"),
        ("http://odd/x", "169.254.0.0/16", "metadata service"),
        ("https://stolen.example.com/x", "*.example.com", "metadata service"),
        ("http://169.254.169.254/latest", "0.0.0.0/0", "metadata service"),
        ("http://[::ffff:169.254.169.254]/x", "::/0", "metadata service"),
        ("http://[64:ff9b::a9fe:a9fe]/x", "::/0", "metadata service"),
        ("http://loop/x", "", "loopback, link-local"),
        ("http://mixed/x", "", "loopback, link-local"),
        ("http://rebound.example.com/x", "*.example.com", "loopback, link-local"),
        ("http://127.0.0.1/x", "", "loopback, link-local"),
        ("http://[::1]/x", "", "loopback, link-local"),
        ("http://0.0.0.0/x", "", "loopback, link-local"),
        ("http://224.0.0.1/x", "", "loopback, link-local"),
        ("http://[ff02::1]/x", "", "loopback, link-local"),
        ("http://[fe80::1]/x", "", "loopback, link-local"),
        ("http://api/x", "", "Kubernetes API"),
        ("https://10.96.0.1/x", "10.0.0.0/8", "Kubernetes API"),
        ("https://[::ffff:10.96.0.1]/x", "::/0", "Kubernetes API"),
        ("https://kubernetes.default/x", "*.default", "Kubernetes API"),
        ("https://kubernetes.default.svc/x", "kubernetes.default.svc", "Kubernetes API"),
        ("https://kubernetes.default.svc.cluster.local/x", "*.cluster.local", "Kubernetes API"),
        ("http://2130706433/x", "127.0.0.0/8", "usual form"),
        ("http://0x7f.1/x", "127.0.0.0/8", "usual form"),
        ("http://127.1/x", "127.0.0.0/8", "usual form"),
        ("http://0177.0.0.1/x", "127.0.0.0/8", "usual form"),
        ("http://user:word@hook/x", "", "user and password"),
        ("http://a..b/x", "", "no proper host"),
        ("http:///x", "", "no proper host"),
        ("ftp://hook/x", "", "no proper host"),
        ("http://hook:0/x", "", "no proper host"),
    ],
)
async def test_everything_else_is_refused_with_the_field_and_the_remedy(url: str, allowed: str, message: str) -> None:
    with pytest.raises(TargetRefused, match=message) as caught:
        await check(url, *([allowed] if allowed else []))
    assert "word" not in str(caught.value).replace("password", "")


async def test_the_api_is_refused_to_tasks_of_its_own_namespace_too() -> None:
    with pytest.raises(TargetRefused, match="Kubernetes API"):
        await targets().check("https://kubernetes/x", namespace="default")


@pytest.mark.parametrize(
    ("url", "allowed"), [("http://missing/x", ""), ("http://nothing.example.com/", "nothing.example.com")]
)
async def test_a_name_that_nobody_has_yet_may_come(url: str, allowed: str) -> None:
    with pytest.raises(TargetUnknown, match="cannot find"):
        await check(url, *([allowed] if allowed else []))


@given(st.ip_addresses())
async def test_no_address_is_called_that_nobody_has_allowed(address: object) -> None:
    found = ip_address(str(address))
    with pytest.raises(TargetRefused):
        await check(f"http://{found}/" if found.version == 4 else f"http://[{found}]/")


@given(st.text(max_size=40))
async def test_no_text_is_a_target_by_accident(text: str) -> None:
    with pytest.raises((TargetRefused, TargetUnknown)):
        await check(f"http://{text}.example.com/")


@pytest.mark.parametrize(
    ("environment", "server", "expected"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "https://10.96.0.1:443", {"10.96.0.1"}),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1"}, "https://[fd00::2]:6443", {"fd00::1", "fd00::2"}),
        ({}, "https://api.example.com:6443", set()),
    ],
)
def test_the_api_is_known_by_its_service_and_by_how_it_is_reached(
    environment: dict[str, str], server: str, expected: set[str]
) -> None:
    assert {str(one) for one in api_servers(environment, server)} == expected

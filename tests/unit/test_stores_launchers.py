"""What the launchers of the stores decide before anything starts: ports, configurations, versions, passwords."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import network, stores
from devstack.progress import DevstackError
from devstack.stores import common, elasticsearch, milvus, postgres, rabbitmq, redis
from devstack.stores.passwords import password

FOLDER = Path("/state/store")
TEMPLATE = """
etcd:
  endpoints: localhost:{{ etcd_port(int): 2379 }}
  data:
    dir: {{ etcd_data_dir }}
  log:
    level: {{ etcd_log_level: info }} # one of several
proxy:
  ip: # empty
  port: {{ proxy_port(int): 19530 }}
common:
  security:
    authorizationEnabled: {{ authorization_enabled(bool): false }}
autoIndex:
  params:
    build: '{"M": 18,"index_type": "HNSW"}'
"""


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVSTACK_STATE", str(tmp_path / "state"))
    for name in stores.NAMES:
        monkeypatch.delenv(f"DEVSTACK_{name.upper()}_PORT", raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, 15432), ("", 15432), ("25432", 25432), ("1024", 1024), ("65535", 65535)],
)
def test_a_port_is_the_default_unless_the_environment_names_one(
    text: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        monkeypatch.setenv("DEVSTACK_POSTGRES_PORT", text)
    assert postgres.port() == expected


@pytest.mark.parametrize("text", ["0", "1023", "65536", "-1", "5432x"])
def test_a_port_that_cannot_be_used_is_refused_by_the_name_of_its_variable(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVSTACK_REDIS_PORT", text)
    with pytest.raises(DevstackError, match=r"^cannot use DEVSTACK_REDIS_PORT="):
        redis.port()


def test_a_password_is_private_lasting_and_one_for_all_who_ask_at_once(tmp_path: Path) -> None:
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(password("redis"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 1
    assert len(answers[0]) == 32
    assert password("redis") == answers[0] != password("milvus")
    folder = tmp_path / "state" / "passwords"
    assert sorted(path.name for path in folder.iterdir()) == ["milvus", "redis"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "redis").stat().st_mode & 0o777 == 0o600


def test_a_private_file_is_replaced_whole_and_stays_private(tmp_path: Path) -> None:
    file = tmp_path / "file"
    (tmp_path / ".file.new").write_text("what an interrupted write left")
    for text in ("one", "two"):
        common.write_private(file, text)
        assert file.read_text() == text
        assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_host_and_pods_get_the_same_variables_with_their_own_addresses() -> None:
    host, pods = stores.host_urls(), stores.pod_urls()
    secrets = {name: password(name) for name in stores.NAMES}
    assert host == {
        "TASKS_POSTGRES_URL": f"postgresql://tasks:{secrets['postgres']}@127.0.0.1:15432/tasks",
        "TASKS_REDIS_URL": f"redis://:{secrets['redis']}@127.0.0.1:16379/0",
        "TASKS_MILVUS_URL": "http://127.0.0.1:19630",
        "TASKS_MILVUS_TOKEN": f"root:{secrets['milvus']}",
        "TASKS_ELASTICSEARCH_URL": f"http://elastic:{secrets['elasticsearch']}@127.0.0.1:19200",
    }
    assert pods == {
        "TASKS_POSTGRES_URL": f"postgresql://tasks:{secrets['postgres']}@postgres.stores.svc.cluster.local:5432/tasks",
        "TASKS_REDIS_URL": f"redis://:{secrets['redis']}@redis.stores.svc.cluster.local:6379/0",
        "TASKS_MILVUS_URL": "http://milvus.stores.svc.cluster.local:19530",
        "TASKS_MILVUS_TOKEN": f"root:{secrets['milvus']}",
        "TASKS_ELASTICSEARCH_URL": f"http://elastic:{secrets['elasticsearch']}@elasticsearch.stores.svc.cluster.local:9200",
    }


def test_services_lead_from_the_usual_ports_to_the_bridge_and_the_real_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVSTACK_ELASTICSEARCH_PORT", "29200")
    objects = stores.services()
    assert objects[0] == {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "stores"}}
    services = {o["metadata"]["name"]: o for o in objects if o["kind"] == "Service"}
    slices = {o["metadata"]["labels"]["kubernetes.io/service-name"]: o for o in objects if o["kind"] == "EndpointSlice"}
    ways = {}
    for name, service in services.items():
        assert "selector" not in service["spec"]
        assert [endpoint["addresses"] for endpoint in slices[name]["endpoints"]] == [["10.244.0.1"]]
        (outer,), (inner,) = service["spec"]["ports"], slices[name]["ports"]
        assert outer["name"] == inner["name"]  # else the proxy does not connect the two
        ways[name] = (outer["port"], inner["port"])
    assert ways == {
        "postgres": (5432, 15432),
        "redis": (6379, 16379),
        "milvus": (19530, 19630),
        "elasticsearch": (9200, 29200),
    }


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ([], None),
        (["/usr/lib/postgresql/15/bin"], "/usr/lib/postgresql/15/bin"),
        (
            ["/usr/lib/postgresql/9.6/bin", "/usr/lib/postgresql/17/bin", "/usr/lib/postgresql/15/bin"],
            "/usr/lib/postgresql/17/bin",
        ),
    ],
)
def test_the_newest_postgresql_is_taken(folders: list[str], expected: str | None) -> None:
    found = postgres.newest([Path(folder) for folder in folders])
    assert found == (Path(expected) if expected else None)


def test_postgresql_lets_in_only_who_has_a_password_and_comes_from_here() -> None:
    assert postgres.access_rules(["127.0.0.1/32", "10.244.0.0/16"]) == (
        "host all all 127.0.0.1/32 scram-sha-256\nhost all all 10.244.0.0/16 scram-sha-256\n"
    )


@pytest.mark.parametrize("name", ["", "1a", "A", 'a"; DROP TABLE x', "a-b", "a" * 64, "a\n"])
def test_a_database_name_that_would_need_quoting_is_refused(name: str) -> None:
    with pytest.raises(DevstackError, match=r"^cannot create database"):
        postgres.create_database(name)
    with pytest.raises(DevstackError, match=r"^cannot drop database"):
        postgres.drop_database(name)


def test_the_lock_of_a_dead_postgresql_is_cleared_whoever_has_its_pid_now(tmp_path: Path) -> None:
    (tmp_path / "postmaster.pid").write_text("1\n")
    postgres._clear_stale_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_redis_has_a_password_and_two_addresses() -> None:
    lines = dict(line.split(" ", 1) for line in redis.render(FOLDER, 16379, "secret").splitlines())
    assert lines["bind"] == "127.0.0.1 10.244.0.1"
    assert lines["requirepass"] == "secret"
    assert lines["dir"] == '"/state/store"'
    assert lines["appendonly"] == "yes"


def test_elasticsearch_has_its_rest_interface_on_both_addresses_and_its_transport_on_loopback() -> None:
    settings = yaml.safe_load(elasticsearch.render(FOLDER, 19200))
    assert settings["http.host"] == ["127.0.0.1", "10.244.0.1"]
    assert settings["http.port"] == 19200
    assert settings["transport.host"] == "127.0.0.1"
    assert settings["transport.port"] == 19201
    assert settings["path.data"] == "/state/store/data"


@pytest.mark.parametrize(
    ("jar", "folder"),
    [
        ("elasticsearch-9.5.3.jar", "lib"),
        ("lucene-core-10.5.1.jar", "lib"),
        ("lucene-analysis-common-10.5.1.jar", "lib"),
        ("lucene-analysis-smartcn-10.5.0.jar", "plugins/embedded"),
        ("netty-codec-http-4.1.135.Final.jar", "modules/transport-netty4"),
        ("transport-netty4-9.5.3.jar", "modules/transport-netty4"),
        ("elasticsearch-ssl-config-9.5.3.jar", "modules/transport-netty4"),
    ],
)
def test_a_jar_belongs_to_the_library_the_http_module_or_the_plugin(jar: str, folder: str) -> None:
    assert elasticsearch.place(jar) == folder


def test_milvus_keeps_the_template_where_nothing_is_changed() -> None:
    settings = yaml.safe_load(milvus.render(TEMPLATE, {}))
    assert settings == {
        "etcd": {"endpoints": "localhost:2379", "data": {"dir": None}, "log": {"level": "info"}},
        "proxy": {"ip": None, "port": 19530},
        "common": {"security": {"authorizationEnabled": False}},
        "autoIndex": {"params": {"build": '{"M": 18,"index_type": "HNSW"}'}},
    }


def test_milvus_wants_a_password_and_has_its_data_and_ports_where_we_say() -> None:
    settings = yaml.safe_load(milvus.render(TEMPLATE, milvus.settings(FOLDER, 19630)))
    assert settings["common"]["security"]["authorizationEnabled"] is True
    assert settings["proxy"] == {"ip": "127.0.0.1", "port": 19630, "internalPort": 19629}
    assert settings["etcd"]["config"]["path"] == "/state/store/configs/etcd.yaml"
    assert settings["rocksmq"]["path"] == "/state/store/data/rocksmq"
    assert settings["autoIndex"]["params"]["build"] == '{"M": 18,"index_type": "HNSW"}'


def test_the_ports_of_milvus_own_parts_are_distinct_barred_and_not_for_outgoing_connections() -> None:
    parts = [
        part["port"]
        for part in yaml.safe_load(milvus.render(TEMPLATE, milvus.settings(FOLDER, 19630))).values()
        if "port" in part
    ]
    assert len(set(parts)) == len(parts) == 7
    rules = milvus.render_filter(19630)
    (rule,) = [line for line in rules.splitlines() if "drop" in line]
    barred = {int(number) for number in rule.split("dport {")[1].split("}")[0].split(",")}
    assert barred == set(range(19620, 19631)) >= set(parts)
    assert f'"lo", "{network.BRIDGE}"' in rule
    assert max(barred) < 32768  # where Linux begins to hand out ports


def test_etcd_of_milvus_is_on_loopback_alone() -> None:
    settings = yaml.safe_load(milvus.render_etcd(FOLDER, 19630))
    urls = [value for key, value in settings.items() if key.endswith("-urls")]
    assert len(urls) == 4
    assert all(url.startswith("http://127.0.0.1:") for url in urls)
    assert settings["data-dir"] == yaml.safe_load(json.dumps(milvus.settings(FOLDER, 19630)["etcd.data.dir"]))


@pytest.mark.parametrize(
    ("sessions", "stale"),
    [
        ([], []),
        ([(5, 50), (5, 51)], []),  # the new run has not shown up yet, or it is the only one
        ([(5, 50), (5, 51), (6, 60)], [50, 51]),
        ([(10, 1), (9, 2)], [2]),  # numbers, not text
        ([(4, 40), (5, 50), (6, 60)], [40, 50]),
    ],
)
def test_only_the_sessions_of_earlier_runs_of_milvus_are_stale(sessions: list[tuple[int, int]], stale: list[int]) -> None:
    records: list[dict[str, Any]] = [{"ServerID": server, "LeaseID": lease} for server, lease in sessions]
    assert milvus.stale_leases(records) == stale


def test_rabbitmq_listens_where_pods_and_this_machine_reach_it_and_wants_a_password() -> None:
    lines = dict(line.split(" = ") for line in rabbitmq.render(15672, "hidden").splitlines())
    assert lines["listeners.tcp.1"] == "127.0.0.1:15672"
    assert lines["listeners.tcp.2"] == f"{network.ADDRESS}:15672"
    assert (lines["default_user"], lines["default_pass"]) == ("tasks", "hidden")
    assert "guest" not in lines.values()


def test_rabbitmq_is_no_store_that_the_product_needs() -> None:
    assert rabbitmq.NAME not in stores.NAMES
    assert not [key for key in stores.host_urls() if "RABBITMQ" in key]
    assert rabbitmq.NAME not in stores.status()

"""Elasticsearch 9, a real node made of the jars that Maven Central serves and a launcher of ours (devstack/elasticsearch).

What Elastic does not publish as Maven artifacts is missing: scripts, ingest, `_delete_by_query`, ILM, security, TLS. Our
plugin adds the analyzers `smartcn`, `cjk` and `english`, the answer of `GET /`, and a password for the user `elastic`.
The node listens on loopback and the bridge; its transport (which has no password) on loopback alone.

The version stands in devstack/elasticsearch/pom.xml.
"""

import base64
import http.client
import json
import shutil
import zipfile
from pathlib import Path

from devstack import machine
from devstack.cache import cached
from devstack.process import run, start, stop, wait_until
from devstack.progress import DevstackError, step
from devstack.stores import common
from devstack.stores.passwords import password

NAME = "elasticsearch"
SERVICE_PORT = 9200

_DEFAULT_PORT = 19200  # not 9200, which a server of this machine's owner may hold
_USER = "elastic"
_SOURCES = Path(__file__).parent.parent / "elasticsearch"
_JAVA = 21  # what Elasticsearch 9 needs at least
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"
_HTTP_MODULE = "transport-netty4"


def port() -> int:
    """Return the port that the node's REST interface listens on; the transport's is one above."""
    return common.port(NAME, _DEFAULT_PORT)


def environment(address: str) -> dict[str, str]:
    """Return the variables of a client that reaches the server at ADDRESS (host:port)."""
    return {"TASKS_ELASTICSEARCH_URL": f"http://{_USER}:{password(NAME)}@{address}"}


def up() -> None:
    """Start the node; one that runs is kept."""
    java = machine.java_home(_JAVA)
    home = _home(java)
    folder = common.folder(NAME)
    configuration = folder / "config"
    configuration.mkdir(exist_ok=True)
    (configuration / "elasticsearch.yml").write_text(render(folder, port()))
    environment = {"ELASTIC_PASSWORD": password(NAME), **common.digest_of(configuration / "elasticsearch.yml")}
    start(NAME, command(java, home, configuration), env=environment, cwd=folder)
    wait_until("an answer of Elasticsearch", _answers, seconds=120, processes=[NAME])


def down(*, kill: bool = False) -> None:
    """Stop the node."""
    stop(NAME, kill=kill)


def render(folder: Path, port: int) -> str:
    """Return elasticsearch.yml for a node that keeps its data and logs in FOLDER; JSON values are YAML too."""
    lines = {
        "cluster.name": "processing-tasks-devstack",
        "node.name": "devstack",
        "discovery.type": "single-node",
        "path.data": str(folder / "data"),
        "path.logs": str(folder / "logs"),
        "http.host": list(common.LISTEN),
        "http.port": port,
        "transport.host": common.HOST,
        "transport.port": port + 1,
        "cluster.routing.allocation.disk.threshold_enabled": False,  # a nearly full disk would make indices read-only
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())


def command(java: Path, home: Path, configuration: Path) -> list[str]:
    """Return the command that runs the node from HOME with CONFIGURATION.

    C1 alone compiles: a node is up after 3 s instead of 9, and tests are over before C2 would pay. Lucene uses vector
    instructions with C2 only, so the JDK's incubator module for them is left out.
    """
    return [
        str(java / "bin" / "java"),
        "-Xms256m",
        "-Xmx512m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        # The jars must be modules: plugins are resolved against them.
        f"--module-path={home / 'lib'}",
        "--add-modules=ALL-MODULE-PATH",
        "--enable-native-access=ALL-UNNAMED,org.elasticsearch.nativeaccess,org.apache.lucene.core",
        # The interface for a REST interceptor, which the plugin uses to ask for the password, is exported to few.
        "--add-exports=org.elasticsearch.server/org.elasticsearch.plugins.interceptor=ALL-UNNAMED",
        f"-Des.path.home={home}",
        "-Dlog4j2.disable.jmx=true",
        "-Dlog4j.shutdownHookEnabled=false",  # the node logs until it is closed
        "-Dio.netty.noUnsafe=true",
        "-classpath",
        str(home / "launcher"),
        "EmbeddedElasticsearch",
        str(home),
        str(configuration),
    ]


def place(jar: str) -> str:
    """Return the folder of a node's home that the file JAR belongs to: the HTTP module's, the plugin's or the library."""
    if jar.startswith(("netty-", f"{_HTTP_MODULE}-", "elasticsearch-ssl-config-")):
        return f"modules/{_HTTP_MODULE}"
    if jar.startswith("lucene-analysis-smartcn-"):
        return "plugins/embedded"
    return "lib"


def _home(java: Path) -> Path:
    """Return the folder with the node's lib, modules, plugins and launcher; made once: downloaded, laid out, compiled."""

    def build(home: Path) -> None:
        maven = shutil.which("mvn")
        if maven is None:
            raise DevstackError("cannot download Elasticsearch: there is no Maven; install the package maven")
        with step("downloading Elasticsearch from Maven Central and compiling its launcher"):
            for part in ("lib", f"modules/{_HTTP_MODULE}", "plugins/embedded", "launcher"):
                (home / part).mkdir(parents=True)
            jars = home / "jars"
            # -C: a file whose checksum is wrong fails the download. -f: nothing of the current folder's counts.
            fetch: list[str | Path] = [maven, "--quiet", "--batch-mode", "-C", "-f", _SOURCES / "pom.xml", _COPY]
            options = ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
            run([*fetch, *options], doing="download Elasticsearch", env={"JAVA_HOME": str(java)})
            for jar in sorted(jars.iterdir()):
                jar.rename(home / place(jar.name) / jar.name)
            jars.rmdir()
            _describe_http_module(home / "modules" / _HTTP_MODULE)
            _compile(java, home)

    return cached("elasticsearch", [_SOURCES, Path(__file__)], build, keep=2)


def _describe_http_module(folder: Path) -> None:
    """Unpack the module's descriptor and policy, which its jar carries for just this."""
    (jar,) = folder.glob(f"{_HTTP_MODULE}-*.jar")
    prefix = f"META-INF/es-plugins/{_HTTP_MODULE}/"
    with zipfile.ZipFile(jar) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and not name.endswith("/"):
                (folder / name.removeprefix(prefix)).write_bytes(archive.read(name))


def _compile(java: Path, home: Path) -> None:
    plugin = home / "plugins" / "embedded"
    javac: list[str | Path] = [java / "bin" / "javac", "--release", str(_JAVA), "-nowarn", "-proc:none"]
    library = f"{home / 'lib'}/*:{plugin}/*"
    classes = home / "classes"
    doing = "compile the launcher of Elasticsearch"
    run([*javac, "-classpath", library, "-d", home / "launcher", _SOURCES / "EmbeddedElasticsearch.java"], doing=doing)
    run([*javac, "-classpath", library, "-d", classes, _SOURCES / "EmbeddedPlugin.java"], doing=doing)
    run([java / "bin" / "jar", "--create", "--file", plugin / "embedded.jar", "-C", classes, "."], doing=doing)
    shutil.rmtree(classes)
    (server,) = (home / "lib").glob("elasticsearch-[0-9]*.jar")
    version = server.stem.removeprefix("elasticsearch-")
    descriptor = (_SOURCES / "plugin-descriptor.properties").read_text().replace("@VERSION@", version)
    (plugin / "plugin-descriptor.properties").write_text(descriptor)


def _answers() -> bool:
    """Whether the node holds a cluster whose indices can all be read."""
    pair = base64.b64encode(f"{_USER}:{password(NAME)}".encode()).decode()
    connection = http.client.HTTPConnection(common.HOST, port(), timeout=5)
    try:
        path = "/_cluster/health?wait_for_status=yellow&timeout=1s"
        connection.request("GET", path, headers={"Authorization": f"Basic {pair}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status == 200
    finally:
        connection.close()

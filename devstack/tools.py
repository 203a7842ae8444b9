"""Programs that the devstack builds for itself from Go modules: Kubernetes with kubectl, the pause process, helm, kind."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from devstack import machine
from devstack.cache import cached
from devstack.process import run
from devstack.progress import DevstackError, step

HELM = "v3.22.0"
HELM_4 = "v4.3.2"
KUEUE = "v0.17.0"
KWOK = "v0.7.0"
KUBECONFORM = "v0.7.0"
KIND = "v0.30.0"
"""Its node is Kubernetes 1.34, as the embedded cluster."""
GO_MINIMUM = (1, 24)
PARTS = ("etcd", "kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "dns")

_KUBE = Path(__file__).parent / "kube"
_PROMETHEUS = Path(__file__).parent / "prometheus"
_OTELCOL = Path(__file__).parent / "otelcol"
"""A module of two tools: `go install` refuses the published one, whose go.mod excludes versions of others."""
# The machine's own C compiler must not matter, nor where the sources lie.
_GO_ENV = {"CGO_ENABLED": "0", "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly", "GOWORK": "off"}


def kube() -> Path:
    """Return the folder with all PARTS and `pause` (the process of a pod's sandbox); built once, in 4 to 11 minutes."""

    version = kubernetes_version()
    major, minor = version.removeprefix("v").split(".")[:2]
    # Without these every part calls itself v0.0.0-master, and clients refuse the version skew.
    flags = ["-s", "-w"]
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        for name, value in (("gitVersion", version), ("gitMajor", major), ("gitMinor", minor)):
            flags += ["-X", f"{package}.{name}={value}"]

    def build(folder: Path) -> None:
        _require_go()
        folder.mkdir()
        with step(f"building Kubernetes {version} from its Go modules (the first time: 4 to 11 minutes on two cores)"):
            _go("build", "-ldflags", " ".join(flags), "-o", folder / "kube", ".", doing="build Kubernetes", cwd=_KUBE)
            _go("build", "-ldflags", "-s -w", "-o", folder / "pause", "./pause", doing="build pause", cwd=_KUBE)
        for part in PARTS:
            (folder / part).symlink_to("kube")

    return cached("kube", [_KUBE, " ".join([*flags, *_GO_ENV.values(), *PARTS]).encode()], build, keep=2)


def kubectl() -> Path:
    """Return the path of kubectl, of the same version as the cluster."""
    return kube() / "kubectl"


def helm() -> Path:
    """Return the path of helm; built once, in 1 to 3 minutes."""
    return installed("helm", f"helm.sh/helm/v3/cmd/helm@{HELM}")


def helm_4() -> Path:
    """Return the path of helm 4; built once, in 1 to 3 minutes. For tests alone: the devstack installs with helm 3."""
    return installed("helm-4", f"helm.sh/helm/v4/cmd/helm@{HELM_4}", program="helm")


def kueue() -> tuple[Path, Path]:
    """Return the controller of Kueue, and the folder of its CRDs; built once, in an hour. For a test alone."""
    package = f"sigs.k8s.io/kueue/cmd/kueue@{KUEUE}"
    return installed("kueue", package, takes="an hour and 7 GB on two cores; what is compiled is kept"), kueue_crds()


def kwok() -> Path:
    """Return KWOK, which plays nodes and their pods; built once. For a benchmark alone."""
    return installed("kwok", f"sigs.k8s.io/kwok/cmd/kwok@{KWOK}")


def kubeconform() -> Path:
    """Return kubeconform, which compares manifests with JSON Schemas; built once. For a test alone."""
    return installed("kubeconform", f"github.com/yannh/kubeconform/cmd/kubeconform@{KUBECONFORM}", takes="ten seconds")


def otelcol() -> Path:
    """Return an OpenTelemetry Collector that passes on spans (devstack/otelcol); built once. For a test alone."""
    return program(_OTELCOL)


def kueue_crds() -> Path:
    """Return the folder of Kueue's CRDs, in the cache of Go's modules."""
    _require_go()
    module = json.loads(run(["go", "mod", "download", "-json", f"sigs.k8s.io/kueue@{KUEUE}"], doing="find Kueue's CRDs"))
    return Path(module["Dir"]) / "config/components/crd/bases"


def installed(name: str, package: str, *, program: str = "", takes: str = "1 to 3 minutes") -> Path:
    """Return the program of a published Go package such as `example.com/tool/cmd/tool@v1.2.3`; built once.

    NAME is its own, unless PROGRAM is.
    """
    version = package.partition("@")[2]

    def build(folder: Path) -> None:
        _require_go()
        folder.mkdir()
        with step(f"building {name} {version} from its Go module (the first time: {takes})"):
            _go("install", package, doing=f"build {name}", cwd=folder, env={"GOBIN": str(folder)})

    return cached(name, [version.encode()], build, keep=2) / (program or name)


def program(source: Path) -> Path:
    """Return the program of the Go module in the folder SOURCE, named after it; built once for each state of the folder."""

    def build(file: Path) -> None:
        _require_go()
        with step(f"building {source.name} from its Go module (the first time: half a minute)"):
            _go("build", "-ldflags", "-s -w", "-o", file, ".", doing=f"build {source.name}", cwd=source)

    return cached(source.name, [source, " ".join(_GO_ENV.values()).encode()], build, keep=2)


def kind() -> Path:
    """Return the path of kind: the one on PATH, or else one that is built once, in a minute."""
    if found := shutil.which("kind"):
        return Path(found)

    def build(folder: Path) -> None:
        _require_go()
        folder.mkdir()
        with step(f"building kind {KIND} from its Go module (the first time: a minute)"):
            _go("install", f"sigs.k8s.io/kind@{KIND}", doing="build kind", cwd=folder, env={"GOBIN": str(folder)})

    return cached("kind", [KIND.encode()], build, keep=2) / "kind"


def prometheus() -> Path:
    """Return the folder with `prometheus` and `promtool`; built once, in 6 minutes. The server shows no pages."""

    def build(folder: Path) -> None:
        _require_go()
        folder.mkdir()
        packages = [f"github.com/prometheus/prometheus/cmd/{name}" for name in ("prometheus", "promtool")]
        with step("building Prometheus from its Go module (the first time: 6 minutes on two cores)"):
            _go("build", "-ldflags", "-s -w", "-o", f"{folder}/", *packages, doing="build Prometheus", cwd=_PROMETHEUS)

    return cached("prometheus", [_PROMETHEUS, " ".join(_GO_ENV.values()).encode()], build, keep=2)


def kubernetes_version() -> str:
    """Return the version of Kubernetes that go.mod asks for, such as v1.34.4."""
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)", (_KUBE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise DevstackError("cannot tell the version of Kubernetes: devstack/kube/go.mod does not require k8s.io/kubernetes")
    return found[1]


def go_version(text: str) -> tuple[int, int] | None:
    """Read the release out of what `go version` or `go env GOVERSION` prints; None when it holds none."""
    found = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _require_go() -> None:
    wanted = ".".join(map(str, GO_MINIMUM))
    remedy = f"install Go {wanted} or newer from https://go.dev/dl/ and put it on PATH"
    if not shutil.which("go"):
        raise DevstackError(f"cannot build from Go modules: there is no `go` on PATH; {remedy}")
    found = go_version(subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout)
    if found is None or found < GO_MINIMUM:
        have = "an unknown version" if found is None else ".".join(map(str, found))
        raise DevstackError(f"cannot build from Go modules: `go` on PATH is {have}; {remedy}")


def _go(*arguments: str | Path, doing: str, cwd: Path, env: dict[str, str] | None = None) -> None:
    bundle = machine.ca_bundle()
    certificates = {"SSL_CERT_FILE": str(bundle)} if bundle and "SSL_CERT_FILE" not in os.environ else {}
    run(["go", *arguments], doing=doing, cwd=cwd, env=_GO_ENV | certificates | (env or {}))

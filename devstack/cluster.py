"""The control plane: etcd, API server, controller manager and scheduler of a real Kubernetes, on this machine.

The API server is at https://127.0.0.1:6443 (`DEVSTACK_API_PORT`), etcd at 127.0.0.1:23790 and the port after it
(`DEVSTACK_ETCD_PORT`). `DEVSTACK_API_SERVER_ARGS`, `DEVSTACK_CONTROLLER_MANAGER_ARGS` and `DEVSTACK_SCHEDULER_ARGS` add
flags, for example `--kube-api-qps=1000 --kube-api-burst=2000` for measurements of throughput.

etcd runs with --unsafe-no-fsync: this is a cluster for demo and tests, whose objects may be lost when the machine
itself crashes. So a cluster of an earlier boot is never taken up again; `up` starts a new one.
"""

import base64
import http.client
import json
import os
import shlex
import shutil
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devstack import network, tools
from devstack.cache import digest, state_dir
from devstack.process import run, running, start, stop, wait_until
from devstack.progress import DevstackError, step

NAMES = ("etcd", "apiserver", "controller-manager", "scheduler")
SERVICE_ADDRESS = "10.96.0.1"  # of the API server: the first of the Services' range
DOCUMENT_CLAIM = "processing-task-documents"
DOCUMENT_STORAGE_CLASS = "devstack-documents"

NODE = "node1"
_SERVICE_NAMES = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
# file name -> (subject, subject alternative names); each signs in, and serves where it has names
_CERTIFICATES = {
    "apiserver": (
        "/CN=kube-apiserver",
        ["IP:127.0.0.1", f"IP:{SERVICE_ADDRESS}", f"IP:{network.ADDRESS}", "DNS:localhost"]
        + [f"DNS:{name}" for name in _SERVICE_NAMES],
    ),
    "admin": ("/O=system:masters/CN=admin", []),
    "manager": ("/CN=system:kube-controller-manager", []),
    "scheduler": ("/CN=system:kube-scheduler", []),
    "proxy": ("/CN=system:kube-proxy", []),
    "node": (f"/O=system:nodes/CN=system:node:{NODE}", [f"IP:{network.ADDRESS}", f"DNS:{NODE}"]),
}


def up() -> None:
    """Start what is not running of the control plane and wait until it serves."""
    parts = tools.kube()
    with step("starting the control plane (etcd, API server, controller manager, scheduler)"):
        _make_pki()
        _write_kubeconfigs()
        etcd = _port("DEVSTACK_ETCD_PORT", 23790)
        if not running("etcd"):
            for port in (etcd, etcd + 1):
                network.require_free("127.0.0.1", port, "stop what does, or set DEVSTACK_ETCD_PORT to another port")
        client, peer = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{etcd + 1}"
        start(
            "etcd",
            [
                str(parts / "etcd"),
                "--name=etcd",
                f"--data-dir={state_dir() / 'etcd'}",
                "--unsafe-no-fsync",
                "--log-level=warn",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=etcd={peer}",
            ],
        )
        if not running("apiserver"):
            network.require_free("127.0.0.1", _api_port(), "stop what does, or set DEVSTACK_API_PORT to another port")
        # One that is replaced is not waited for: it would go on serving its watches for half a minute.
        start("apiserver", [str(parts / "kube-apiserver"), *_api_server_flags(client)], grace=1)
        wait_until("an API server that is ready", _ready, seconds=120, processes=["etcd", "apiserver"])
        manager = [str(parts / "kube-controller-manager"), *_controller_manager_flags()]
        start("controller-manager", manager, env=configured_by(kubeconfigs() / "manager"))
        scheduler = [str(parts / "kube-scheduler"), *_scheduler_flags()]
        start("scheduler", scheduler, env=configured_by(kubeconfigs() / "scheduler"))
        wait_until(
            "the controllers to work",
            lambda: bool(get("/api/v1/namespaces/default/serviceaccounts/default")),
            seconds=60,
            processes=NAMES,
        )
        apply([storage_class_manifest()])


def down() -> None:
    """End the control plane and forget its objects."""
    # Nothing in etcd is kept, so nothing has to end in order; the API server alone would take ten seconds.
    for name in reversed(NAMES):
        stop(name, kill=True)
    for name in ("etcd", "pki", "kubeconfigs", "kubeconfig"):
        path = state_dir() / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def kubeconfig() -> Path:
    """Return the file with the administrator's access."""
    return state_dir() / "kubeconfig"


def kubeconfigs() -> Path:
    """Return the folder with one kubeconfig for each part: admin, manager, scheduler, proxy and node."""
    return state_dir() / "kubeconfigs"


def pki() -> Path:
    """Return the folder of certificates and keys."""
    return state_dir() / "pki"


def configured_by(*files: Path) -> dict[str, str]:
    """Return a variable that changes with FILES, so that a process is replaced when its configuration has changed."""
    return {"DEVSTACK_CONFIGURATION": digest(files)}


def get(path: str) -> Any:
    """Return what the API server answers to GET PATH, as the administrator; ConnectionError for anything but 200."""
    status, body = _request("GET", path)
    if status != 200:
        raise ConnectionError(f"GET {path}: {status} {body[:200]!r}")
    return json.loads(body)


def apply(objects: Sequence[dict[str, Any]]) -> None:
    """Make OBJECTS (manifests) so in the cluster by server-side apply; DevstackError names what is refused."""
    if not objects:
        return
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    command = ["apply", "--server-side", "--force-conflicts", "--field-manager=devstack", "--filename=-"]
    run(
        [tools.kubectl(), f"--kubeconfig={kubeconfig()}", *command],
        doing="apply the devstack's objects to the cluster",
        stdin=manifest,
    )


def document_root() -> Path:
    """Return the host folder below which each task namespace has its folder of documents."""
    return state_dir() / "documents"


def document_volume(namespace: str) -> Path:
    """Make the volume that the claim `processing-task-documents` in NAMESPACE binds to; return its host folder.

    Idempotent. A volume whose claim was deleted, with its namespace or alone, is set free for a new claim; the
    documents stay.
    """
    folder = document_folder(namespace)
    name = f"documents-{namespace}"
    apply([document_volume_manifest(namespace, folder)])
    volume = get(f"/api/v1/persistentvolumes/{name}")
    bound_to = volume["spec"]["claimRef"].get("uid")
    if bound_to is not None and bound_to != _claim_uid(namespace):
        # Only if nothing changed since we looked: the version is part of the patch.
        version = volume["metadata"]["resourceVersion"]
        free = {"metadata": {"resourceVersion": version}, "spec": {"claimRef": {"uid": None, "resourceVersion": None}}}
        status, body = _request("PATCH", f"/api/v1/persistentvolumes/{name}", free)
        if status not in (200, 409):
            raise DevstackError(f"cannot free the document volume {name} for a new claim: {status} {body[:300]!r}")
        if status == 409:
            return document_volume(namespace)
    return folder


def document_folder(namespace: str) -> Path:
    """Make the host folder of the documents of NAMESPACE: readable for its pods, and nobody's to write but the host's.

    Below it is the folder for what tasks write.
    """
    folder = document_root() / namespace
    outputs = folder / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    for readable in (document_root(), folder):
        readable.chmod(0o755)
    outputs.chmod(0o777)  # a volume of the node's own is not given to the group of a pod that finds it mounted
    return folder


def document_volume_manifest(namespace: str, folder: Path, *, node: str = NODE) -> dict[str, Any]:
    """Return the PersistentVolume of FOLDER on NODE, kept for the document claim of NAMESPACE."""
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"documents-{namespace}"},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadOnlyMany", "ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": DOCUMENT_STORAGE_CLASS,
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": namespace,
                "name": DOCUMENT_CLAIM,
            },
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }


def storage_class_manifest() -> dict[str, Any]:
    """Return the StorageClass of document volumes: made by hand, and bound at once."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": DOCUMENT_STORAGE_CLASS},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "Immediate",
    }


def kubeconfig_content(server: str, authority: bytes, certificate: bytes, key: bytes) -> dict[str, Any]:
    """Return a kubeconfig (JSON is YAML) for SERVER with the PEM texts in it."""

    def data(pem: bytes) -> str:
        return base64.b64encode(pem).decode()

    user = {"client-certificate-data": data(certificate), "client-key-data": data(key)}
    name = "devstack"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": server, "certificate-authority-data": data(authority)}}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }


def _api_server_flags(etcd: str) -> list[str]:
    keys = pki()
    return [
        f"--etcd-servers={etcd}",
        f"--secure-port={_api_port()}",
        # The Service "kubernetes" may not point at loopback; pods reach this address.
        f"--advertise-address={network.ADDRESS}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",  # Pod Security is among the defaults
        "--allow-privileged",
        f"--client-ca-file={keys / 'ca.crt'}",
        f"--tls-cert-file={keys / 'apiserver.crt'}",
        f"--tls-private-key-file={keys / 'apiserver.key'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={keys / 'sa.pub'}",
        f"--service-account-signing-key-file={keys / 'sa.key'}",
        f"--service-cluster-ip-range={network.SERVICES}",
        # kubectl logs and exec go from here to the kubelet.
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-certificate-authority={keys / 'ca.crt'}",
        f"--kubelet-client-certificate={keys / 'admin.crt'}",
        f"--kubelet-client-key={keys / 'admin.key'}",
        *shlex.split(os.environ.get("DEVSTACK_API_SERVER_ARGS", "")),
    ]


def _controller_manager_flags() -> list[str]:
    keys = pki()
    return [
        f"--kubeconfig={kubeconfigs() / 'manager'}",
        "--leader-elect=false",
        "--secure-port=0",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={keys / 'sa.key'}",
        f"--root-ca-file={keys / 'ca.crt'}",
        f"--cluster-signing-cert-file={keys / 'ca.crt'}",
        f"--cluster-signing-key-file={keys / 'ca.key'}",
        # The default of 30 makes its start alone take 5 s; the lasting rate stays the default, as users have it.
        "--kube-api-burst=300",
        *shlex.split(os.environ.get("DEVSTACK_CONTROLLER_MANAGER_ARGS", "")),
    ]


def _scheduler_flags() -> list[str]:
    return [
        f"--kubeconfig={kubeconfigs() / 'scheduler'}",
        "--leader-elect=false",
        "--secure-port=0",
        *shlex.split(os.environ.get("DEVSTACK_SCHEDULER_ARGS", "")),
    ]


def _make_pki() -> None:
    """Make all keys and certificates once; the folder gets its name when it is complete."""
    if pki().exists():
        return
    new = pki().with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True, mode=0o700)
    elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def openssl(*arguments: str | Path, stdin: str | None = None) -> str:
        return run(["openssl", *arguments], doing="make the cluster's certificates", stdin=stdin, cwd=new)

    authority = ["-keyout", "ca.key", "-out", "ca.crt", "-days", "3650", "-subj", "/CN=processing-tasks-devstack"]
    openssl("req", "-x509", *elliptic, *authority)
    openssl("genrsa", "-out", "sa.key", "2048")
    openssl("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    for name, (subject, alternatives) in _CERTIFICATES.items():
        extensions = "extendedKeyUsage=serverAuth,clientAuth\n"
        if alternatives:
            extensions += f"subjectAltName={','.join(alternatives)}\n"
        (new / f"{name}.ext").write_text(extensions)
        request = openssl("req", "-new", *elliptic, "-keyout", f"{name}.key", "-subj", subject)
        signing = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "3650", "-extfile", f"{name}.ext"]
        openssl("x509", "-req", *signing, "-out", f"{name}.crt", stdin=request)
    new.rename(pki())


def _write_kubeconfigs() -> None:
    kubeconfigs().mkdir(exist_ok=True, mode=0o700)
    authority = (pki() / "ca.crt").read_bytes()
    for name in ("admin", "manager", "scheduler", "proxy", "node"):
        certificate, key = (pki() / f"{name}.crt").read_bytes(), (pki() / f"{name}.key").read_bytes()
        content = json.dumps(kubeconfig_content(f"https://127.0.0.1:{_api_port()}", authority, certificate, key))
        files = [kubeconfigs() / name] + ([kubeconfig()] if name == "admin" else [])
        for file in files:
            new = file.with_name(f".{file.name}.new")
            new.touch(mode=0o600)
            new.write_text(content)
            new.replace(file)


def _claim_uid(namespace: str) -> str | None:
    status, body = _request("GET", f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{DOCUMENT_CLAIM}")
    if status == 404:
        return None
    if status != 200:
        raise DevstackError(f"cannot look at the document claim in {namespace}: {status} {body[:300]!r}")
    uid: str = json.loads(body)["metadata"]["uid"]
    return uid


def _ready() -> bool:
    return _request("GET", "/readyz")[0] == 200


def _request(method: str, path: str, patch: dict[str, Any] | None = None) -> tuple[int, bytes]:
    """Send one request as the administrator: much cheaper than a kubectl, for what is polled."""
    context = ssl.create_default_context(cafile=pki() / "ca.crt")
    context.load_cert_chain(pki() / "admin.crt", pki() / "admin.key")
    connection = http.client.HTTPSConnection("127.0.0.1", _api_port(), context=context, timeout=10)
    try:
        body = None if patch is None else json.dumps(patch)
        connection.request(method, path, body, {} if patch is None else {"Content-Type": "application/merge-patch+json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _api_port() -> int:
    return _port("DEVSTACK_API_PORT", 6443)


def _port(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or not 0 < int(text) < 65535:
        raise DevstackError(f"cannot use {name}={text}: it has to be a port number below 65535")
    return int(text)

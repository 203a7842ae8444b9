"""A real S3 server: the Versity S3 gateway (Apache-2.0) over a folder, built from its Go module."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from devstack import tools
from tests.support.servers import free_port, serving

VERSITYGW = "v1.8.0"
HOST = "s3.example.com"
"""Name of the server for requests that have the bucket in the name of the host."""


@dataclass(frozen=True)
class ObjectStore:
    """The server: a bucket is a folder below ``folder``, an object a file in it."""

    port: int
    folder: Path
    certificate_authority: str
    account: tuple[str, str] = ("owner", "secret-of-the-owner")
    """Reads everything."""
    stranger: tuple[str, str] = ("stranger", "secret-of-the-stranger")
    """Reads nothing but what is public."""

    def write(self, location: str, data: bytes) -> None:
        """Write an object, making its bucket where it is not there."""
        path = self.folder / location.removeprefix("s3://")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def settings(self, **changes: object) -> dict[str, object]:
        """Return the settings with which a runner reads the bucket ``manuals``."""
        given = {
            "s3_endpoint": f"https://127.0.0.1:{self.port}",
            "s3_access_key_id": self.account[0],
            "s3_secret_access_key": self.account[1],
            "s3_buckets": "manuals",
            "source_ca": self.certificate_authority,
        }
        return given | changes


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Run a server with TLS on 127.0.0.1 that keeps all below a folder. Objects in the bucket ``public`` are for all."""
    data, accounts, properties = (folder / name for name in ("data", "accounts", "properties"))
    for path in (data / "public", accounts, properties / "public/meta"):
        path.mkdir(parents=True)
    everybody = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject"], "Resource": ["arn:aws:s3:::public/*"]}
    (properties / "public/meta/policy").write_text(json.dumps({"Version": "2012-10-17", "Statement": [everybody]}))
    authority = trustme.CA()
    certificate = authority.issue_cert(HOST, f"*.{HOST}", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "cert.pem", append=True)
    port = free_port()
    store = ObjectStore(port, data, authority.cert_pem.bytes().decode())
    name, secret = store.stranger
    stranger = {"access": name, "secret": secret, "role": "user", "userID": 0, "groupID": 0}
    (accounts / "users.json").write_text(json.dumps({"accessAccounts": {name: stranger}}))
    command = [
        str(tools.installed("versitygw", f"github.com/versity/versitygw/cmd/versitygw@{VERSITYGW}")),
        *("--quiet", "--port", f"127.0.0.1:{port}", "--virtual-domain", HOST, "--iam-dir", str(accounts)),
        *("--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem")),
        *("posix", "--sidecar", str(properties), str(data)),
    ]
    environment = {**os.environ, "ROOT_ACCESS_KEY": store.account[0], "ROOT_SECRET_KEY": store.account[1]}
    with serving(command, port=port, log=folder / "log", environment=environment):
        yield store

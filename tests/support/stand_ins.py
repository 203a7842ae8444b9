"""Stand-ins of the programs `kind` and `docker`, for machines without Docker.

They record what they are called with, answer as the real ones do (kind v0.30.0, whose words these are), and keep what a
cluster is to kind: a name that is listed. Its kubeconfig is that of a real cluster, which somebody else has started; what
is loaded into it goes to the containerd of its node; and what Docker builds has been built before.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = "STAND_IN_FOLDER"


class StandIns:
    """The two programs in FOLDER/bin, which goes to the front of PATH, and what they were asked."""

    def __init__(self, folder: Path, programs: Sequence[str] = ("kind", "docker")) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for program in programs:
            file = folder / "bin" / program
            root = Path(__file__).parents[2]
            call = f'PYTHONPATH={root} exec {sys.executable} -m tests.support.stand_ins {program} "$@"'
            file.write_text(f"#!/bin/sh\n{call}\n")
            file.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which the stand-ins are found."""
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", FOLDER: str(self.folder)}

    def hand_over(self, *, kubeconfig: Path, containerd: Path, images: Mapping[str, Path]) -> None:
        """Give them a real cluster, the socket of its node's containerd, and docker-archive files by the images' names."""
        (self.folder / "answer").write_text(kubeconfig.read_text())
        (self.folder / "containerd").write_text(str(containerd))
        (self.folder / "images").write_text(json.dumps({name: str(path) for name, path in images.items()}))

    def calls(self, program: str) -> list[list[str]]:
        """Return the arguments of every call of PROGRAM, in order, and forget all calls."""
        record = self.folder / "record"
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return [call["arguments"] for call in map(json.loads, lines) if call["program"] == program]

    def set(self, name: str, *, on: bool) -> None:
        """Set one of the states: `docker-down`, `create-dies`, `cluster` (one that somebody else made)."""
        path = self.folder / name
        path.write_text("processing-tasks\n") if on else path.unlink(missing_ok=True)


def main(program: str, arguments: list[str]) -> int:
    """Act as PROGRAM."""
    folder = Path(os.environ[FOLDER])
    with (folder / "record").open("a") as record:
        record.write(json.dumps({"program": program, "arguments": arguments}) + "\n")
    return (_kind if program == "kind" else _docker)(folder, arguments)


def _kind(folder: Path, arguments: list[str]) -> int:
    cluster = folder / "cluster"
    options = dict(
        argument.removeprefix("--").split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument
    )
    match arguments[:2]:
        case ["get", "clusters"]:
            if cluster.exists():
                print(cluster.read_text().strip())
            else:
                print("No kind clusters found.", file=sys.stderr)
            return 0
        case ["create", "cluster"]:
            if cluster.exists():
                name = options["name"]
                return _fail(f'failed to create cluster: node(s) already exist for a cluster with the name "{name}"')
            _check(yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text()))
            cluster.write_text(options["name"] + "\n")
            if (folder / "create-dies").exists():
                os.kill(os.getppid(), 9)
                return 1
            Path(options["kubeconfig"]).write_text((folder / "answer").read_text())
            print(f'Creating cluster "{options["name"]}" ...', file=sys.stderr)
            return 0
        case ["get", "kubeconfig"]:
            if not cluster.exists():
                return _fail(f"could not locate any control plane nodes for cluster named '{options['name']}'.")
            print((folder / "answer").read_text())
            return 0
        case ["load", "image-archive"]:
            if not cluster.exists():
                return _fail(f'no nodes found for cluster "{options["name"]}"')
            for archive in arguments[2:]:
                if not archive.startswith("--"):
                    _import(folder, archive)
            return 0
        case ["delete", "cluster"]:
            print(f'Deleting cluster "{options["name"]}" ...', file=sys.stderr)
            cluster.unlink(missing_ok=True)
            return 0
    return _fail(f"unknown command {arguments}")


def _check(configuration: Mapping[str, Any]) -> None:
    """Refuse what kind's strict decoding would."""
    assert configuration.keys() == {"kind", "apiVersion", "nodes"}
    for node in configuration["nodes"]:
        assert node.keys() <= {"role", "image", "extraMounts", "extraPortMappings", "labels"}


def _docker(folder: Path, arguments: list[str]) -> int:
    if (folder / "docker-down").exists():
        print("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", file=sys.stderr)
        return 1
    match arguments[0]:
        case "save":
            archive = next(a.removeprefix("--output=") for a in arguments if a.startswith("--output="))
            _save(folder, archive, reference=arguments[-1])
        case "start":
            print(arguments[-1])
        case "network" if arguments[1] == "ls":
            print("0123456789ab")
        case "info" if "{{json .}}" in arguments:
            print(
                json.dumps(
                    {
                        "CgroupDriver": "systemd",
                        "CgroupVersion": "2",
                        "MemoryLimit": True,
                        "PidsLimit": True,
                        "CPUShares": True,
                    }
                )
            )
    return 0


def _save(folder: Path, archive: str, *, reference: str) -> None:
    """Write the image that was handed over under REFERENCE's name, as REFERENCE."""
    name = reference.rpartition("/")[2].partition(":")[0]
    source = Path(json.loads((folder / "images").read_text())[name])
    with tarfile.open(source) as content, tarfile.open(archive, "w") as copy:
        for member in content:
            if member.name == "manifest.json":
                [entry] = json.load(content.extractfile(member) or io.BytesIO())
                data = json.dumps([{**entry, "RepoTags": [reference]}]).encode()
                member.size = len(data)
                copy.addfile(member, io.BytesIO(data))
            elif member.name != "repositories":  # the same names in an older form
                copy.addfile(member, content.extractfile(member) if member.isreg() else None)


def _import(folder: Path, archive: str) -> None:
    """Load the image into the containerd that was handed over."""
    socket = (folder / "containerd").read_text()
    command = ["ctr", f"--address={socket}", "--namespace=k8s.io", "images", "import", archive]
    subprocess.run(command, check=True, capture_output=True)


def _fail(message: str) -> int:
    print(f"ERROR: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

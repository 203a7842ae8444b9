"""What the devstack needs of the machine: packages, a JDK, certificates, capabilities."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from devstack.process import run
from devstack.progress import DevstackError, say, step

_CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
_CNI_PLUGINS = ("bridge", "host-local", "loopback")
_CAP_SYS_RESOURCE = 24


def _command(*names: str) -> Callable[[], bool]:
    return lambda: all(shutil.which(name) for name in names)


# Debian package -> whether what we want of it is there, from whatever source.
_PROBES: Mapping[str, Callable[[], bool]] = {
    "iproute2": _command("ip"),
    "openssl": _command("openssl"),
    "nftables": _command("nft"),
    "iptables": _command("iptables"),
    "containerd": _command("containerd", "ctr", "containerd-shim-runc-v2"),
    "runc": _command("runc"),
    "containernetworking-plugins": lambda: _cni_folder() is not None,
    "conntrack": _command("conntrack"),
    "buildah": _command("buildah"),
    "mmdebstrap": _command("mmdebstrap"),
    "maven": _command("mvn"),
    "openjdk-21-jdk-headless": lambda: _java_home(21) is not None,
}
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "cluster": ("iproute2", "openssl", "nftables", "iptables"),
    "node": ("containerd", "runc", "containernetworking-plugins", "conntrack"),
    "images": ("buildah", "mmdebstrap"),
    "stores": ("iproute2", "openssl", "nftables", "maven", "openjdk-21-jdk-headless"),
}


def require(parts: Iterable[str]) -> None:
    """Make sure that the machine has what PARTS (cluster, node, images, stores) need, installing what it can.

    Installs with apt-get as root, saying what before. Raises DevstackError that names what is missing and how to get
    it when there is no apt-get or it has no such package.
    """
    packages = [package for part in parts for package in _NEEDS[part]]
    missing = missing_packages(packages)
    if not missing:
        return
    command = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    if not shutil.which("apt-get"):
        raise DevstackError(
            f"cannot find {' '.join(missing)} (Debian's names), and there is no apt-get to install them with: install "
            "what your distribution calls them"
        )
    say(f"Missing on this machine: {' '.join(missing)}. Installing with: {command}")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    with step("apt-get update"):
        run(["dpkg", "--configure", "-a"], doing="finish an installation that was interrupted", env=environment)
        run(["apt-get", "update"], doing="update the lists of packages", env=environment)
    if "openjdk-21-jdk-headless" in missing:  # newer releases of Debian carry a newer one only
        missing = [jdk_package() if name == "openjdk-21-jdk-headless" else name for name in missing]
    with step(f"apt-get install {' '.join(missing)}"):
        install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        run(install, doing=f"install {' '.join(missing)}", env=environment)
    if left := missing_packages(packages):
        raise DevstackError(f"cannot find what {' '.join(left)} should have installed: look at `{command}`")


def require_root() -> None:
    """Raise DevstackError for an ordinary user, naming the packages that root would install."""
    if os.geteuid() == 0:
        return
    missing = missing_packages(package for packages in _NEEDS.values() for package in packages)
    also = f"; it will install {' '.join(missing)}" if missing else ""
    raise DevstackError(
        "cannot set up bridges, mounts and containers as an ordinary user: run this as root (`sudo`), on a machine that "
        f"may be changed{also}"
    )


def missing_packages(packages: Iterable[str]) -> list[str]:
    """Return those of the Debian PACKAGES whose programs or files are not on this machine, each once, in order."""
    return [package for package in dict.fromkeys(packages) if not _PROBES[package]()]


def cni_folder() -> Path:
    """Return the folder of the CNI plugins: Debian's place or upstream's."""
    folder = _cni_folder()
    if folder is None:
        raise DevstackError("cannot find the CNI plugins: install the package containernetworking-plugins")
    return folder


def java_home(minimum: int = 21) -> Path:
    """Return the home of the newest JDK of at least release MINIMUM: from JAVA_HOME, PATH or /usr/lib/jvm."""
    home = _java_home(minimum)
    if home is None:
        raise DevstackError(
            f"cannot find a JDK {minimum} or newer: install one (for example Temurin from https://adoptium.net) and set "
            "JAVA_HOME to its folder"
        )
    return home


def jdk_package() -> str:
    """Return the oldest JDK package from 21 on that apt-get offers; DevstackError with the remedy if it has none."""
    listed = run(["apt-cache", "--names-only", "search", "^openjdk-[0-9]+-jdk-headless$"], doing="look for a JDK")
    releases = sorted(int(number) for number in re.findall(r"^openjdk-(\d+)-jdk-headless", listed, re.MULTILINE))
    for release in releases:
        if release >= 21:
            return f"openjdk-{release}-jdk-headless"
    raise DevstackError(
        "cannot install a JDK 21 or newer, which the search server needs: apt-get has none here; install one (for "
        "example Temurin from https://adoptium.net) and set JAVA_HOME to its folder"
    )


def ca_bundle() -> Path | None:
    """Return the file of certificates that this machine trusts, a company's own among them; None when there is none."""
    for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.environ.get(name) and Path(os.environ[name]).is_file():
            return Path(os.environ[name])
    for path in (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/certs/ca-bundle.crt")):
        if path.is_file():
            return path
    return None


def may_raise_limits() -> bool:
    """Whether we hold CAP_SYS_RESOURCE; inside some containers and microVMs root does not."""
    return has_capability(Path("/proc/self/status").read_text(), _CAP_SYS_RESOURCE)


def has_capability(status: str, capability: int) -> bool:
    """Whether bit CAPABILITY is in the effective set that STATUS (the text of /proc/PID/status) shows."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> capability & 1)


def java_release(version: str) -> int | None:
    """Read the release number out of what `java -version` prints, such as 25 (and 8 for 1.8); None if it has none."""
    found = re.search(r'version "(?:1\.)?(\d+)', version)
    return int(found[1]) if found else None


def _cni_folder() -> Path | None:
    for folder in _CNI_FOLDERS:
        if all((folder / plugin).exists() for plugin in _CNI_PLUGINS):
            return folder
    return None


def _java_home(minimum: int) -> Path | None:
    """Find a JDK (javac too); JAVA_HOME wins, then the newest."""
    homes: list[Path] = []
    if os.environ.get("JAVA_HOME"):
        homes.append(Path(os.environ["JAVA_HOME"]))
    if on_path := shutil.which("javac"):
        homes.append(Path(on_path).resolve().parent.parent)
    if Path("/usr/lib/jvm").is_dir():
        homes += sorted(path for path in Path("/usr/lib/jvm").iterdir() if not path.is_symlink())
    best: tuple[int, Path] | None = None
    for position, home in enumerate(homes):
        if not (home / "bin" / "javac").exists():
            continue
        told = subprocess.run([home / "bin" / "java", "-version"], capture_output=True, text=True, check=False).stderr
        release = java_release(told)
        if release is None or release < minimum:
            continue
        if position == 0 and os.environ.get("JAVA_HOME"):
            return home
        if best is None or release > best[0]:
            best = (release, home)
    return best[1] if best else None

"""What an image is made of, read out of its archive: its weight by distribution, and its bill of materials."""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.output.json import JsonV1Dot6

from devstack import sbom
from devstack.docker_archive import weigh, write_archive
from devstack.images import VARIANTS, Image, table
from devstack.progress import DevstackError

ROOT = Path(__file__).parents[2]
SITE = "opt/venv/lib/python3.11/site-packages"
RECORD = "one/__init__.py,,\none_pkg-1.0.dist-info/METADATA,,\none_pkg-1.0.dist-info/RECORD,,\n../../../bin/one,,\n"
METADATA = "Metadata-Version: 2.4\nName: One.Pkg\nVersion: 1.0\nSummary: 第一\n"
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u13
Description: GNU C Library
 and more

Package: left-over
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""
FILES = {
    "usr/bin/python3": "x" * 100,
    "etc/os-release": 'PRETTY_NAME="Debian"\nID=debian\nVERSION_ID="12"\n',
    "var/lib/dpkg/status": STATUS,
    f"{SITE}/one/__init__.py": "x" * 10,
    f"{SITE}/one/__pycache__/__init__.cpython-311.pyc": "x" * 7,
    f"{SITE}/one_pkg-1.0.dist-info/RECORD": RECORD,
    f"{SITE}/one_pkg-1.0.dist-info/METADATA": METADATA,
    "opt/venv/bin/one": "x" * 5,
    "opt/venv/pyvenv.cfg": "x" * 3,
}


def image(folder: Path, files: Mapping[str, str]) -> Image:
    with tarfile.open(folder / "layer.tar", "w") as layer:
        for name, content in files.items():
            (folder / "file").write_text(content, encoding="utf-8")
            layer.add(folder / "file", name)
    reference = "localhost/it:1"
    write_archive(folder / "image.tar", reference, folder / "layer.tar", config={})
    return Image(reference, folder / "image.tar")


def bill(image: Image) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(JsonV1Dot6(sbom.bill(image)).output_as_string())
    return found


def test_an_image_is_weighed_by_distribution(tmp_path: Path) -> None:
    it = image(tmp_path, FILES)
    base = sum(len(content) for name, content in FILES.items() if not name.startswith("opt/venv"))
    package = 10 + 7 + 5 + len(RECORD) + len(METADATA.encode())
    assert weigh(it.archive) == {"(base)": base, "one_pkg": package, "(environment)": 3}
    lines = table({"it": it}).splitlines()
    assert [line.split()[:-2] for line in lines[-2:]] == [["above", "the", "base"], ["total"]]


@pytest.mark.parametrize(
    ("fields", "licenses"),
    [
        ("License-Expression: Apache-2.0\n", [{"license": {"id": "Apache-2.0"}}]),
        ("License-Expression: MIT AND BSD-3-Clause\n", [{"expression": "MIT AND BSD-3-Clause"}]),
        ("License: A licence of our own\n", [{"license": {"name": "A licence of our own"}}]),
        (
            "License: MIT License\n        Permission is hereby\nClassifier: License :: OSI Approved :: MIT License\n",
            [{"license": {"name": "MIT License"}}],
        ),
        ("License: GPL or so: see (\n", [{"license": {"name": "GPL or so: see ("}}]),
        ("", None),
    ],
)
def test_a_bill_has_what_is_installed_with_its_licence(tmp_path: Path, fields: str, licenses: Any) -> None:
    found = bill(image(tmp_path, {**FILES, f"{SITE}/one_pkg-1.0.dist-info/METADATA": METADATA + fields}))
    assert found["metadata"]["component"]["name"] == "localhost/it"
    assert {component["purl"]: component["name"] for component in found["components"]} == {
        "pkg:pypi/one-pkg@1.0": "One.Pkg",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u13?arch=amd64&distro=debian-12": "libc6",
    }
    [python] = [component for component in found["components"] if component["name"] == "One.Pkg"]
    assert python["description"] == "第一"
    assert python.get("licenses") == licenses


def test_a_bill_is_written_and_holds_to_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "bills" / "it.cdx.json"
    sbom.write(sbom.bill(image(tmp_path, FILES)), path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert (written["bomFormat"], written["specVersion"]) == ("CycloneDX", "1.6")
    sbom.check(path.read_text(encoding="utf-8"), "it")
    del written["components"][0]["name"]
    with pytest.raises(DevstackError, match=r"cannot write .* it: it breaks the schema: .*name"):
        sbom.check(json.dumps(written), "it")


def test_lock_files_agree_on_every_version() -> None:
    """What is tested (dev) is what is shipped (operator, runner), and its variants differ by additions."""
    pins: dict[str, dict[str, set[str]]] = {}
    for file in ("dev", "operator", "runner", "torch", *VARIANTS):
        for line in (ROOT / f"requirements/{file}.txt").read_text().splitlines():
            name, equals, version = line.partition("==")
            if equals and not line.startswith(" "):
                version, _, _ = version.partition(" ;")  # where it is needed differs by what asks for it
                pins.setdefault(name, {}).setdefault(file, set()).add(version.rstrip(" \\"))
    whole = {"operator": {"dev"}, "runner": {"dev", "torch", *VARIANTS}}
    lacking = {
        name
        for name, found in pins.items()
        for file, others in whole.items()
        if file in found and not others <= found.keys()
    }
    assert not lacking, f"run make lock: {sorted(lacking)}"
    assert len(pins) > 50
    assert {name: found for name, found in pins.items() if len({frozenset(part) for part in found.values()}) > 1} == {}

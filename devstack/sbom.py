"""What is in an image, as a bill of materials: CycloneDX 1.6 in JSON, written and checked with CycloneDX' own library.

`python -m devstack.sbom` builds the images and writes one file for each.

Read out of the image's archive, so that it tells what was shipped rather than what was asked for: the metadata of Python's
distributions and dpkg's list. Libraries that a wheel brings inside itself are part of that wheel here.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import Final

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from devstack import images
from devstack.docker_archive import read
from devstack.progress import DevstackError

_DPKG: Final = PurePosixPath("/var/lib/dpkg/status")
_RELEASE: Final = frozenset({PurePosixPath("/etc/os-release"), PurePosixPath("/usr/lib/os-release")})
_SHORT: Final = 80
"""Some distributions have the whole text of a licence where its name should be."""


def bill(image: images.Image) -> Bom:
    """Return the Python distributions and the Debian packages of IMAGE."""
    _, texts = read(image.archive, _wanted)
    name, _, tag = image.reference.rpartition(":")
    root = Component(type=ComponentType.CONTAINER, name=name, version=tag, bom_ref=image.reference)
    found = [*_distributions(texts), *_packages(texts)]
    bom = Bom(components=found)
    bom.metadata.component = root
    bom.register_dependency(root, found)
    return bom


def write(bom: Bom, path: Path) -> None:
    """Write BOM to PATH. Raises DevstackError if it does not hold to CycloneDX' schema."""
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    check(text, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def check(text: str, name: str) -> None:
    """Raise DevstackError if TEXT is no CycloneDX 1.6 in JSON."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        said = " ".join(str(getattr(error.data, "message", error.data)).split())[:300]
        raise DevstackError(
            f"cannot write the bill of materials {name}: it breaks the schema: {said}; correct devstack/sbom.py"
        )


def _wanted(path: PurePosixPath) -> bool:
    return path == _DPKG or path in _RELEASE or (path.name == "METADATA" and path.parent.name.endswith(".dist-info"))


def _distributions(texts: Mapping[str, str]) -> Iterator[Component]:
    for path in sorted(texts):
        if PurePosixPath(path).name != "METADATA":
            continue
        fields = HeaderParser().parsestr(texts[path])
        name, version = fields["Name"], fields["Version"]
        purl = PackageURL("pypi", name=re.sub(r"[-_.]+", "-", name).lower(), version=version)
        yield Component(
            name=name,
            version=version,
            description=fields["Summary"],
            licenses=_licenses(fields["License-Expression"] or fields["License"], fields.get_all("Classifier", [])),
            purl=purl,
            bom_ref=str(purl),
        )


def _packages(texts: Mapping[str, str]) -> Iterator[Component]:
    release = "\n".join(text for path, text in texts.items() if PurePosixPath(path) in _RELEASE)
    system = dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)"?$', release, re.MULTILINE))
    distribution = system.get("ID", "debian")
    for paragraph in texts.get(str(_DPKG), "").split("\n\n"):
        fields = HeaderParser().parsestr(paragraph)
        if fields["Status"] != "install ok installed":
            continue
        qualifiers = {"arch": fields["Architecture"], "distro": f"{distribution}-{system.get('VERSION_ID', '')}".rstrip("-")}
        purl = PackageURL(
            "deb", namespace=distribution, name=fields["Package"], version=fields["Version"], qualifiers=qualifiers
        )
        yield Component(
            name=fields["Package"],
            version=fields["Version"],
            description=(fields["Description"] or "").partition("\n")[0],
            purl=purl,
            bom_ref=str(purl),
        )


def _licenses(name: str | None, classifiers: list[str]) -> list[License]:
    """Return the licence that a distribution names; none when it names none."""
    if not name or len(name) > _SHORT or "\n" in name:
        name = next((line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")), None)
    return [LicenseFactory().make_from_string(name)] if name else []


def main() -> int:
    """Write the bills of both images; the exit code is 0, or 1 with one sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m devstack.sbom", description="Writes what is in each image, as CycloneDX."
    )
    parser.add_argument("--folder", type=Path, default=Path("build/sbom"), help="where to [build/sbom]")
    folder: Path = parser.parse_args().folder
    try:
        for name, image in images.build().items():
            found, path = bill(image), folder / f"{name}.cdx.json"
            write(found, path)
            print(f"{path}: {len(found.components)} components")
    except DevstackError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

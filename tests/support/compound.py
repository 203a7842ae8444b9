"""Small compound files (OLE, [MS-CFB]) for tests, as old Office files are."""

from collections.abc import Mapping

_FREE, _END, _TABLE = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
_SECTOR = 512


def make_compound(
    streams: Mapping[str, bytes], *, embedded: Mapping[str, bytes] | None = None, directory_apart: bool = False
) -> bytes:
    """Return a compound file with streams in its root, and in a storage there, as a workbook has an embedded document.

    ``directory_apart`` scatters the directory over the file, its end first, as a file that was often saved has it.
    """
    entries = ["Root Entry", *streams]
    contents = [*streams.values()]
    if embedded:
        entries += ["MBD0001", *embedded]
        contents += embedded.values()
    at_root = range(1, 1 + len(streams) + bool(embedded))
    in_storage = range(at_root.stop, len(entries))

    # Sector 0 holds the allocation table; then the streams, then the directory.
    sectors: list[bytes] = [b""]
    table: list[int] = [_TABLE]

    def chain(content: bytes) -> int:
        first = len(sectors)
        pieces = [content[at : at + _SECTOR].ljust(_SECTOR, b"\0") for at in range(0, len(content), _SECTOR)]
        sectors.extend(pieces)
        table.extend([*range(first + 1, first + len(pieces)), _END])
        return first

    # Streams of less than 4096 bytes would lie in yet another structure.
    starts = [chain(content.ljust(4096, b"\0")) for content in contents]
    directory = b""
    of_contents = iter(zip(starts, contents, strict=True))
    for number, name in enumerate(entries):
        storage = number == 0 or name == "MBD0001"
        start, size = (0, 0) if storage else (lambda found: (found[0], max(4096, len(found[1]))))(next(of_contents))
        # A tree that is a list: each entry has the next one of its storage on its right.
        siblings = at_root if number in at_root else in_storage
        right = number + 1 if number and number + 1 in siblings else _FREE
        children = {0: at_root, at_root.stop - 1: in_storage if embedded else range(0)}.get(number, range(0))
        child = children.start if len(children) else _FREE
        encoded = name.encode("utf-16-le")
        directory += encoded.ljust(64, b"\0") + (len(encoded) + 2).to_bytes(2, "little")
        directory += bytes([5 if number == 0 else 1 if storage else 2, 1])
        directory += b"".join(field.to_bytes(4, "little") for field in (_FREE, right, child))
        directory += bytes(36) + (_END if number == 0 else start).to_bytes(4, "little") + size.to_bytes(8, "little")
    first = chain(directory)
    if directory_apart:
        used = range(first, len(sectors))
        for sector, content in zip(reversed(used), [sectors[number] for number in used], strict=True):
            sectors[sector] = content
        table[first:] = [_END, *range(first, len(sectors) - 1)]
        first = len(sectors) - 1
    sectors[0] = b"".join(entry.to_bytes(4, "little") for entry in table).ljust(_SECTOR, b"\xff")
    assert len(sectors[0]) == _SECTOR, "too much for one sector of the allocation table"
    header = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16)
    header += b"".join(field.to_bytes(2, "little") for field in (0x3E, 3, 0xFFFE, 9, 6)) + bytes(6)
    header += b"".join(field.to_bytes(4, "little") for field in (0, 1, first, 0, 4096, _END, 0, _END, 0, 0))
    return header.ljust(_SECTOR, b"\xff") + b"".join(sectors)

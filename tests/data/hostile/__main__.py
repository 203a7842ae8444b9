"""``python -m tests.data.hostile FOLDER`` writes all hostile files, to try them on something that runs."""

import sys
from pathlib import Path

from tests.data.hostile import all_files

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file in all_files():
        (folder / file.name).write_bytes(file.data)
        print(f"{file.reason or 'is read':20} {file.says[:60]:62} {file.name}")

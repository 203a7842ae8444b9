"""``make test-ocr``: the tests of scanned pages and pictures, where RapidOCR and ONNX Runtime are.

They are a download of 130 MB and 450 MB on disk, and bring libraries along that the other tests are run without.
"""

import sys

from tests.support.environments import Environment

OCR = Environment(
    name="ocr",
    what="OCR",
    installing="RapidOCR and ONNX Runtime (the first time: 130 MB to download)",
    needed=10**9,
    tests=("tests/ocr",),
)

if __name__ == "__main__":
    sys.exit(OCR.run_tests(sys.argv[1:]))

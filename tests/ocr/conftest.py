"""The tests of this folder need RapidOCR: `make test-ocr` runs them where it is, everything else passes them over."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("rapidocr") else ["test_*.py"]

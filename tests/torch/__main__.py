"""``make test-torch``: the tests of sentence-transformers, ONNX Runtime, and the contract of all models, where PyTorch is.

PyTorch is a download of 3 GB and 6 GB on disk.
"""

import sys

from tests.support.environments import Environment

TORCH = Environment(
    name="onnx-export",
    what="PyTorch",
    installing="PyTorch, sentence-transformers and ONNX (the first time: 3 GB to download)",
    needed=7 * 10**9,  # 5.9 GB of files
    tests=("tests/unit/test_runner_embed.py", "tests/torch"),
)

if __name__ == "__main__":
    sys.exit(TORCH.run_tests(sys.argv[1:]))

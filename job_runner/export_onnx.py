"""A model of sentence-transformers as a folder for ONNX Runtime: ``python -m job_runner.export_onnx SOURCE TARGET``.

Run where PyTorch is, with ``requirements/onnx-export.txt``; the image that uses the folder needs ``requirements/onnx.txt``
alone. TARGET gets ``onnx/model.onnx``, and the files of settings and the tokenizer as they are in SOURCE. What the export
says is compared with the model that was exported before it counts.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from job_runner import embed_onnx, embed_torch, model_folder
from task_contract.errors import ModelUnavailable

SAMPLE = ("A short text.", "知识库把文档切成片段，每个片段都有页码。", "A longer text, which goes on for a while. " * 8)
LEAST_COSINE = 0.999
_ONE_FILE = 2**30
"""Bytes of weights that go into the model's file; those of a larger model are beside it, as a file has less than 2 GiB."""


def export(source: Path, target: Path) -> float:
    """Write the folder, and return the lowest cosine between vectors of both.

    Raises ModelUnavailable for a model that ONNX Runtime cannot stand in for; then nothing is left at ``target``.
    """
    if target.exists():
        raise ModelUnavailable(f"cannot export to {target}: it exists; name a new folder")
    embed_onnx.recipe_of(source)  # what is not done with ONNX Runtime is said at once
    original = embed_torch.SentenceTransformerEmbedder(source)
    expected = original.embed(SAMPLE)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        _write(source, unfinished)
        found = embed_onnx.OnnxEmbedder(unfinished).embed(SAMPLE)
        if (cosine := float((expected * found).sum(axis=1).min())) < LEAST_COSINE:
            raise ModelUnavailable(f"cannot export {source}: its vectors and those of the export have cosine {cosine:.4f}")
        unfinished.rename(target)
    return cosine


def _write(source: Path, target: Path) -> None:
    import warnings

    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(source), device="cpu", local_files_only=True, trust_remote_code=False)[
        0
    ].auto_model.float()

    class TokenVectors(torch.nn.Module):  # type: ignore[misc]  # PyTorch is not in the environment of the type checker
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return vectors

    for path in model_folder.settings_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (target / "onnx").mkdir()
    example = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), torch.ones(2, 4, dtype=torch.int64)
    axes = {0: torch.export.Dim("texts", min=1, max=4096), 1: torch.export.Dim("tokens", min=2)}
    size = sum(path.stat().st_size for path in model_folder.weights_files(source))
    with warnings.catch_warnings(action="ignore"):  # of the exporter, about itself
        torch.onnx.export(
            TokenVectors().eval(),
            example,
            str(target / "onnx" / "model.onnx"),
            input_names=["input_ids", "attention_mask"],
            output_names=["token_embeddings"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            external_data=size > _ONE_FILE,
            verbose=False,
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m job_runner.export_onnx", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of sentence-transformers, or a carried model")
    parser.add_argument("target", type=Path, metavar="TARGET", help="new folder")
    options = parser.parse_args(arguments)
    try:
        source = model_folder.folder_of(str(options.source)) or options.source.absolute()
        cosine = export(source, options.target.absolute())
    except ModelUnavailable as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - the command line's own output
        return 1
    print(f"{options.target}: cosine with {options.source} at least {cosine:.6f}")  # noqa: T201 - likewise
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Decoders as torch exports them: their masks and positions are torch's, not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import trivium
from trivium.compiler import model as models
from trivium.passes.insert_kv_cache import InsertKVCache

from .test_decoders import GPT2, SMALL, make

KINDS = {"Llama": SMALL, "GPT2": GPT2, "Qwen2": SMALL, "Mistral": SMALL}

VARIANTS = [
    *((kind, "dynamo", 23, True) for kind in ("Llama", "GPT2")),
    *((kind, "dynamo", 20, True) for kind in ("Llama", "GPT2", "Mistral")),
    ("Llama", "dynamo", 20, False),
    *((kind, "torchscript", 17, True) for kind in ("Llama", "GPT2", "Qwen2")),
    ("GPT2", "torchscript", 14, False),
]
"""Architecture, exporter, opset, and whether its attention was torch's own or written out."""


def export(kind: str, exporter: str, opset: int, sdpa: bool, path: Path) -> None:
    """Export a random model of transformers with symbolic batch and sequence, without cache."""
    torch = pytest.importorskip("torch")
    theirs = make(kind, KINDS[kind] | {"use_cache": False}, path.parent / "checkpoint", sdpa=sdpa)

    class Logits(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch is Any where absent
        def __init__(self) -> None:
            super().__init__()
            self.model = theirs

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    ids = torch.zeros((2, 7), dtype=torch.int64)
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    given: Any = (ids, torch.ones_like(ids))
    if exporter == "torchscript":
        axes = {name: {0: "batch", 1: "seq"} for group in names.values() for name in group}
        torch.onnx.export(
            Logits(), given, path, dynamo=False, dynamic_axes=axes, opset_version=opset, **names
        )
        return
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=64)}
    program = torch.onnx.export(
        Logits(),
        given,
        dynamo=True,
        dynamic_shapes=(dims, dims),
        opset_version=opset,
        verbose=False,
        **names,
    )
    program.save(path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "exporter", "opset", "sdpa"), VARIANTS)
def test_cache_in_an_exported_decoder(
    kind: str, exporter: str, opset: int, sdpa: bool, tmp_path: Path
) -> None:
    path = tmp_path / "exported.onnx"
    export(kind, exporter, opset, sdpa, path)
    # ONNX Runtime does not broadcast the one row of cosines that torch's exporter leaves.
    batch, length, capacity = (1 if kind == "Llama" and opset == 23 else 2), 9, 12
    ids = np.random.default_rng(0).integers(0, 61, (batch, length))
    mask = np.ones_like(ids)
    mask[-1, :2] = 0
    (expected,) = ort.InferenceSession(path).run(None, {"input_ids": ids, "attention_mask": mask})
    for form in ("growing", "static"):
        model, _ = trivium.optimize(path)
        assert InsertKVCache(form=form, outputs="all")(model).modified
        cached_path = tmp_path / f"{form}.onnx"
        models.save(model, cached_path)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(cached_path, options)
        names = [output.name for output in session.get_outputs()]
        room = capacity if form == "static" else 0
        past = {
            value.name: np.zeros((batch, value.shape[1], room, value.shape[3]), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past")
        }
        found, seen = [], 0
        for size in (4, 1, 1, 3):
            end = seen + size
            feed = {"input_ids": ids[:, seen:end], "attention_mask": mask[:, :end], **past}
            if form == "static":
                feed["attention_mask"] = np.pad(mask[:, :end], ((0, 0), (0, capacity - end)))
                feed["cache_position"] = np.array([seen])
            outputs = dict(zip(names, session.run(names, feed), strict=True))
            past = {name: outputs[name.replace("past", "present")] for name in past}
            found.append(outputs["logits"])
            seen = end
        valid = mask == 1
        actual = np.concatenate(found, axis=1)
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(actual[valid], expected[valid], atol=3e-5)

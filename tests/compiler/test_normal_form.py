"""Real models keep their meaning in normal form, and normal form is what it says it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from trivium.compiler import model as models
from trivium.compiler import recipe, reference, samples, verify
from trivium.compiler.errors import BackendFailed, Unsupported
from trivium.compiler.types import Workload

REAL = [
    "attention_past_state",
    "bert_toy_optimized",
    "cifar_resnet20",
    "conv_bn_mul_add",
    "conv_int4_qdq",
    "conv_qdq_u8u8",
    "espcn_x3_float",
    "genai_tiny_gpt2_past",
    "genai_whisper_dummy_decoder",
    "gpt2_tiny_past",
    "lstm_bidir",
    "magika_v3_3",
    "mlperf_ad_autoencoder_fp32",
    "mlperf_ic_resnet8_fp32",
    "mlperf_ic_resnet8_int8_qdq",
    "mlperf_kws_dscnn_int8_qdq",
    "mnist_cnn_cntk",
    "mnist_mlp_onnxmlir",
    "mobilenetv2_imagenet_int8",
    "pytorch_superres_x3",
    "qdq_multi_consumer_dq",
    "residual_block",
    "scan_1",
    "silero_vad_16k_op15",
    "ultraface_rfb320",
]


def _reference(path: Path, model: ir.Model) -> tuple[list[dict[str, Any]], reference.Reference]:
    for size in (samples.DEFAULT_DIM, *samples.OTHER_DIMS):
        feeds = samples.seeded(model, Workload(), size=size)
        try:
            return feeds, reference.run_file(path, feeds)
        except BackendFailed:
            continue
    pytest.fail("no size runs")


@pytest.mark.parametrize("name", REAL)
def test_normal_form_of_a_real_model(
    name: str, shared_data: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = shared_data(f"models/{name}.onnx")
    model = models.load(path)
    feeds, expected = _reference(path, model)
    names = [[info.name for info in side] for side in models.signature(model)]

    capfd.readouterr()
    recipe.run(recipe.read(recipe.NORMALIZE), model)
    assert capfd.readouterr() == ("", "")

    assert model.opset_imports[""] == models.OPSET
    assert [[info.name for info in side] for side in models.signature(model)] == names
    assert not any(node.op_type == "Constant" for node in model.graph.all_nodes())
    assert not set(model.graph.inputs) & set(model.graph.initializers.values())
    actual = reference.run_model(model, feeds)
    assert verify.compare(expected.outputs, actual.outputs).within(1e-4)

    before = ir.to_proto(model).SerializeToString(deterministic=True)
    again = recipe.run(recipe.read(recipe.NORMALIZE), model)
    assert [row.name for row in again if row.modified] == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    if set(model.opset_imports) == {""}:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_domain_without_import_is_refused_by_node(shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(Unsupported, match="MultiThreshold_0") as caught:
        models.load(shared_data("models/finn_tfc_mnist_qonnx.onnx"))
    assert len(caught.value.refusals) == 4


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("gpt2_tiny_past", "stored more than once"),
        ("bert_toy_optimized", "topological order"),
        ("conv_bn_mul_add", "declared shape"),
        ("residual_block", "negative dimensions"),
    ],
)
def test_repairs_are_noted(name: str, telling: str, shared_data: Callable[[str], Path]) -> None:
    notes = models.notes_of(models.load(shared_data(f"models/{name}.onnx")))
    assert any(telling in note for note in notes), notes

"""The mesh that is picked: priced by the cost model, held to the memory, each loser with its
reason; and where a graph is cut into stages.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.models.conftest import random_model
from tests.passes.helpers import model
from trivium.backends.xla import cost, sharding
from trivium.compiler import shapes
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import declining
from trivium.compiler.targets import find
from trivium.compiler.types import Target, Workload
from trivium.compiler.work import resident_bytes
from trivium.passes.shard import Shard
from trivium.passes.sharding import share, stages

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

V5E = find("tpu-v5e:2x2")


def llama(folder: Path, batch: int = 4, **options: Any) -> ir.Model:
    made = random_model({**LLAMA, **options}, folder)
    shapes.bind(made, Workload(dims={"batch": batch, "seq": 16}))
    return made


def picked(made: ir.Model, target: Target) -> tuple[list[str], dict[str, str]]:
    """The meshes that a model is annotated for after the pass, and what it noted of each."""
    with declining() as notes:
        Shard(target=target, backend="xla")(made)
    said = {n.where: n.reason for n in notes if n.where.startswith("mesh")}
    return [one.name for one in made.device_configurations], said


def weights(made: ir.Model) -> float:
    return resident_bytes(made)


def test_a_small_model_is_left_to_the_backend(tmp_path: Path) -> None:
    names, said = picked(llama(tmp_path), V5E)
    assert names == []
    assert said["mesh none"].startswith("chosen: ")
    assert "times as long" in said["mesh dp=1,tp=4"]


def test_weights_that_do_not_fit_one_chip_are_split(tmp_path: Path) -> None:
    made = llama(tmp_path)
    small = replace(V5E, memory_bytes=0.75 * weights(made))
    names, said = picked(made, small)
    # The fewest parts that fit: the sums over two chips are cheaper than those over four.
    assert names == ["dp=2,tp=2"]
    assert said["mesh none"].startswith("does not fit: ")
    assert said["mesh dp=4,tp=1"].startswith("does not fit: ")
    assert "times as long" in said["mesh dp=1,tp=4"]
    assert "fewer stages" in said["mesh pp>=2"]
    estimate = cost.estimate(made, small, Workload())
    assert estimate.bytes_peak is not None
    assert estimate.bytes_peak < 0.75 * weights(made)
    assert any(op.op_type == "all-reduce" and op.bound == "link" for op in estimate.by_op)
    assert not Shard(target=small, backend="xla")(made).modified


def test_stages_are_taken_where_nothing_else_fits(tmp_path: Path) -> None:
    """One head: nothing to split over tp, a batch of one: nothing over dp."""
    made = llama(tmp_path, batch=1, num_attention_heads=1, num_key_value_heads=1)
    small = replace(V5E, memory_bytes=0.6 * weights(made))
    names, said = picked(made, small)
    assert "heads do not divide by tp=4" in said["mesh dp=1,tp=4"]
    assert names == ["pp=4,dp=1,tp=1"]
    assert "a batch of 1 does not divide by dp=2" in said["mesh pp=2,dp=2,tp=1"]
    estimate = cost.estimate(made, small, Workload())
    assert estimate.seconds is not None
    assert estimate.period_s is not None
    assert estimate.period_s < estimate.seconds / 2
    assert {op.op_type for op in estimate.by_op if op.bound == "link"} == {"send"}


def test_without_a_slice_or_a_backend_that_spreads_nothing_is_picked(tmp_path: Path) -> None:
    made = llama(tmp_path)
    assert picked(made, find("tpu-v5e")) == ([], {})
    with declining() as notes:
        Shard(target=find("nvidia-h100-sxm:2"), backend="tensorrt")(made)
    assert [n.reason for n in notes] == [
        "the backend tensorrt does not spread a model over devices"
    ]


def test_one_device_computes_its_share_and_asks_for_the_sums(tmp_path: Path) -> None:
    made = llama(tmp_path)
    Shard("dp=2,tp=2")(made)
    layout = sharding.read(made, 4)
    assert layout is not None
    own = share.local(made, layout.mesh, layout.specs)
    name = "model.layers.0.mlp.down_proj.weight"
    assert own.graph.initializers[name].const_value.shape == (64, 64)  # type: ignore[union-attr]
    attention = next(node for node in own.graph if node.op_type == "Attention")
    assert attention.inputs[0].shape == (2, 16, 32)  # type: ignore[union-attr]
    assert attention.attributes["q_num_heads"].value == 4
    asked = list(share.collectives(made.graph, layout.mesh, layout.specs))
    # One for each half of a layer and one for the embedding, each of [2, 16, 64] floats.
    assert {(c.kind, c.devices, c.size) for c in asked} == {("all-reduce", 2, 8192.0)}
    assert len(asked) == 2 * 4 + 1


def test_what_has_no_rule_is_gathered_once() -> None:
    made = model(
        "(float[4, 4] x) => (float[4, 4] y, float[4, 4] z)"
        " { p = Relu(x)  y = Hardmax(p)  z = Hardmax(p) }"
    )
    Shard("dp=2")(made)
    layout = sharding.read(made, 2)
    assert layout is not None
    (asked,) = share.collectives(made.graph, layout.mesh, layout.specs)
    assert (asked.kind, asked.value, asked.size) == ("all-gather", "p", 64.0)


def test_a_decoder_is_cut_between_its_layers(tmp_path: Path) -> None:
    made = llama(tmp_path, vocab_size=16)
    of = stages.assign(made.graph, 4)
    assert set(of.values()) == {0, 1, 2, 3}
    for node, stage in of.items():
        name = node.name or ""
        if name.startswith("layer."):
            assert int(name.split(".")[1]) == stage, name


def test_a_stage_is_a_model_and_the_chain_is_the_whole(tmp_path: Path) -> None:
    made = llama(tmp_path)
    Shard("pp=2,dp=1,tp=2")(made)
    first, second = (stages.extract(made, index, "pp=2,dp=1,tp=2") for index in range(2))
    assert first.received == ()
    assert set(second.received) == set(first.sent)
    assert [v.name for v in second.model.graph.outputs] == ["logits"]
    names = {v.name for v in first.model.graph.inputs}
    assert names == {"input_ids", "attention_mask"}
    together = len(first.model.graph) + len(second.model.graph)
    assert together == len(made.graph)
    stored = weights(first.model) + weights(second.model)
    assert stored == pytest.approx(weights(made), rel=0.01)
    for index, part in enumerate((first, second)):
        layout = sharding.read(part.model, 4, index, 2)
        assert layout is not None
        assert dict(layout.mesh) == {"x1": 2}


def test_what_cannot_be_cut_says_why() -> None:
    one = model(
        "(float[4, 4] x, float[4, 400] a) => (float[4, 400] y) { y = MatMul(x, a) }",
        a=np.zeros((4, 400), np.float32),
    )
    with pytest.raises(BadInput, match="cannot be cut into 2 stages") as caught:
        Shard("pp=2")(one)
    assert "100% of the weights" in str(caught.value)
    branch = "then_branch = g () => (float[4] t) { t = Relu(x) }"
    other = branch.replace("then", "else").replace("g ()", "h ()").replace("t)", "u)")
    flow = model(
        "(bool c, float[4] x) => (float[4] y) { y = If (c) <" + branch + ", "
        + other.replace("{ t =", "{ u =") + "> }"
    )  # fmt: skip
    with pytest.raises(BadInput, match="control flow"):
        Shard("pp=2")(flow)

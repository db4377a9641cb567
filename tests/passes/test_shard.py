"""What splits with what, found by following the graph, and what is refused or left whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from tests.models.conftest import random_model
from tests.passes.helpers import declined, model
from tests.property import graphs
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import declining
from trivium.passes.insert_kv_cache import InsertKVCache
from trivium.passes.shard import Shard, plan
from trivium.passes.sharding.axes import Axes
from trivium.passes.sharding.mesh import Mesh, parse
from trivium.passes.sharding.movement import factors
from trivium.passes.sharding.rules import apply

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def llama(folder: Path, **options: Any) -> ir.Model:
    return random_model({**LLAMA, **options}, folder)


def weights(made: ir.Model, mesh: Mesh) -> dict[str, dict[int, str]]:
    """How the stored values of a model are split."""
    split, _ = plan(made.graph, mesh)
    return {v.name or "": s for v, s in split.items() if v.is_initializer()}


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def test_a_decoder_splits_as_megatron_does(tmp_path: Path) -> None:
    made = llama(tmp_path)
    split, reduced = plan(made.graph, Mesh(2, 4))
    stored = {v.name or "": s for v, s in split.items() if v.is_initializer()}
    columns, rows = {1: "tp"}, {0: "tp"}
    layer = {
        "self_attn.q_proj": columns, "self_attn.k_proj": columns, "self_attn.v_proj": columns,
        "self_attn.o_proj": rows, "mlp.gate_proj": columns, "mlp.up_proj": columns,
        "mlp.down_proj": rows,
    }  # fmt: skip
    assert stored == {
        "model.embed_tokens.weight": rows,
        "lm_head.weight": columns,
        **{f"model.layers.{i}.{name}.weight": how for i in range(2) for name, how in layer.items()},
    }
    # The embedding, and both halves of both layers.
    assert len(reduced) == 5
    assert all(split[value] == {0: "dp"} for value in reduced)
    assert split[made.graph.outputs[0]] == {0: "dp", 2: "tp"}


def test_names_do_not_matter(tmp_path: Path) -> None:
    made = llama(tmp_path)
    before = list(weights(made, Mesh(1, 4)).values())
    for index, value in enumerate(list(made.graph.initializers.values())):
        value.name = f"v{index}"
    assert list(weights(made, Mesh(1, 4)).values()) == before


def test_annotations_are_onnx_and_survive_a_file(tmp_path: Path) -> None:
    made = llama(tmp_path)
    assert Shard("dp=2,tp=4")(made).modified
    assert not Shard("dp=2,tp=4")(made).modified
    ir.save(made, tmp_path / "sharded.onnx")
    again = ir.load(tmp_path / "sharded.onnx")
    assert not Shard("tp=4,dp=2")(again).modified
    assert [(c.name, c.num_devices) for c in again.device_configurations] == [("dp=2,tp=4", 8)]
    node = next(n for n in again.graph if n.op_type == "Attention")
    (spec,) = node.sharding_of(node.outputs[0])
    assert [(d.axis, d.simple_shardings[0].num_shards) for d in spec.sharded_dims] == [
        (0, 2),
        (2, 4),
    ]
    assert spec.device == tuple(range(8))
    down = again.graph.initializers["model.layers.0.mlp.down_proj.weight"]
    (reader,) = (n for n, _ in down.uses())
    (spec,) = reader.sharding_of(down)
    # The four parts, each on one device of both rows of the mesh.
    groups = {entry.key: entry.value for entry in spec.index_to_device_group_map}
    assert [groups[key] for key in spec.device] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    # Another mesh is another configuration beside it.
    assert Shard("tp=2")(again).modified
    assert len(again.device_configurations) == 2


def test_heads_that_do_not_divide_are_refused_with_what_would(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"8 attention heads.* by tp=3; tp may be 1, 2, 4, 8$"):
        Shard("tp=3")(llama(tmp_path))
    made = llama(tmp_path, intermediate_size=36)
    with pytest.raises(BadInput, match=r"36 entries along axis 1 .* tp=8; tp may be 1, 2, 4$"):
        Shard("tp=8")(made)


@pytest.mark.parametrize("text", ["tp", "tp=0", "ep=2", "tp=2,tp=2", "tp=2;dp=2", "tp=-1"])
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no axis of a mesh"):
        parse(text)


def test_a_fixed_batch_has_to_divide() -> None:
    made = model("(float[6, 8] x) => (float[6, 8] y) { y = Relu(x) }")
    with pytest.raises(BadInput, match=r"x, axis 0: a batch of 6 .* dp=4; dp may be 1, 2, 3, 6"):
        Shard("dp=4")(made)


def test_few_key_value_heads_stay_whole_and_say_so(tmp_path: Path) -> None:
    made = llama(tmp_path, num_key_value_heads=2)
    with declining() as notes:
        stored = weights(made, Mesh(1, 8))
    assert stored["model.layers.0.self_attn.q_proj.weight"] == {1: "tp"}
    assert stored["model.layers.0.self_attn.o_proj.weight"] == {0: "tp"}
    assert "model.layers.0.self_attn.k_proj.weight" not in stored
    said = {(note.where, note.reason.partition(" (")[0]) for note in notes}
    expected = "axis 1: 2 key/value heads are fewer than the 8 devices"
    assert ("model.layers.0.self_attn.k_proj.weight", expected) in said


def test_a_vocabulary_that_does_not_divide_stays_whole(tmp_path: Path) -> None:
    made = llama(tmp_path, vocab_size=97)
    with declining() as notes:
        stored = weights(made, Mesh(1, 4))
    assert "lm_head.weight" not in stored
    assert "model.layers.1.mlp.up_proj.weight" in stored
    assert any(n.where == "lm_head.weight" and "97 entries" in n.reason for n in notes)


def test_a_tied_vocabulary_splits_once(tmp_path: Path) -> None:
    made = llama(tmp_path, tie_word_embeddings=True)
    split, _ = plan(made.graph, Mesh(1, 4))
    assert split[made.graph.initializers["model.embed_tokens.weight"]] == {0: "tp"}
    assert split[made.graph.outputs[0]] == {2: "tp"}


@pytest.mark.parametrize("form", ["growing", "static"])
def test_caches_split_with_their_heads(form: str, tmp_path: Path) -> None:
    made = llama(tmp_path)
    assert InsertKVCache(form)(made).modified
    split, reduced = plan(made.graph, Mesh(2, 4))
    caches = [v for v in (*made.graph.inputs, *made.graph.outputs) if "_key" in (v.name or "")]
    assert len(caches) == 4
    assert all(split[value] == {0: "dp", 1: "tp"} for value in caches)
    assert len(reduced) == 5


def test_columns_and_rows_alternate_in_a_chain() -> None:
    made = model(
        "(float[N, 4] x, float[4, 8] a, float[8] b, float[8, 6] c, float[6, 8] d)"
        " => (float[N, 8] y) { p = MatMul(x, a)  q = Add(p, b)  r = Relu(q)  s = MatMul(r, c)"
        "  t = Relu(s)  y = MatMul(t, d) }",
        a=zeros(4, 8), b=zeros(8), c=zeros(8, 6), d=zeros(6, 8),
    )  # fmt: skip
    assert weights(made, Mesh(1, 2)) == {
        "a": {1: "tp"}, "b": {0: "tp"}, "c": {0: "tp"}, "d": {1: "tp"},
    }  # fmt: skip


def test_what_has_no_rule_keeps_a_weight_whole() -> None:
    made = model(
        "(float[N, 4] x, float[4, 8] a, float[8, 4] c) => (float[N, 4] y)"
        " { p = MatMul(x, a)  q = Hardmax(p)  y = MatMul(q, c) }",
        a=zeros(4, 8), c=zeros(8, 4),
    )  # fmt: skip
    with declining() as notes:
        stored = weights(made, Mesh(2, 2))
    # The product after it is a fresh start.
    assert stored == {"c": {1: "tp"}}
    assert any(n.where == "a" and "ai.onnx::Hardmax" in n.reason for n in notes)
    assert any(n.where == "p" and "the batch is gathered" in n.reason for n in notes)


def test_a_packed_projection_stays_whole() -> None:
    made = model(
        "(float[N, 4] x, float[4, 16] a, float[8, 4] c) => (float[N, 4] y)"
        " { p = MatMul(x, a)  u, v = Split <axis = 1, num_outputs = 2> (p)"
        "  m = Mul(u, v)  t = MatMul(m, c)  y = Softmax(t) }",
        a=zeros(4, 16), c=zeros(8, 4),
    )  # fmt: skip
    with declining() as notes:
        assert weights(made, Mesh(1, 2)) == {"c": {0: "tp"}}
    assert any(n.where == "a" and "Split cuts it elsewhere" in n.reason for n in notes)


def test_padding_one_axis_leaves_the_others() -> None:
    made = model(
        "(float[N, 6] x) => (float[N, 8] y)"
        " { p = Constant <value = int64[2] {1, 1}> ()  a = Constant <value = int64[1] {-1}> ()"
        "  y = Pad (x, p, , a) }"
    )
    with declining() as notes:
        split, _ = plan(made.graph, Mesh(2, 1))
    assert split[made.graph.outputs[0]] == {0: "dp"}
    assert not notes


def test_scales_split_with_the_blocks_that_they_scale() -> None:
    made = model(
        "(float[N, 8] x, int8[8, 4] a, float[2, 4] s, float[4, 8] c) => (float[N, 8] y)"
        " { w = DequantizeLinear <axis = 0, block_size = 4> (a, s)  p = MatMul(x, w)"
        "  y = MatMul(p, c) }",
        a=np.zeros((8, 4), np.int8), s=zeros(2, 4), c=zeros(4, 8),
    )  # fmt: skip
    assert weights(made, Mesh(1, 2)) == {"a": {1: "tp"}, "s": {1: "tp"}, "c": {0: "tp"}}


def test_without_a_mesh_nothing_happens() -> None:
    made = model("(float[N, 8] x) => (float[N, 8] y) { y = Relu(x) }")
    assert declined(Shard(), made) == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["b", 4, 6], ["b", 24], [([0], [0]), ([1, 2], [1])]),
        (["b", 24, 2], ["b", 4, 6, 2], [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        (["b", "t", 8], [None, 8], [([0, 1], [0]), ([2], [1])]),
        ([6, 4], [4, 6], [([0, 1], [0, 1])]),
        ([2, 3, 4], [2, 3, 4], [([0], [0]), ([1], [1]), ([2], [2])]),
    ],
)
def test_reshapes_are_cut_into_the_shortest_runs(
    before: list[Any], after: list[Any], expected: list[Any]
) -> None:
    x, y = (ir.Value(name="v", shape=ir.Shape(dims)) for dims in (before, after))
    assert factors(x, y) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(made=graphs.models(max_steps=10))
def test_any_graph_is_split_without_contradiction(made: ir.Model) -> None:
    """Tied axes share their fate, no axis of the mesh is used twice, and a rerun is at rest."""
    mesh = Mesh(1, 2)
    try:
        split, _ = plan(made.graph, mesh)
    except BadInput:
        with pytest.raises(BadInput, match="do not divide by tp=2; tp may be"):
            Shard("tp=2")(made)
        return
    axes = Axes(mesh.tensor)
    for node in made.graph:
        apply(axes, node)
    for value, dims in split.items():
        assert len(set(dims.values())) == len(dims)
        for axis, name in dims.items():
            assert axes.blocked((value, axis)) is None
            for other, place in axes.members((value, axis)):
                assert split[other].get(place) == name
                assert isinstance(other.shape[place], ir.SymbolicDim) or (  # type: ignore[index]
                    other.shape[place] % 2 == 0  # type: ignore[index]
                )
    Shard("tp=2")(made)
    assert not Shard("tp=2")(made).modified

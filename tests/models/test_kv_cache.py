"""The KV-cache pass: feeding a decoder piece by piece gives what feeding it at once gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.compiler import model as models
from trivium.compiler.passing import declining
from trivium.passes.insert_kv_cache import InsertKVCache

from .conftest import assert_normal_form, random_model

Feed = dict[str, np.ndarray[Any, Any]]

VOCAB, CAPACITY = 61, 14
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2,
        "n_head": 4,
    },
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 8, **WINDOWS},
    "gemma2": {"model_type": "gemma2", **SMALL, "head_dim": 8, "sliding_window": 4},
    "gemma3": {
        "model_type": "gemma3_text", **SMALL, "head_dim": 8, "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "phi3": {"model_type": "phi3", **SMALL, "sliding_window": 5},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 3},
}  # fmt: skip


def session(model: ir.Model, folder: Path) -> ort.InferenceSession:
    assert_normal_form(model, folder)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(folder / "built.onnx", options)


class Cached:
    """A decoder with caches, fed piece by piece."""

    def __init__(self, session: ort.InferenceSession, batch: int) -> None:
        self.session = session
        self.names = [output.name for output in session.get_outputs()]
        self.inputs = {value.name: value.shape for value in session.get_inputs()}
        self.static = "cache_position" in self.inputs
        length = CAPACITY if self.static else 0
        self.caches: Feed = {
            name: np.full((batch, shape[1], length, shape[3]), 9, np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past")
        }
        self.seen = 0

    def feed(self, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Feed new tokens, with the mask of all tokens until then; return the logits."""
        feed = {"input_ids": ids, **self.caches}
        if self.static:
            room = np.zeros((mask.shape[0], CAPACITY - mask.shape[1]), np.int64)
            mask = np.concatenate([mask, room], axis=1)
            feed["cache_position"] = np.array([self.seen])
        if "attention_mask" in self.inputs:
            feed["attention_mask"] = mask
        outputs = dict(zip(self.names, self.session.run(self.names, feed), strict=True))
        self.caches = {name: outputs[name.replace("past", "present")] for name in self.caches}
        self.seen += ids.shape[1]
        logits: np.ndarray[Any, Any] = outputs["logits"]
        return logits


@pytest.fixture(scope="module", params=CONFIGS)
def sessions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ort.InferenceSession]:
    folder = tmp_path_factory.mktemp("kv")
    made = {"full": session(random_model(CONFIGS[request.param], folder), folder)}
    for form in ("growing", "static"):
        model = random_model(CONFIGS[request.param], folder)
        assert InsertKVCache(form=form, outputs="all")(model).modified
        made[form] = session(model, folder)
    return made


@st.composite
def pieces(draw: st.DrawFn) -> list[int]:
    """Lengths of the pieces that a sequence is fed in: 2 to CAPACITY tokens in all."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=6))
    while sum(sizes) > CAPACITY:
        sizes.pop()
    return sizes


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    sizes=pieces(),
    padding=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    form=st.sampled_from(["growing", "static"]),
    seed=st.integers(0, 99),
)
def test_piece_by_piece_equals_all_at_once(
    sessions: dict[str, ort.InferenceSession],
    sizes: list[int],
    padding: list[int],
    form: str,
    seed: int,
) -> None:
    """For any batch, left padding and division of the sequence."""
    length = sum(sizes)
    shape = (len(padding), length)
    ids = np.random.default_rng(seed).integers(0, VOCAB, shape)
    mask = (np.arange(length) >= np.minimum(padding, length - 1)[:, None]).astype(np.int64)
    (expected,) = sessions["full"].run(["logits"], {"input_ids": ids, "attention_mask": mask})
    cached = Cached(sessions[form], shape[0])
    found = []
    for size in sizes:
        end = cached.seen + size
        found.append(cached.feed(ids[:, cached.seen : end], mask[:, :end]))
    valid = mask == 1
    actual = np.concatenate(found, axis=1)
    np.testing.assert_allclose(actual[valid], expected[valid], atol=3e-5)


@pytest.mark.parametrize("form", ["growing", "static"])
def test_last_position_alone_reaches_the_vocabulary(form: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS["gemma2"], tmp_path)
    full = session(model, tmp_path)
    cached = random_model(CONFIGS["gemma2"], tmp_path)
    assert InsertKVCache(form=form)(cached).modified
    projection = next(node for node in cached.graph if node.name == "head.MatMul")
    assert projection.inputs[0] is not None
    assert str(projection.inputs[0].shape) == "[batch,1,32]"
    ids = np.arange(12).reshape(2, 6)
    mask = np.ones_like(ids)
    (expected,) = full.run(["logits"], {"input_ids": ids, "attention_mask": mask})
    actual = Cached(session(cached, tmp_path), 2).feed(ids, mask)
    assert actual.shape == (2, 1, VOCAB)
    np.testing.assert_allclose(actual[:, 0], expected[:, -1], atol=3e-5)


@pytest.mark.parametrize("form", ["growing", "static"])
def test_greedy_generation_equals_the_reference(
    form: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shared_data("llm-shakespeare")
    expected = np.load(folder / "reference.npz")["greedy_ids"]
    model = models.load(folder)
    assert InsertKVCache(form=form)(model).modified
    cached = Cached(session(model, tmp_path), 1)
    if form == "static":
        cached.caches = {
            name: np.zeros((1, 4, expected.size, 32), np.float32) for name in cached.caches
        }
    ids, tokens = expected[None, :32], list(expected[:32])
    while len(tokens) < expected.size:
        mask = np.ones((1, len(tokens)), np.int64)
        if form == "static":
            mask = np.pad(mask, ((0, 0), (0, expected.size - len(tokens))))
        tokens.append(int(_next(cached, ids, mask).argmax()))
        ids = np.array([tokens[-1:]])
    np.testing.assert_array_equal(tokens, expected)


def _next(
    cached: Cached, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    feed = {"input_ids": ids, "attention_mask": mask, **cached.caches}
    if cached.static:
        feed["cache_position"] = np.array([cached.seen])
    outputs = dict(zip(cached.names, cached.session.run(cached.names, feed), strict=True))
    cached.caches = {name: outputs[name.replace("past", "present")] for name in cached.caches}
    cached.seen += ids.shape[1]
    logits: np.ndarray[Any, Any] = outputs["logits"][0, -1]
    return logits


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"], tmp_path)
    assert InsertKVCache()(model).modified
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not InsertKVCache()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def declined(model: ir.Model) -> str:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with declining() as notes:
        assert not InsertKVCache()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    (note,) = notes
    return f"{note.where}: {note.reason}"


def test_attention_that_sees_the_future_is_left_alone(tmp_path: Path) -> None:
    config = {
        "model_type": "bert", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    reason = declined(random_model(config, tmp_path))
    assert reason == "layer.0.attention.Attention: it may look at tokens that are yet to come"


def test_rotation_that_depends_on_the_whole_sequence_is_left_alone(tmp_path: Path) -> None:
    factors = {"short_factor": [1, 1, 1, 1], "long_factor": [2, 3, 4, 5]}
    scaling = {"type": "longrope", "original_max_position_embeddings": 8, **factors}
    config = CONFIGS["phi3"] | {"rope_scaling": scaling}
    assert "depends on the whole sequence" in declined(random_model(config, tmp_path))


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("CumSum", {}),
        ("ReduceMean", {"keepdims": 1}),
        ("Softmax", {"axis": 1}),
        ("LpNormalization", {"axis": 1}),
    ],
)
def test_node_that_mixes_positions_is_named(
    op_type: str, attributes: dict[str, int], tmp_path: Path
) -> None:
    model = random_model(CONFIGS["llama"], tmp_path)
    gather = next(node for node in model.graph if node.name == "embedding.Gather")
    embedded = gather.outputs[0]
    readers = list(embedded.uses())
    inputs = [embedded]
    if op_type in ("CumSum", "ReduceMean"):
        axis = np.array([1] if op_type == "ReduceMean" else 1, np.int64)
        tensor = ir.tensor(axis, name="axis")
        value = ir.Value(name="axis", const_value=tensor, shape=ir.Shape(axis.shape))
        model.graph.register_initializer(value)
        inputs.append(value)
    mixer = ir.node(op_type, inputs, attributes, name="mixer")
    mixed = ir.node("Add", [embedded, mixer.outputs[0]], name="mixed")
    for node, name in ((mixer, "mixer.out"), (mixed, "mixed.out")):
        node.outputs[0].name = name
        node.outputs[0].type, node.outputs[0].shape = embedded.type, embedded.shape
    model.graph.insert_after(gather, [mixer, mixed])
    for reader, index in readers:
        reader.replace_input_with(index, mixed.outputs[0])
    assert declined(model).startswith("mixer: mixes positions")


def _ranks(op: Any, ints: Any, length: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Places of keys [t] and of queries [t, 1]."""
    zero, one = op("Squeeze", ints(0)), op("Squeeze", ints(1))
    keys = op("Range", zero, length, one)
    keys.type, keys.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["t"])
    return keys, op("Unsqueeze", keys, ints(1))


def _compared(op: Any, ints: Any, length: ir.Value) -> ir.Value:
    keys, queries = _ranks(op, ints, length)
    found: ir.Value = op("LessOrEqual", keys, queries)
    return found


def _window(op: Any, ints: Any, length: ir.Value) -> ir.Value:
    keys, queries = _ranks(op, ints, length)
    near = op("Less", op("Sub", queries, keys), ints(3))
    found: ir.Value = op("And", near, op("LessOrEqual", keys, queries))
    return found


def _triangle(op: Any, ints: Any, length: ir.Value) -> ir.Value:
    side = op("Unsqueeze", length, ints(0))
    ones = op("ConstantOfShape", op("Concat", side, side, axis=0), value=ir.tensor([1.0]))
    ones.type, ones.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["t", "t"])
    found: ir.Value = op("Cast", op("Trilu", ones, upper=0), to=ir.DataType.BOOL)
    return found


def _infinite(op: Any, ints: Any, length: ir.Value) -> ir.Value:
    allowed = op("Cast", _compared(op, ints, length), to=ir.DataType.FLOAT)
    one = op("Cast", op("Squeeze", ints(1)), to=ir.DataType.FLOAT)
    huge = op("Cast", op("Squeeze", ints(-1_000_000)), to=ir.DataType.FLOAT)
    found: ir.Value = op("Mul", op("Sub", one, allowed), huge)
    return found


def _future(op: Any, ints: Any, length: ir.Value) -> ir.Value:
    keys, queries = _ranks(op, ints, length)
    found: ir.Value = op("LessOrEqual", queries, keys)
    return found


def _late(op: Any, ints: Any, length: ir.Value) -> ir.Value:
    """Causal, but for the last three queries only."""
    keys, queries = _ranks(op, ints, length)
    last = op("GreaterOrEqual", queries, op("Sub", length, op("Squeeze", ints(3))))
    found: ir.Value = op("And", last, op("LessOrEqual", keys, queries))
    return found


MASKS: dict[str, Callable[[Any, Any, ir.Value], ir.Value]] = {
    "compared": _compared,
    "triangle": _triangle,
    "infinite": _infinite,
    "window": _window,
    "future": _future,
    "late": _late,
}


@pytest.mark.parametrize(
    ("guise", "reason"),
    [("future", "tokens that are yet to come"), ("late", "changes for earlier tokens")],
)
def test_mask_that_no_cache_can_serve_is_left_alone(guise: str, reason: str) -> None:
    assert reason in declined(by_hand(guise))


def by_hand(guise: str = "") -> ir.Model:
    """A decoder as others write it: [batch, heads, seq, size], lengths from Shape, and instead of
    is_causal a mask in one of the guises below."""
    rng = np.random.default_rng(0)
    graph = ir.Graph([], [], nodes=[], name="by-hand", opset_imports={"": 24})
    ids = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n", "t"]))
    graph.inputs.append(ids)

    def op(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, name=f"node{len(graph)}")
        node.outputs[0].name = f"value{len(graph)}"
        graph.append(node)
        return node.outputs[0]

    def store(array: np.ndarray[Any, Any]) -> ir.Value:
        name = f"constant{len(graph.initializers)}"
        value = ir.Value(
            name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )  # fmt: skip
        graph.register_initializer(value)
        return value

    def weight(*shape: int) -> ir.Value:
        return store(rng.standard_normal(shape).astype(np.float32) * 0.3)

    def ints(*content: int) -> ir.Value:
        return store(np.array(content, np.int64))

    length = op("Shape", ids, start=1, end=2)
    places = op("Slice", weight(20, 16), ints(0), length, ints(0))
    places.type = ir.TensorType(ir.DataType.FLOAT)
    places.shape = ir.Shape(["t", 16])  # as torch's exporter knows, and onnx's inference does not
    hidden = op("Add", op("Gather", weight(VOCAB, 16), ids), places)
    shape = op("Concat", op("Shape", ids), ints(4, 4), axis=0)
    parts = [
        op(
            "Transpose",
            op("Reshape", op("MatMul", hidden, weight(16, 16)), shape),
            perm=[0, 2, 1, 3],
        )
        for _ in range(3)
    ]
    if guise:
        mask = MASKS[guise](op, ints, op("Squeeze", length))
        mask.type = ir.TensorType(ir.DataType.BOOL if guise != "infinite" else ir.DataType.FLOAT)
        mask.shape = ir.Shape(["t", "t"])
        attended = op("Attention", *parts, mask)
    else:
        attended = op("Attention", *parts, is_causal=1)
    mixed = op("Transpose", attended, perm=[0, 2, 1, 3])
    merged = op("Reshape", mixed, op("Concat", op("Shape", ids), ints(16), axis=0))
    logits = op("MatMul", op("Add", merged, hidden), weight(16, VOCAB))
    logits.name = "logits"
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["n", "t", VOCAB])
    graph.outputs.append(logits)
    model = ir.Model(graph, ir_version=11)
    from trivium.passes.infer_shapes import InferShapes

    InferShapes()(model)
    return model


@pytest.mark.parametrize("form", ["growing", "static"])
@pytest.mark.parametrize("guise", ["", "compared", "triangle", "infinite", "window"])
def test_decoder_written_by_hand(guise: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "full.onnx"
    models.save(by_hand(guise), path)
    full = ort.InferenceSession(path)
    model = by_hand(guise)
    assert InsertKVCache(form=form, outputs="all")(model).modified
    path = tmp_path / "cached.onnx"
    models.save(model, path)
    cached = ort.InferenceSession(path)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 9))
    (expected,) = full.run(None, {"x": ids})
    length = CAPACITY if form == "static" else 0
    past = {f"past_{k}.0": np.zeros((2, 4, length, 4), np.float32) for k in ("key", "value")}
    found, seen = [], 0
    for size in (3, 1, 1, 4):
        feed = {"x": ids[:, seen : seen + size], **past}
        if form == "static":
            feed["cache_position"] = np.array([seen])
        logits, *present = cached.run(["logits", "present_key.0", "present_value.0"], feed)
        past = dict(zip(past, present, strict=True))
        found.append(logits)
        seen += size
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5)


def test_positions_counted_from_the_end_are_left_alone() -> None:
    model = by_hand()
    places = next(node for node in model.graph if node.op_type == "Slice")
    start = places.inputs[1]
    assert start is not None
    start.const_value = ir.tensor(np.array([-5]), name=start.name)
    assert "depends on the whole sequence" in declined(model)


def test_body_that_may_mix_positions_is_named() -> None:
    model = by_hand()
    gather = next(node for node in model.graph if node.op_type == "Gather")
    embedded = gather.outputs[0]
    readers = list(embedded.uses())
    bodies = {}
    for branch in ("then_branch", "else_branch"):
        inner = ir.node("CumSum", [embedded, model.graph.initializers["constant2"]], name=branch)
        inner.outputs[0].name = f"{branch}.out"
        bodies[branch] = ir.Graph([], inner.outputs, nodes=[inner], name=branch)
    flag = ir.node("Constant", [], {"value": ir.tensor(np.array(True))}, name="flag")
    flag.outputs[0].name = "flag.out"
    choice = ir.node("If", flag.outputs, bodies, name="choice")
    choice.outputs[0].name, choice.outputs[0].shape = "choice.out", embedded.shape
    model.graph.insert_after(gather, [flag, choice])
    for reader, index in readers:
        reader.replace_input_with(index, choice.outputs[0])
    assert declined(model).startswith("choice: its body may read any value")

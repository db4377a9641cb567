"""Layers that are the same: found whatever the graph's order, and run as one scan with one copy of
their weights, to the same numbers.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("jax", reason="jax is not installed (pip install 'trivium[tpu]')")

import trivium
from tests.models.conftest import random_model
from tests.passes.helpers import model
from trivium.backends.xla import platforms, rolling
from trivium.backends.xla.lowering import repeats
from trivium.backends.xla.lowering.constants import weights_of
from trivium.compiler import shapes
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.recipe import Recipe, Step
from trivium.compiler.targets import find
from trivium.compiler.types import Workload
from trivium.compiler.work import resident_bytes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

needs_tpu = pytest.mark.skipif(
    platforms.missing("tpu") is not None, reason=str(platforms.missing("tpu"))
)


def found(made: ir.Model) -> repeats.Repeats | None:
    return repeats.find(made.graph, weights_of(made))


def decoder(folder: Path, **options: Any) -> ir.Model:
    made = random_model({**LLAMA, **options}, folder)
    shapes.bind(made, Workload(dims={"batch": 2, "seq": 8}))
    return made


def test_the_layers_of_a_decoder_are_found_in_any_order(tmp_path: Path) -> None:
    made = decoder(tmp_path)
    one = found(made)
    assert one is not None
    # The first layer makes what all share (the mask), so the blocks begin in its middle.
    assert len(one.blocks) == 4
    assert len(one.carried) == 1
    assert len(one.stacked) == 9
    inside = [node for block in one.blocks for node in block]
    assert len(one.before) + len(inside) + len(one.after) == len(made.graph)
    nodes = list(made.graph)
    random.Random(1).shuffle(nodes)
    made.graph.remove(nodes)
    made.graph.extend(nodes)
    made.graph.sort()
    again = found(made)
    assert again is not None
    assert [[n.name for n in b] for b in again.blocks] == [[n.name for n in b] for b in one.blocks]


def test_what_differs_from_layer_to_layer_is_not_rolled(tmp_path: Path) -> None:
    assert found(decoder(tmp_path, num_hidden_layers=3)) is None
    made = decoder(tmp_path)
    norms = [node for node in made.graph if node.op_type == "RMSNormalization"]
    for index, node in enumerate(norms):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5 * (1 + index))
    assert found(made) is None


def test_a_weight_that_something_else_reads_too_is_in_no_stack(tmp_path: Path) -> None:
    made = decoder(tmp_path)
    down = made.graph.initializers["model.layers.2.mlp.down_proj.weight"]
    made.graph.append(node := ir.node("Relu", [down]))
    node.outputs[0].name = "seen"
    made.graph.outputs.append(node.outputs[0])
    one = found(made)
    assert one is None or all(down not in values for values in one.stacked.values())


def test_a_value_of_each_layer_that_is_returned_is_kept() -> None:
    lines = " ".join(
        f"p{i} = MatMul(x{i}, w{i})  y{i} = Relu(p{i})  x{i + 1} = Add(y{i}, x{i})"
        for i in range(6)
    )
    made = model(
        "(float[2, 4] x0, " + ", ".join(f"float[4, 4] w{i}" for i in range(6)) + ")"
        " => (" + ", ".join(f"float[2, 4] y{i}" for i in range(6)) + ", float[2, 4] x6)"
        " { " + lines + " }",
        **{f"w{i}": np.eye(4, dtype=np.float32) * (i + 1) for i in range(6)},
    )  # fmt: skip
    one = found(made)
    assert one is not None
    # The first reads an input where the others read what the one before it made.
    assert len(one.blocks) == 5
    from trivium.backends.xla.lowering import lower

    x = np.array([[1, -1, 2, -2], [0.5, 1, 0, 3]], np.float32)
    plain, rolled = (lower(made, roll=roll) for roll in (False, True))
    assert list(rolled.stacks.values()) == [[f"w{i}" for i in range(1, 6)]]
    want, have = (low.function(low.read(), {"x0": x}) for low in (plain, rolled))
    for name, value in want.items():
        np.testing.assert_array_equal(np.asarray(have[name]), np.asarray(value))


@pytest.mark.slow
@needs_tpu
def test_a_scan_is_spread_and_verified_like_any_program(tmp_path: Path) -> None:
    made = random_model(LLAMA, tmp_path)
    ir.save(made, tmp_path / "model.onnx")
    artifact = trivium.compile(
        tmp_path / "model.onnx",
        find("tpu-v5e:2x2"),
        out=tmp_path / "out",
        recipe=Recipe("spread", (Step("shard", {"mesh": "dp=2,tp=2"}),)),
        shape=["batch=4", "seq=8"],
        options={"scan": "always"},
        use_cache=False,
    )
    verification = artifact.manifest["verification"]
    assert verification["status"] == "passed"
    assert "on 4 devices simulated" in verification["compared"]["where"]
    program = artifact.manifest["details"]["xla"]["programs"]["main"]
    assert program["rolled"]["scan"] is True
    assert "while(" in (artifact.path / "main.hlo.txt").read_text()
    (name,) = [n for n, members in program["stacks"].items() if "mlp.down_proj" in members[0]]
    assert len(program["stacks"][name]) == 4
    # Stacked along a new axis; the rows of each are split as they were.
    assert program["partition"]["weights"][name][:2] == [[], ["x1"]]
    # One copy: what the program takes is no more than its weights.
    size = artifact.manifest["memory"]["weights_bytes"]
    assert size < 1.01 * resident_bytes(made)
    # On one device, the same numbers again.
    feed = {"input_ids": np.ones((4, 8), np.int64), "attention_mask": np.ones((4, 8), np.int64)}
    assert np.isfinite(artifact.load().run(feed)["logits"]).all()


@pytest.mark.slow
def test_auto_compiles_both_ways_above_the_threshold_and_keeps_one(tmp_path: Path) -> None:
    made = random_model({**LLAMA, "num_hidden_layers": 12}, tmp_path)
    ir.save(made, tmp_path / "model.onnx")
    options: dict[str, Any] = {"shape": ["batch=2", "seq=8"], "backend": "xla", "use_cache": False}
    kept, feed = [], {name: np.ones((2, 8), np.int64) for name in ("input_ids", "attention_mask")}
    for after in ("1e-6", "3600"):
        artifact = trivium.compile(
            tmp_path / "model.onnx",
            "cpu",
            out=tmp_path / after,
            options={"scan": "auto", "scan_after": after},
            **options,
        )
        assert artifact.manifest["verification"]["status"] == "passed"
        program = artifact.manifest["details"]["xla"]["programs"]["main"]
        choice = program["rolled"]
        assert choice["scan"] == bool(program["stacks"])
        assert choice["scan"] == ("while(" in (artifact.path / "main.hlo.txt").read_text())
        kept.append((choice, artifact.load().run(feed)["logits"]))
    (both, first), (one, second) = kept
    plain, rolled = both["unrolled"], both["rolled"]
    took = [way["trace_seconds"] + way["compile_seconds"] for way in (plain, rolled)]
    # Whichever it was on this machine, it follows from what is written down.
    pays = (
        took[1] <= rolling.SHORTER * took[0] and rolled["bytes"] <= rolling.LARGER * plain["bytes"]
    )
    assert both["scan"] == pays
    assert one["why"] == "it compiles within 3600 s"
    assert "rolled" not in one
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def way(seconds: float, size: int) -> Any:
    """An attempt that took so long and needs so much."""
    names = ("argument", "output", "alias", "temp", "generated_code")
    analysis = SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})
    analysis.temp_size_in_bytes = size
    compiled = SimpleNamespace(memory_analysis=lambda: analysis)
    return SimpleNamespace(trace_seconds=0.0, compile_seconds=seconds, compiled=compiled)


@pytest.mark.parametrize(
    ("changes", "scan_takes", "ways", "why"),
    [
        ({}, (10, 100), [False, True], "it compiles sooner"),
        ({}, (25, 100), [False, True], "a scan compiles no sooner"),
        ({}, (10, 200), [False, True], "a scan takes more memory"),
        ({"scan_after": 31.0}, (10, 100), [False], "it compiles within 31 s"),
        ({"alike": False}, (10, 100), [False], "no layers are the same"),
        ({"scan": "never"}, (10, 100), [False], "as asked"),
        ({"scan": "always"}, (90, 900), [True], "as asked"),
        ({"device": {"platform": "tpu"}}, (10, 100), [False], "not tried: libtpu"),
        ({"device": {"platform": "tpu"}, "scan": "always"}, (10, 100), [True], "as asked"),
        ({"caches": ["past"]}, (10, 100), [False], "not tried: its layers have caches"),
        ({"programs": {"a": {}, "b": {}}}, (10, 100), [False], "not tried: several programs"),
    ],
)
def test_what_is_compiled_and_why(
    changes: dict[str, Any], scan_takes: tuple[float, int], ways: list[bool], why: str
) -> None:
    job = {
        "scan": "auto", "scan_after": rolling.SOON, "device": {"platform": "cuda"},
        "programs": {"main": {}}, "caches": [], **changes,
    }  # fmt: skip
    tried = []

    def attempt(*, roll: bool) -> Any:
        tried.append(roll)
        return way(*scan_takes) if roll else way(30, 100)

    kept, details = rolling.choose(attempt, job, lambda: job.get("alike", True))
    assert tried == ways
    assert details["why"].startswith(why)
    assert details["scan"] == (why == "it compiles sooner" or job["scan"] == "always")
    assert kept.compile_seconds == (scan_takes[0] if details["scan"] else 30)


@pytest.mark.slow
def test_a_scan_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shape": ["batch=2", "seq=8"], "backend": "xla", "use_cache": False}
    small = random_model({**LLAMA, "num_hidden_layers": 2}, tmp_path)
    ir.save(small, tmp_path / "small.onnx")
    for given, told in (
        ({"scan": "sometimes"}, "give auto, always or never"),
        ({"scan_after": "soon"}, "scan_after: 'soon'.*give seconds"),
    ):
        with pytest.raises(BadInput, match=told):
            trivium.compile(tmp_path / "small.onnx", "cpu", options=given, **options)
    with pytest.raises(Unsupported, match="no layers that are the same"):
        trivium.compile(tmp_path / "small.onnx", "cpu", options={"scan": "always"}, **options)

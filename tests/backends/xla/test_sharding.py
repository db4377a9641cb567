"""Annotated models through XLA's partitioner: on devices that it makes of this CPU, against the
model on one; and compiled for a real slice, where memory and collectives have to be as planned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import trivium
from tests.models.conftest import random_model
from trivium.backends.xla import partition, platforms, sharding
from trivium.compiler import reference, verify
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.recipe import Recipe, Step
from trivium.compiler.targets import find
from trivium.compiler.types import Target
from trivium.compiler.work import resident_bytes
from trivium.passes.insert_kv_cache import InsertKVCache
from trivium.passes.shard import Shard
from trivium.passes.sharding import mesh as meshes
from trivium.passes.sharding.mesh import Mesh

needs_cpu = pytest.mark.skipif(platforms.missing() is not None, reason=str(platforms.missing()))
needs_tpu = pytest.mark.skipif(
    platforms.missing("tpu") is not None, reason=str(platforms.missing("tpu"))
)

EIGHT = Target("cpu:8", "cpu", ("xla",), chips=8)
FOUR = replace(EIGHT, name="cpu:4", chips=4)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
BERT: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "max_position_embeddings": 32, "hidden_act": "gelu",
}  # fmt: skip
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 96, "n_embd": 64,
    "n_head": 4, "n_layer": 2, "n_positions": 32,
}  # fmt: skip

RUN = """
import sys
import numpy as np
import trivium
executable = trivium.load(sys.argv[1])
with np.load(sys.argv[2]) as feeds:
    np.savez(sys.argv[3], **executable.run(dict(feeds)))
print(executable.measures_target)
"""


def compiled(source: Path, target: Target, mesh: str, folder: Path, *shape: str) -> Artifact:
    steps = (Step("split-projections"), Step("shard", {"mesh": mesh})) if mesh else ()
    return trivium.compile(
        source,
        target,
        out=folder / f"out-{mesh}",
        backend="xla",
        recipe=Recipe("sharded", steps),
        shape=shape,
        use_cache=False,
    )


def program(artifact: Artifact) -> Mapping[str, Any]:
    found: Mapping[str, Any] = artifact.manifest["details"]["xla"]["programs"]["main"]
    return found


def on_devices(
    artifact: Artifact, feeds: Mapping[str, Any], devices: int, folder: Path
) -> dict[str, Any]:
    """Run an artifact in a process in which XLA makes so many devices of this CPU."""
    np.savez(folder / "feeds.npz", **feeds)
    results = folder / "results.npz"
    flags = f"--xla_force_host_platform_device_count={devices}"
    output = subprocess.run(
        [sys.executable, "-P", "-c", RUN, artifact.path, folder / "feeds.npz", results],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert output.strip() == "True"
    with np.load(results) as arrays:
        return dict(arrays)


def token_feeds(names: list[str]) -> dict[str, Any]:
    """Ids with padding on either side."""
    rng = np.random.default_rng(3)
    mask = np.ones((4, 16), np.int64)
    mask[1, :5] = mask[2, 12:] = 0
    all_ = {
        "input_ids": rng.integers(0, 96, (4, 16)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (4, 16)),
    }
    return {name: all_[name] for name in names}


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "mesh", "all_reduces"),
    [
        # One for each half of a layer, one for the embedding; none for the batch.
        (LLAMA, "dp=2,tp=4", 5),
        # Fewer key/value heads than devices.
        (LLAMA, "tp=8", 5),
        (BERT, "dp=2,tp=4", 5),
        # Queries, keys and values in one product, and the table of tokens once more at the end.
        (GPT2, "dp=2,tp=4", 5),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_a_split_model_computes_the_same(
    config: dict[str, Any], mesh: str, all_reduces: int, tmp_path: Path
) -> None:
    made = random_model(config, tmp_path)
    ir.save(made, tmp_path / "model.onnx")
    artifact = compiled(tmp_path / "model.onnx", EIGHT, mesh, tmp_path, "batch=4", "seq=16")
    verification = artifact.manifest["verification"]
    assert verification["status"] == "passed"
    assert "on 8 devices simulated on this CPU in place" in verification["compared"]["where"]
    found = program(artifact)
    assert found["partition"]["kind"] == "annotated"
    assert found["collectives"].keys() == {"all-reduce"}
    assert found["collectives"]["all-reduce"]["count"] == all_reduces
    feeds = token_feeds([value.name or "" for value in made.graph.inputs])
    (want,) = reference.run_model(made, [feeds]).outputs
    have = on_devices(artifact, feeds, 8, tmp_path)
    assert have.keys() == want.keys()
    for name, expected in want.items():
        np.testing.assert_allclose(have[name], expected, rtol=1e-4, atol=3e-5)


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize(("slice_", "mesh"), [("2x4", "pp=4,tp=2"), ("4x4", "pp=2,dp=2,tp=4")])
def test_a_chain_of_stages_computes_the_same(slice_: str, mesh: str, tmp_path: Path) -> None:
    made = random_model({**LLAMA, "num_hidden_layers": 4}, tmp_path)
    ir.save(made, tmp_path / "model.onnx")
    target = find(f"tpu-v5e:{slice_}")
    artifact = compiled(tmp_path / "model.onnx", target, mesh, tmp_path, "batch=4", "seq=16")
    verification = artifact.manifest["verification"]
    assert verification["status"] == "passed"
    assert "on 8 devices simulated on this CPU in place" in verification["compared"]["where"]
    stages = program(artifact)["stages"]
    parsed = meshes.parse(mesh)
    assert [one["name"] for one in stages] == [f"main.stage{i}" for i in range(parsed.stages)]
    assert stages[0]["receives"] == []
    assert stages[-1]["sends"] == []
    for before, after in pairwise(stages):
        assert set(after["receives"]) <= {name for one in stages for name in one["sends"]}
        # Not only the activations, but one stage is all that a chip holds.
        assert after["weights_bytes"] < program(artifact)["weights_bytes"] / parsed.stages
        assert before["memory"]["arguments"] > 0
    # Of the sums of Megatron's scheme, each stage has those of its layers.
    assert program(artifact)["collectives"]["all-reduce"]["count"] == 2 * 4 + 1
    assert f"in {parsed.stages} stages, one after the other" in artifact.manifest["notes"][0]


@needs_tpu
@pytest.mark.slow
def test_a_generator_in_stages_keeps_each_cache_where_it_is(tmp_path: Path) -> None:
    made = random_model(LLAMA, tmp_path)
    ir.save(made, tmp_path / "model.onnx")
    artifact = trivium.compile(
        tmp_path / "model.onnx",
        "tpu-v5e:2x2",
        out=tmp_path / "out",
        backend="xla",
        recipe=Recipe("staged", (Step("shard", {"mesh": "pp=2,tp=2"}),)),
        generator=True,
        context=24,
        prefill=(8,),
        use_cache=False,
    )
    assert artifact.manifest["verification"]["status"] == "passed"
    assert "4 devices simulated" in artifact.manifest["verification"]["compared"]["where"]
    for one in artifact.manifest["details"]["xla"]["programs"].values():
        for index, stage in enumerate(one["stages"]):
            assert {n for n in stage["inputs"] if "past" in n} == {
                f"past_key.{index}", f"past_value.{index}",
            }  # fmt: skip
            assert stage["memory"]["aliased"] < 0


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2,tp=4", "tp=8"])
def test_a_cache_stays_where_it_is_from_step_to_step(mesh: str, tmp_path: Path) -> None:
    """Split with its heads, or whole where there are fewer of them than devices."""
    made = random_model(LLAMA, tmp_path)
    assert InsertKVCache("static")(made).modified
    ir.save(made, tmp_path / "model.onnx")
    sizes = ("batch=4", "seq=2", "capacity=16")
    artifact = compiled(tmp_path / "model.onnx", EIGHT, mesh, tmp_path, *sizes)
    split = program(artifact)["partition"]
    assert split["inputs"]["past_key.1"] == split["outputs"]["present_key.1"]
    assert bool(split["inputs"]["past_key.1"]) == (mesh != "tp=8")
    # Nothing but the sums of Megatron's scheme: no cache travels.
    assert program(artifact)["collectives"].keys() == {"all-reduce"}
    assert program(artifact)["collectives"]["all-reduce"]["count"] == 5
    rng = np.random.default_rng(4)
    feeds: dict[str, Any] = {
        value.name or "": rng.standard_normal((4, 4, 16, 8)).astype(np.float32)
        for value in made.graph.inputs
        if "past" in (value.name or "")
    }
    mask = np.zeros((4, 16), np.int64)
    mask[:, :9] = 1
    feeds |= {"input_ids": rng.integers(0, 96, (4, 2)), "attention_mask": mask,
              "cache_position": np.array([7])}  # fmt: skip
    (want,) = reference.run_model(made, [feeds]).outputs
    have = on_devices(artifact, feeds, 8, tmp_path)
    for name, expected in want.items():
        np.testing.assert_allclose(have[name], expected, rtol=1e-4, atol=3e-5)


@needs_tpu
@pytest.mark.slow
def test_a_generator_is_spread_and_driven_on_simulated_devices(tmp_path: Path) -> None:
    """Nobody names a mesh: its weights do not fit one of these chips, so the planner picks one."""
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
    made = random_model({**LLAMA, **sizes}, tmp_path)
    ir.save(made, tmp_path / "model.onnx")
    small = replace(find("tpu-v5e:2x2"), memory_bytes=0.8 * resident_bytes(made))
    artifact = trivium.compile(
        tmp_path / "model.onnx",
        small,
        out=tmp_path / "out",
        backend="xla",
        generator=True,
        context=24,
        prefill=(8,),
        use_cache=False,
    )
    verification = artifact.manifest["verification"]
    assert verification["status"] == "passed"
    assert "on 4 devices simulated on this CPU" in verification["compared"]["where"]
    assert artifact.manifest["notes"] == ["spread over 4 devices as the model says: dp=1,tp=4"]
    for one in artifact.manifest["details"]["xla"]["programs"].values():
        assert one["partition"]["inputs"]["past_key.0"] == [[], ["x1"]]
        assert one["collectives"]["all-reduce"]["count"] == 5
        # Two caches for each layer of [1, 4, 24, 32] floats, a quarter on each chip, written in
        # place.
        assert one["memory"]["aliased"] <= -2 * 2 * 24 * 32 * 4


@needs_tpu
@pytest.mark.slow
def test_four_chips_hold_a_quarter_of_the_weights_each(tmp_path: Path) -> None:
    made = random_model({**LLAMA, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512},
                        tmp_path)  # fmt: skip
    ir.save(made, tmp_path / "model.onnx")
    v5e = find("tpu-v5e:2x2")
    sizes = ("batch=4", "seq=16")
    whole = compiled(tmp_path / "model.onnx", v5e, "", tmp_path, *sizes)
    split = compiled(tmp_path / "model.onnx", v5e, "tp=4", tmp_path, *sizes)
    assert program(whole)["partition"]["kind"] == "batch"
    assert program(whole)["collectives"] == {}
    assert program(split)["collectives"]["all-reduce"]["count"] == 5
    quarter = program(split)["memory"]["arguments"] / program(whole)["memory"]["arguments"]
    assert 0.25 <= quarter < 0.30
    assert (
        split.manifest["memory"]["per_device_bytes"]
        < whole.manifest["memory"]["per_device_bytes"] - 0.7 * program(whole)["weights_bytes"]
    )
    assert split.manifest["notes"] == ["spread over 4 devices as the model says: dp=1,tp=4"]
    # Each chip multiplies its own columns and rows.
    text = (split.path / "main.hlo.txt").read_text()
    assert "f32[256,128]" in text
    assert "f32[256,512]" not in text


@needs_cpu
@pytest.mark.slow
def test_a_mesh_too_large_to_simulate_is_verified_on_a_smaller_one(tmp_path: Path) -> None:
    made = random_model({**LLAMA, "num_hidden_layers": 1, "num_key_value_heads": 2}, tmp_path)
    ir.save(made, tmp_path / "model.onnx")
    many = replace(EIGHT, name="cpu:32", chips=32)
    artifact = compiled(tmp_path / "model.onnx", many, "dp=4,tp=8", tmp_path, "batch=4", "seq=16")
    where = artifact.manifest["verification"]["compared"]["where"]
    assert where.endswith("(a mesh of 2x4 instead of 4x8) in place of cpu:32")
    assert artifact.manifest["verification"]["status"] == "passed"
    # A wrong shard would have been seen: other weights give other numbers on the devices too.
    stored = artifact.path / artifact.manifest["weights"]
    data = bytearray(stored.read_bytes())
    data[-4096:] = bytes(4096)
    stored.write_bytes(data)
    damaged = Artifact.open(artifact.path, checked=False)
    assert verify.verify(damaged).status == "failed"


@pytest.mark.parametrize(
    ("mesh", "smaller"),
    [
        ({"x8": 4, "x1": 8}, {"x8": 2, "x1": 4}),
        ({"x1": 256}, {"x1": 8}),
        ({"x9": 3, "x1": 9}, {"x9": 1, "x1": 3}),
        ({"x8": 2, "x1": 4}, {"x8": 2, "x1": 4}),
        ({"x16": 2, "x4": 4, "x1": 4}, {"x16": 2, "x4": 2, "x1": 2}),
    ],
    ids=str,
)
def test_a_reduced_mesh_divides_the_mesh(mesh: dict[str, int], smaller: dict[str, int]) -> None:
    assert partition.reduced(partition.Partition("annotated", mesh)).mesh == smaller


@needs_cpu
@pytest.mark.slow
def test_a_file_that_is_annotated_is_held_to_it(tmp_path: Path) -> None:
    made = random_model(LLAMA, tmp_path)
    Shard("dp=2,tp=4")(made)
    source = tmp_path / "model.onnx"
    ir.save(made, source)
    artifact = compiled(source, EIGHT, "", tmp_path, "batch=4", "seq=16")
    assert program(artifact)["collectives"]["all-reduce"]["count"] == 5
    with pytest.raises(BadInput, match="axis 0 has 3 entries, which do not divide over 2 devices"):
        compiled(source, EIGHT, "", tmp_path, "batch=3", "seq=16")
    with pytest.raises(BadInput, match=r"for dp=2,tp=4 \(8 devices\), and the target has 4"):
        compiled(source, FOUR, "", tmp_path, "batch=4", "seq=16")


def annotated(*specs: ir.ShardingSpec, devices: int = 8) -> ir.Model:
    """A model y = Relu(x) with annotations of x, given without it."""
    x = ir.Value(name="x", shape=ir.Shape([8, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 24})
    model = ir.Model(graph, ir_version=11)
    configuration = model.add_device_configuration("grid", num_devices=devices)
    bound = tuple(ir.ShardingSpec(x, s.device, s.index_to_device_group_map, s.sharded_dims)
                  for s in specs)  # fmt: skip
    node.device_configurations = (ir.NodeDeviceConfiguration(configuration, bound),)
    return model


def dim(axis: int, shards: int) -> ir.ShardedDim:
    return ir.ShardedDim(axis, (ir.SimpleShardedDim(8, shards),))


@pytest.mark.parametrize(
    ("device", "dims", "mesh", "expected"),
    [
        (tuple(range(8)), [dim(0, 8)], {"x1": 8}, [["x1"]]),
        (tuple(range(8)), [dim(0, 2), dim(-1, 4)], {"x4": 2, "x1": 4}, [["x4"], [], ["x1"]]),
        # The second axis of the tensor moves slowest.
        ((0, 4, 1, 5, 2, 6, 3, 7), [dim(0, 4), dim(1, 2)], {"x4": 2, "x1": 4}, [["x1"], ["x4"]]),
    ],
)
def test_annotations_of_others_become_a_mesh(
    device: tuple[int, ...], dims: list[ir.ShardedDim], mesh: dict[str, int], expected: Any
) -> None:
    model = annotated(ir.ShardingSpec(None, device, (), tuple(dims)))
    layout = sharding.read(model, 8)
    assert layout is not None
    assert (layout.mesh, layout.of(model.graph.inputs)) == (mesh, {"x": expected})


def test_annotations_that_no_mesh_has_are_unsupported() -> None:
    swapped = ir.ShardingSpec(None, (0, 1, 2, 3, 4, 5, 7, 6), (), (dim(0, 8),))
    with pytest.raises(Unsupported, match="x: the shards along its axis 0 lie on devices in no"):
        sharding.read(annotated(swapped), 8)
    few = ir.ShardingSpec(None, (0, 1), (), (dim(0, 2),))
    with pytest.raises(Unsupported, match="x: its 2 shards are not spread over all of 8 devices"):
        sharding.read(annotated(few), 8)
    whole = ir.ShardingSpec(None, tuple(range(8)), (), (dim(0, 8),))
    other = ir.ShardingSpec(None, tuple(range(8)), (), (dim(1, 8),))
    with pytest.raises(Unsupported, match="x: two nodes want it split in different ways"):
        sharding.read(annotated(whole, other), 8)


@pytest.mark.parametrize("mesh", [Mesh(2, 4), Mesh(4, 2), Mesh(1, 8), Mesh(8, 1)], ids=str)
def test_what_the_pass_writes_is_read_back(mesh: Mesh, tmp_path: Path) -> None:
    made = random_model(LLAMA, tmp_path)
    Shard(str(mesh))(made)
    layout = sharding.read(made, 8)
    assert layout is not None
    lengths = sorted(size for size in mesh.sizes.values() if size > 1)
    assert sorted(layout.mesh.values()) == lengths
    down = made.graph.initializers["model.layers.1.mlp.down_proj.weight"]
    axes = layout.specs.get(down, [])
    parts = [layout.mesh[name] for names in axes for name in names]
    assert parts == ([mesh.tensor] if mesh.tensor > 1 else [])
    assert json.loads(json.dumps(axes)) == axes
    assert meshes.parse(layout.name) == mesh

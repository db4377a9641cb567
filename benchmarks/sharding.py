"""What sharding does to a 7B-shaped decoder on v5e slices: writes docs/sharding.md.

    python benchmarks/sharding.py [--layers 32] [--batch 32] [--seq 128] [-o FILE]

The model has the sizes of Llama 2 7B and weights by shape only: nothing is downloaded, allocated or
run. Every row is a compile of the sharded graph by libtpu, in a process of its own because libtpu
is configured for one slice; memory is that compiler's analysis of one chip.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trivium.backends.xla import compiling, exporting, hlo, partition, platforms, sharding, worker
from trivium.backends.xla.lowering import lower
from trivium.compiler import plugins, shapes, targets
from trivium.compiler.types import Workload
from trivium.models import decoder, llama
from trivium.models.checkpoint import Checkpoint
from trivium.passes.shard import Shard

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip

MESHES = (
    ("1x1", ""),
    ("2x2", "tp=4"),
    ("2x4", "tp=8"),
    ("4x4", "tp=16"),
    ("4x4", "dp=2,tp=8"),
    ("4x8", "tp=32"),
    ("4x8", "dp=4,tp=8"),
    ("8x8", "dp=8,tp=8"),
    ("16x16", "dp=32,tp=8"),
    ("16x16", "dp=8,tp=32"),
)

COLUMNS = (
    "chips", "slice", "mesh", "weights MB", "arguments MB", "outputs MB", "temporaries MB",
    "code MB", "total MB", "of 16 GiB", "all-reduces", "all-reduce MB", "others", "compile s",
)  # fmt: skip


class _Shapes(Checkpoint):
    """A checkpoint whose tensors have a shape and no content."""

    def tensor(
        self, name: str, shape: tuple[int, ...], *, transpose: bool = False
    ) -> ir.TensorProtocol:
        return _empty(name, shape, ir.DataType.FLOAT)


def _empty(name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.TensorProtocol:
    def content() -> ir.TensorProtocol:
        raise ValueError(f"{name} has a shape only")

    return ir.LazyTensor(content, dtype, ir.Shape(shape), cache=False, name=name)


def model(layers: int, sizes: Mapping[str, Any] = LLAMA_2_7B) -> ir.Model:
    """The decoder with so many layers, all of it in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        config = {**sizes, "num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (Path(folder) / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        checkpoint = _Shapes(Path(folder))
        made = decoder.build(llama.common(checkpoint.config, "llama"), checkpoint)
    half = ir.DataType.BFLOAT16
    for value in made.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = _empty(value.name or "", tensor.shape.numpy(), half)
    nodes = [value for node in made.graph for value in node.outputs]
    for value in (*made.graph.initializers.values(), *nodes):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = half
    return made


def measure(topology: str, mesh: str, layers: int, batch: int, seq: int) -> dict[str, Any]:
    """Compile for one slice; must run in the environment of `platforms.environment`."""
    device = platforms.device_of(targets.find(f"tpu-v5e:{topology}"))
    made = model(layers)
    Shard(mesh)(made)
    shapes.bind(made, Workload(dims={"batch": batch, "seq": seq}))
    started = time.perf_counter()
    devices = compiling.compile_devices(device)
    layout = sharding.read(made, len(devices))
    lowered = lower(made)
    split, spread = partition.SINGLE, None
    if layout is not None:
        split = spread = partition.annotated(layout, made.graph, lowered.places)
        lowered = lower(made, shardings=exporting.constraints(layout, split))
    exported = exporting.export(lowered, device, "default", split=spread)
    again = partial(compiling.compile_export, exported, lowered, split, devices)
    compiled = again()
    text = compiling.text_of(compiled, again)
    return {
        "memory": compiling.memory_of(compiled),
        "weights": sum(t.nbytes // split.shards(n) for n, t in lowered.weights.items()),
        "collectives": hlo.collectives(text),
        "seconds": time.perf_counter() - started,
    }


def main() -> int:
    """Compile every row, print it as it comes, write the page; or be the process of one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LLAMA_2_7B["num_hidden_layers"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--slice", action="append", default=[], help="only these slices")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/sharding.md"))
    given = parser.parse_args()
    if given.row:
        try:
            topology, mesh = given.row
            result = measure(topology, mesh, given.layers, given.batch, given.seq)
        except Exception as error:  # the compiler's own, in one line for the table
            result = {"error": str(worker.translated(error, f"v5e:{given.row[0]}"))}
        print(json.dumps(result))
        return 0
    rows = []
    for topology, mesh in MESHES:
        if not given.slice or topology in given.slice:
            rows.append(cells(topology, mesh, _in_a_process(topology, mesh, given)))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    given.output.write_text(page(given, rows), encoding="utf-8")
    return 0


def _in_a_process(topology: str, mesh: str, given: argparse.Namespace) -> dict[str, Any]:
    device = platforms.device_of(targets.find(f"tpu-v5e:{topology}"))
    sizes = [f"--{name}={getattr(given, name)}" for name in ("layers", "batch", "seq")]
    command = [sys.executable, __file__, "--row", topology, mesh, *sizes]
    run = subprocess.run(
        command,
        env={**os.environ, **platforms.environment(device)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def cells(topology: str, mesh: str, result: Mapping[str, Any]) -> list[str]:
    """The cells of one row."""
    target = targets.find(f"tpu-v5e:{topology}")
    head = [str(target.chips), topology, mesh or "none"]
    if "error" in result:
        return [*head, *[""] * (len(COLUMNS) - 4), result["error"]]
    memory, collectives = result["memory"], dict(result["collectives"])
    total = sum(memory.values())
    reduces = collectives.pop("all-reduce", {"count": 0, "bytes": 0})
    return [
        *head,
        f"{result['weights'] / 1e6:,.0f}",
        *(f"{memory[part] / 1e6:,.0f}" for part in ("arguments", "outputs", "temporaries", "code")),
        f"{total / 1e6:,.0f}",
        f"{total / (target.memory_bytes or 0):.0%}",
        str(reduces["count"]),
        f"{reduces['bytes'] / 1e6:,.0f}",
        ", ".join(f"{name} x{one['count']}" for name, one in collectives.items()) or "none",
        f"{result['seconds']:.0f}",
    ]


def page(given: argparse.Namespace, rows: Sequence[Sequence[str]]) -> str:
    """The page as Markdown."""
    backend = plugins.get("trivium.backends", "xla")
    versions = ", ".join(f"{name} {version}" for name, version in backend.toolchain().items())
    whole = LLAMA_2_7B["num_hidden_layers"]
    depth = f"all {whole}" if given.layers == whole else f"{given.layers} of the {whole}"
    lines = [
        "# A 7B decoder from 1 to 256 chips",
        "",
        f"Written by `python benchmarks/sharding.py` with {versions}. The shapes of Llama 2 7B "
        f"({depth} layers compiled, nothing scaled), bfloat16, a whole batch of {given.batch} "
        f"sequences of {given.seq} tokens in one call, logits for all of them. Each row is a real "
        "compile by libtpu for that v5e slice of the graph that `shard` annotated; nothing ran "
        "and no weight was allocated.",
        "",
        "All figures but the first three columns are for one chip. *Weights* are the bytes that "
        "the annotations leave on each chip, *arguments* what the compiler makes of them with "
        "padding and inputs. *all-reduce MB* is the size of their results. `tp=N` splits heads, "
        "feed-forward and vocabulary; one all-reduce for each half of a layer and one for the "
        "embedding is what Megatron-LM's scheme asks for "
        f"(2 x {given.layers} + 1 = {2 * given.layers + 1}). `dp=N` splits the batch: no "
        "collective, and weights that are not smaller. *compile s* is tracing and compiling by "
        "the wall clock, on a machine that had other work.",
        "",
        "Prefill and decode with caches, for 7B and 70B, are in [decoders.md](decoders.md).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(one)} |" for one in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

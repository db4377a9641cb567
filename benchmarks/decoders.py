"""7B and 70B decoders on slices that hold them, prefill and decode: writes docs/decoders.md.

    python benchmarks/decoders.py [--row SHAPE:TARGET ...] [--resume FILE.json] [-o FILE]

Shapes of Llama 2, bfloat16, static caches of 2048 tokens that are donated from call to call;
weights by shape only. The planner picks the mesh of each slice, with the decode step's time as its
measure; then the target's own compiler compiles both programs for it, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parent))

from sharding import LLAMA_2_7B, model  # type: ignore[import-not-found]

from trivium.backends.xla import (
    compiling,
    cost,
    exporting,
    hlo,
    partition,
    platforms,
    sharding,
    worker,
)
from trivium.backends.xla.lowering import lower
from trivium.compiler import shapes, targets
from trivium.compiler.errors import BadInput
from trivium.compiler.types import Workload
from trivium.passes.insert_kv_cache import InsertKVCache
from trivium.passes.shard import Shard

LLAMA_2_70B = {
    **LLAMA_2_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
CONFIGS = {"7B": LLAMA_2_7B, "70B": LLAMA_2_70B}

CONTEXT, PREFILL = 2048, 512
PROGRAMS = (("decode", 1), (f"prefill {PREFILL}", PREFILL))

ROWS = (
    # shape, target, rows of the batch
    ("7B", "tpu-v5e:1x1", 1),
    ("7B", "tpu-v5e:2x2", 8),
    ("7B", "tpu-v5e:4x8", 64),
    ("7B", "tpu-v5e:16x16", 256),
    ("7B", "nvidia-h100-sxm", 16),
    ("70B", "tpu-v5e:4x4", 4),
    ("70B", "tpu-v5e:4x8", 16),
    ("70B", "tpu-v5e:16x16", 128),
    ("70B", "tpu-v5p:2x2x1", 16),
    ("70B", "tpu-v6e:2x4", 16),
    ("70B", "tpu-7x:2x2x1", 32),
    ("70B", "nvidia-h100-sxm:8", 32),
)

COLUMNS = (
    "model", "target", "chips", "batch", "mesh", "program", "weights GB", "caches GB",
    "temporaries MB", "total GB", "of the chip", "all-reduces", "all-reduce MB", "others",
    "predicted ms", "of it links", "tokens/s", "compile s", "compiler GB",
)  # fmt: skip


def decoder(shape: str, batch: int) -> ir.Model:
    """The decoder with its caches, open only in how many new tokens a call takes."""
    made: ir.Model = model(CONFIGS[shape]["num_hidden_layers"], CONFIGS[shape])
    assert InsertKVCache("static", "chosen")(made).modified
    shapes.bind(made, Workload(dims={"batch": batch, "capacity": CONTEXT, "chosen": 1}))
    return made


def measure(shape: str, name: str, batch: int, new: int) -> dict[str, Any]:
    """Compile one program; must run in the environment of `platforms.environment`."""
    target = targets.find(name)
    device = platforms.device_of(target)
    made = decoder(shape, batch)
    Shard(target=target, backend="xla")(made)
    shapes.bind(made, Workload(dims={"seq": new}))
    estimate = cost.estimate(made, target, Workload())
    started = time.perf_counter()
    devices = compiling.compile_devices(device)
    if sharding.stages(made, len(devices)) > 1:
        raise BadInput("it fits only in stages, which this table leaves out", about=name)
    layout = sharding.read(made, len(devices))
    caches = [v.name or "" for v in made.graph.inputs if (v.name or "").startswith("past_")]
    lowered = lower(made)
    split = partition.SINGLE
    if layout is not None:
        split = partition.annotated(layout, made.graph, lowered.places)
        lowered = lower(made, shardings=exporting.constraints(layout, split))
    spread = split if layout is not None else None
    exported = exporting.export(lowered, device, "default", caches, spread)
    again = partial(compiling.compile_export, exported, lowered, split, devices, caches)
    compiled = again()
    cached = sum(_bytes(v, split) for v in made.graph.inputs if v.name in caches)
    return {
        "mesh": layout.name if layout is not None else "one device",
        "devices": len(devices),
        "memory": compiling.memory_of(compiled),
        "weights": sum(t.nbytes // split.shards(n) for n, t in lowered.weights.items()),
        "caches": cached,
        "collectives": hlo.collectives(compiling.text_of(compiled, again)),
        "seconds": time.perf_counter() - started,
        "predicted": estimate.seconds,
        "links": sum(op.seconds for op in estimate.by_op if op.bound == "link"),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _bytes(value: ir.Value, split: partition.Partition) -> int:
    """Bytes of an input on one device."""
    assert value.shape is not None
    assert value.dtype is not None
    parts = 1
    for axes in split.inputs.get(value.name or "", []):
        for axis in axes:
            parts *= split.mesh[axis]
    count = 1
    for size in value.shape.numpy():
        count *= size
    return count * value.dtype.bitwidth // 8 // parts


def main() -> int:
    """Compile every row and write the page after each; or be the process of one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--row", action="append", default=[], help="only these, SHAPE:TARGET")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, help="JSON of rows that are done; added to")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/decoders.md"))
    given = parser.parse_args()
    if given.only:
        shape, name, batch, new = given.only
        try:
            result = measure(shape, name, int(batch), int(new))
        except Exception as error:  # the compiler's own, in one line for the table
            result = {"error": str(worker.translated(error, name))}
        print(json.dumps(result))
        return 0
    resume: Path | None = given.resume
    done: dict[str, list[str]] = {}
    if resume is not None and resume.is_file():
        done = json.loads(resume.read_text(encoding="utf-8"))
    chosen = [r for r in ROWS if not given.row or f"{r[0]}:{r[1]}" in given.row]
    # What compiles quickly comes first; the page has them in order.
    for program, new in PROGRAMS:
        for shape, name, batch in chosen:
            key = f"{shape} {name} {batch} {program}"
            if key in done:
                continue
            found = _in_a_process(shape, name, batch, new)
            done[key] = cells(shape, name, batch, program, new, found)
            print(" | ".join(done[key]), file=sys.stderr, flush=True)
            if resume is not None:
                resume.write_text(json.dumps(done), encoding="utf-8")
    keys = [f"{shape} {name} {batch} {program}" for shape, name, batch in ROWS
            for program, _ in PROGRAMS]  # fmt: skip
    rows = [done[key] for key in keys if key in done]
    given.output.write_text(page(rows), encoding="utf-8")
    return 0


def _in_a_process(shape: str, name: str, batch: int, new: int) -> dict[str, Any]:
    device = platforms.device_of(targets.find(name))
    command = [sys.executable, __file__, "--only", shape, name, str(batch), str(new)]
    done = subprocess.run(
        command,
        env={**os.environ, **platforms.environment(device)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": f"ended with {done.returncode}: {done.stderr[-300:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cells(
    shape: str, name: str, batch: int, program: str, new: int, found: dict[str, Any]
) -> list[str]:
    """The cells of a row; a failure's reason in place of the figures."""
    target = targets.find(name)
    start = [shape, name, str(target.chips), str(batch)]
    if "error" in found:
        return [*start, "", program, found["error"][:200], *[""] * (len(COLUMNS) - 7)]
    memory, collectives = found["memory"], found["collectives"]
    parts = found["devices"] / target.chips
    total = sum(memory.values()) * parts
    sums = collectives.get("all-reduce", {"count": 0, "bytes": 0})
    others = {k: v for k, v in collectives.items() if k != "all-reduce"}
    predicted = found["predicted"]
    assert target.memory_bytes is not None
    return [
        *start,
        found["mesh"],
        program,
        f"{found['weights'] * parts / 1e9:.2f}",
        f"{found['caches'] * parts / 1e9:.2f}",
        f"{memory['temporaries'] * parts / 1e6:,.0f}",
        f"{total / 1e9:.2f}",
        f"{total / target.memory_bytes:.0%}",
        str(sums["count"]),
        f"{sums['bytes'] / 1e6:,.1f}",
        ", ".join(f"{kind} x{one['count']}" for kind, one in others.items()) or "none",
        f"{predicted * 1e3:.2f}",
        f"{found['links'] / predicted:.0%}",
        f"{batch * new / predicted:,.0f}",
        f"{found['seconds']:.0f}",
        f"{found['peak'] / 1e9:.1f}",
    ]


def page(rows: Sequence[Sequence[str]]) -> str:
    """The page as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in platforms.versions().items())
    return "\n".join(
        [
            "# 7B and 70B decoders on slices that hold them",
            "",
            f"Written by `python benchmarks/decoders.py` with {versions}. The shapes of Llama 2, "
            "all layers, bfloat16, weights by shape only: nothing ran and no weight was allocated. "
            f"Caches are static buffers of {CONTEXT} tokens, split with their heads and their rows "
            "and donated; a decode call takes one token of each row, a prefill call "
            f"{PREFILL}, and both give one row of logits each. The mesh is the planner's.",
            "",
            "Memory is the target compiler's analysis, of one chip (a 7x chip is two devices); "
            "all-reduces are those of its HLO, MB the size of their results on one device. "
            "*predicted ms* is the cost model's latency of one call and *tokens/s* what that "
            "makes; no TPU was measured, and the interval is wide. "
            "*compile s* is tracing and compiling by the wall clock, on a machine that had other "
            "work; *compiler GB* the most memory that its process held.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

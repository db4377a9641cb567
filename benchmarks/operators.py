"""Writes docs/operators.md: which ONNX operator the XLA backend lowers, how, and what it refuses.

    python benchmarks/operators.py

Made from the handler table and onnx's schemas; jax is not needed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

from trivium.backends.xla.lowering import refusal
from trivium.backends.xla.lowering.refusals import DATA_DEPENDENT
from trivium.backends.xla.lowering.registry import table

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"

DOMAINS = ("", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.ml")

TEXT = frozenset({"RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit"})
"""Operators that take nothing but strings."""


def schemas() -> dict[tuple[str, str], onnx.defs.OpSchema]:
    """The newest schema of every operator, deprecated ones left out."""
    newest: dict[tuple[str, str], onnx.defs.OpSchema] = {}
    for schema in onnx.defs.get_all_schemas():
        if not schema.deprecated and schema.domain in DOMAINS:
            newest[schema.domain, schema.name] = schema
    return newest


def road(domain: str, op_type: str, opset: int) -> tuple[str, str]:
    """How an operator is lowered (``native``, ``function``, ``refused``), and what to know."""
    if op_type in TEXT:
        return "refused", "works on strings, which XLA does not have; evaluated where all is known"
    entries = table().get((domain, op_type))
    if entries:
        since = ", ".join(str(entry.since) for entry in entries)
        note = f"`{entries[-1].group}`, from opset {since}"
        if op_type in DATA_DEPENDENT:
            note += "; where the model declares the size of its output"
        return "native", note
    reason = refusal(ir.node(op_type, [], domain=domain), opset)
    if reason is not None:
        return "refused", reason
    return "function", "through its ONNX function body"


def page() -> str:
    """The table as a Markdown page."""
    rows = []
    for (domain, op_type), schema in sorted(schemas().items()):
        opset = max(schema.since_version, 1)
        rows.append((domain or "ai.onnx", op_type, *road(domain, op_type, opset)))
    microsoft = [
        (domain, op_type, "native", f"`{entries[-1].group}`")
        for (domain, op_type), entries in sorted(table().items())
        if domain == "com.microsoft"
    ]
    count = Counter(row[2] for row in rows if row[0] == "ai.onnx")
    out = [
        "# Operators of the XLA backend",
        "",
        f"At onnx {onnx.__version__}, the standard domain has {sum(count.values())} operators: "
        f"{count['native']} lowered natively, {count['function']} through their function body, "
        f"{count['refused']} refused. Made by `python benchmarks/operators.py`.",
        "",
        "A shape that is an operand must be known while compiling, or be promised by a static "
        "shape that the model declares for the output.",
        "",
        "| domain | operator | road | |",
        "|---|---|---|---|",
    ]
    out += [f"| {d} | {name} | {how} | {note} |" for d, name, how, note in rows + microsoft]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Loading a model with 4 GB of external data and saving it again: peak memory over the
interpreter's own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Row, Samples, mebibytes, python, run_command, seconds

TITLE = "A 4 GB model"

LAYERS, WIDTH = 64, 4096
"""64 matrices of 4096 x 4096 float32: 4.3 GB."""

_SAVE = """
import sys
from trivium.compiler import model
model.save(model.load(sys.argv[1]), sys.argv[2])
"""
_IMPORTS = "import onnx_ir, onnx, numpy; from trivium.compiler import model"


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        source = write_model(Path(folder) / "large.onnx")
        (Path(folder) / "copy").mkdir()
        bare, whole = Samples(), Samples()
        run_command(python(_IMPORTS), bare)
        for _ in range(3):
            run_command(python(_SAVE, str(source), f"{folder}/copy/copy.onnx"), whole)
        size = sum(file.stat().st_size for file in Path(folder).glob("large.onnx*"))
    over = whole.peak - bare.peak
    return [
        Row(
            f"load and save {size / 1e9:.1f} GB", f"{mebibytes(over)} over, {seconds(whole)}",
            f"the interpreter with its imports {mebibytes(bare.peak)}", "",
            "under 400 MB over", over < 400e6,
        )
    ]  # fmt: skip


def write_model(path: Path) -> Path:
    """Write a chain of matrix products whose weights are a sparse file of the full size."""
    import onnx_ir as ir

    x = ir.val("x", ir.DataType.FLOAT, [1, WIDTH])
    nbytes = WIDTH * WIDTH * 4
    data = path.with_name(path.name + ".data")
    with data.open("wb") as stream:
        stream.truncate(LAYERS * nbytes)
    value, nodes, weights = x, [], []
    for index in range(LAYERS):
        weight = ir.val(f"w{index}", ir.DataType.FLOAT, [WIDTH, WIDTH])
        weight.const_value = ir.ExternalTensor(
            data.name, index * nbytes, nbytes, ir.DataType.FLOAT,
            shape=ir.Shape([WIDTH, WIDTH]), name=f"w{index}", base_dir=path.parent,
        )  # fmt: skip
        node = ir.node("MatMul", [value, weight])
        value = node.outputs[0]
        nodes.append(node)
        weights.append(weight)
    value.name, value.dtype, value.shape = "y", ir.DataType.FLOAT, ir.Shape([1, WIDTH])
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=weights, opset_imports={"": 24}, name="large"
    )
    ir.save(ir.Model(graph, ir_version=11), path)
    return path

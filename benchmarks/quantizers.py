"""The quantizers that are compared, each as a command whose arguments are a model, feeds, the file
to write, and a method.

Those of other environments run in the interpreters that TRIVIUM_PEERS_PYTHON names, joined by
colons. Neural Compressor is version 2 (version 3 has no ONNX road), beside an onnx that still has
``onnx.mapping``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import python

_PEERS = os.environ.get("TRIVIUM_PEERS_PYTHON", "").split(os.pathsep)

_OURS = """
import sys
from trivium.compiler import model, prepare
source, feeds, out, recipe = sys.argv[1:]
model.save(prepare.optimize(source, recipe, calibration=feeds)[0], out)
"""

_READER = """
import sys
import numpy as np
source, feeds, out, method = sys.argv[1:]
arrays = dict(np.load(feeds))
count = len(next(iter(arrays.values())))
samples = [{k: v[i : i + 1] for k, v in arrays.items()} for i in range(count)]
"""

_ONNXRUNTIME = (
    _READER
    + """
import os, tempfile
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

class Reader(CalibrationDataReader):
    def __init__(self):
        self.feeds = iter(samples)
    def get_next(self):
        return next(self.feeds, None)

with tempfile.TemporaryDirectory() as folder:
    ready = os.path.join(folder, "ready.onnx")
    quant_pre_process(source, ready)
    quantize_static(
        ready, out, Reader(), per_channel=True, calibrate_method=CalibrationMethod[method]
    )
"""
)

_NNCF = (
    _READER
    + """
import nncf, onnx
kind = nncf.ModelType.TRANSFORMER if method == "transformer" else None
made = nncf.quantize(
    onnx.load(source), nncf.Dataset(samples), model_type=kind, subset_size=count
)
onnx.save(made, out)
"""
)

_MODELOPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, feeds, out, method = sys.argv[1:]
quantize(
    source, quantize_mode="int8", calibration_data=dict(np.load(feeds)), output_path=out,
    calibration_method=method, calibration_eps=["cpu"], high_precision_dtype="fp32",
)
"""

_NEURAL_COMPRESSOR = (
    _READER
    + """
from neural_compressor import PostTrainingQuantConfig, quantization

class Loader:
    batch_size = 1
    def __iter__(self):
        for sample in samples:
            yield (sample if len(sample) > 1 else next(iter(sample.values()))), 0

how = PostTrainingQuantConfig(approach="static", calibration_sampling_size=[count])
quantization.fit(source, how, calib_dataloader=Loader()).save(out)
"""
)

_NBITS = """
import sys
import onnx
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
source, feeds, out, method = sys.argv[1:]
name, bits, block = method.split("/")
if name == "HQQ":
    how = nbits.HQQWeightOnlyQuantConfig(block_size=int(block), bits=int(bits))
else:
    how = nbits.DefaultWeightOnlyQuantConfig(
        block_size=int(block), is_symmetric=True, bits=int(bits)
    )
made = nbits.MatMulNBitsQuantizer(onnx.load(source), algo_config=how)
made.process()
made.model.save_model_to_file(out)
"""


@dataclass(frozen=True)
class Tool:
    """A way to quantize: arguments of its script are source, feeds, out and ``method``."""

    name: str
    script: str
    method: str
    interpreter: str = sys.executable

    def command(self, source: Path, feeds: Path, out: Path) -> list[str]:
        line = python(self.script, str(source), str(feeds), str(out), self.method)
        return [self.interpreter, *line[1:]]


def ours(recipe: str) -> Tool:
    """A recipe of this project."""
    return Tool(recipe, _OURS, recipe)


def nbits(name: str, bits: int, block: int) -> Tool:
    """ONNX Runtime's weight-only quantizer.

    Args:
        name: Of its algorithm: RTN or HQQ.
    """
    suffix = "" if bits == 4 else f" {bits} bits"
    return Tool(f"ONNX Runtime {name}{suffix}", _NBITS, f"{name}/{bits}/{block}")


def static(*methods: str) -> list[Tool]:
    """ONNX Runtime's static quantizer with methods of calibration."""
    return [Tool(f"ONNX Runtime {method}", _ONNXRUNTIME, method) for method in methods]


def others(modelopt: str, kind: str = "") -> list[Tool]:
    """What the other interpreters have.

    Args:
        modelopt: ModelOpt's method of calibration.
        kind: Of the model, for NNCF: ``transformer`` or nothing.
    """
    tools = {
        "nncf": ("NNCF", _NNCF, kind),
        "modelopt": ("ModelOpt", _MODELOPT, modelopt),
        "neural_compressor.quantization": ("Neural Compressor", _NEURAL_COMPRESSOR, ""),
    }
    found = []
    for package, (name, script, method) in tools.items():
        probe = f"from importlib.util import find_spec as f; assert f({package!r})"
        holders = [path for path in _PEERS if path and _runs([path, "-c", probe])]
        if holders:
            found.append(Tool(name, script, method, holders[0]))
        else:
            print(f"TRIVIUM_PEERS_PYTHON has no {name}: left out", file=sys.stderr)
    return found


def _runs(command: Sequence[str]) -> bool:
    return not subprocess.run(command, capture_output=True, check=False).returncode

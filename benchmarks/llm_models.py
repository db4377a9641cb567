"""The models of `llm`, for each engine; made where they are not there yet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks import checkpoints, gguf
from benchmarks.streaming_int4 import QUANTIZE_Q4_0
from benchmarks.workloads import shared

OURS = {"ours": "", "ours8": "caches int8: ", "openvino": "by OpenVINO: "}
"""What is said before our figures."""

_OPTIONS = {
    "ours": (),
    "ours8": ("--option", "kv_cache=int8"),
    "openvino": ("--backend", "openvino"),
}


_COMPRESS = """
import sys, nncf, openvino
source, out = sys.argv[1:]
model = openvino.Core().read_model(source)
# Its blocks are of 128 by default; tables narrower than that are those of the rotary embedding.
tables = [op for op in model.get_ops() if op.get_type_name() == "Gather"]
narrow = [op.get_friendly_name() for op in tables
          if op.input_value(0).get_partial_shape()[-1].get_max_length() < 128]
adjusted = nncf.AdvancedCompressionParameters(
    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
model = nncf.compress_weights(
    model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=128, ratio=1.0, all_layers=True,
    ignored_scope=nncf.IgnoredScope(names=narrow, validate=False), advanced_parameters=adjusted)
openvino.save_model(model, out, compress_to_fp16=False)
"""


@dataclass(frozen=True)
class Contestant:
    """An engine with the model that it runs.

    Attributes:
        engine: Its name in the results.
        kind: What drives it, in `llm_child`.
    """

    engine: str
    kind: str
    interpreter: str
    model: Path


@cache
def contestants(folder: Path, shape: str) -> tuple[Contestant, ...]:
    """Every engine that is at hand, with a shape's model in a folder."""
    if shape in checkpoints.SHAPES:
        source = checkpoints.write(folder, shape)
    else:
        trained = shared("llm-shakespeare")
        assert trained is not None
        source = trained
    stem = shape.partition(",")[0]
    found = [
        Contestant(engine, "trivium", sys.executable, _ours(source, folder / f"{stem}-{engine}"))
        for engine in OURS
    ]
    llama = os.environ.get("TRIVIUM_LLAMA_PYTHON")
    if llama is None:
        print("llama.cpp: left out (TRIVIUM_LLAMA_PYTHON is not set)", file=sys.stderr)
    else:
        packed = _packed(source, folder / f"{stem}-q4.gguf", llama)
        found += [Contestant(kind, kind, llama, packed) for kind in ("llama", "llama-plain")]
    nncf = os.environ.get("TRIVIUM_NNCF_PYTHON")
    if nncf is None:
        print("OpenVINO by NNCF: left out (TRIVIUM_NNCF_PYTHON is not set)", file=sys.stderr)
    else:
        small = _compressed(source, folder / f"{stem}-nncf", nncf)
        found.append(Contestant("nncf", "openvino", sys.executable, small))
    for engine in ("genai", "genai8"):
        built = _built_by_genai(source, folder, folder / f"{stem}-{engine}", engine == "genai8")
        if built is not None:
            found.append(Contestant(engine, "genai", sys.executable, built))
    return tuple(found)


def _made(path: Path, make: Callable[[], object]) -> Path:
    if not path.exists():
        make()
    return path


def _ours(source: Path, out: Path) -> Path:
    options = _OPTIONS[out.name.rpartition("-")[2]]
    command = [sys.executable, "-m", "trivium.compiler.cli", "compile", str(source)]
    command += ["--target", "cpu", "--recipe", "int4", "--no-cache", *options, "-o", str(out)]
    return _made(out, lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def _compressed(source: Path, out: Path, nncf: str) -> Path:
    """Our stateful model in float, its weights compressed by NNCF as its makers have it."""

    def make() -> None:
        wide = out.with_name(f"{out.name}-openvino-float")
        command = [sys.executable, "-m", "trivium.compiler.cli", "compile", str(source)]
        command += ["--target", "cpu", "--backend", "openvino", "--no-cache", "-o", str(wide)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        out.mkdir()
        files = [str(wide / "model.xml"), str(out / "model.xml")]
        subprocess.run([nncf, "-c", _COMPRESS, *files], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(wide)

    return _made(out, make)


def _packed(source: Path, out: Path, llama: str) -> Path:
    def make() -> None:
        plain = out.with_suffix(".plain")
        gguf.write(source, plain)
        command = [llama, "-c", QUANTIZE_Q4_0, str(plain), str(out)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        plain.unlink()

    return _made(out, make)


def _built_by_genai(source: Path, folder: Path, out: Path, small_caches: bool) -> Path | None:
    """The checkpoint by genai's own builder, at its default block size and accuracy level 4."""
    tokenizer = os.environ.get("TRIVIUM_LLM_TOKENIZER")
    if tokenizer is None:
        print("genai: left out (TRIVIUM_LLM_TOKENIZER is not set)", file=sys.stderr)
        return None
    if out.exists():
        return out
    if source.parent == folder:
        for file in Path(tokenizer).glob("tokenizer*"):
            shutil.copy(file, source)
    options = ["int4_accuracy_level=4"]
    if small_caches:
        scales = folder / f"{out.name}-scales.json"
        scales.write_text(json.dumps(_scales(folder / out.name.replace("genai8", "ours8"))))
        options += ["kv_cache_quant_scheme=int8_per_channel", f"kv_cache_scale_file={scales}"]
    done = subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o",
         str(out), "-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options",
         *options],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"genai: left out ({done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
        return None
    return out


def _scales(artifact: Path) -> dict[str, object]:
    """The scales of genai's caches: those of our artifact."""
    import onnx_ir as ir

    found: dict[str, list[list[float]]] = {"k_scales": [], "v_scales": []}
    for node in ir.load(artifact / "model.onnx").graph:
        if node.op_type == "GroupQueryAttention":
            for place, name in ((12, "k_scales"), (13, "v_scales")):
                value = node.inputs[place]
                assert value is not None
                assert value.const_value is not None
                found[name].append([float(x) for x in value.const_value.numpy().ravel()])
    return {"scales": found}

"""Fit the efficiencies that the backends' cost profiles carry, and say how well they fit.

    python benchmarks/fit_profiles.py gemm DATA      bf16 GEMMs published for A100, H100 and L40S
    python benchmarks/fit_profiles.py tensorrt DATA  TensorRT's published BERT latencies
    python benchmarks/fit_profiles.py cpu DATA       ONNX Runtime on this machine, on real models
    python benchmarks/fit_profiles.py openvino DATA  OpenVINO likewise

DATA is the test data folder (see its README for sources and licences); only the figures printed
here go into ``backends/*/cost.py``. `gemm` reads Parquet and needs pyarrow.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper as oh
from scipy.optimize import minimize

from trivium.compiler import prepare, targets
from trivium.compiler.cost import Profile, fits_on_chip, melts_elementwise, time_kernel
from trivium.compiler.kernels import Kernel, kernels_of
from trivium.compiler.types import Target
from trivium.targets.host import with_bandwidth


class Sample(NamedTuple):
    """The kernels of one call on a device, the seconds that were measured, and a group that the
    residuals are judged without.
    """

    target: Target
    kernels: list[Kernel]
    seconds: float
    group: str


def predicted(sample: Sample, profile: Profile) -> float:
    total = profile.call_s
    held = sum(kernel.weight_bytes for kernel in sample.kernels)
    cached = fits_on_chip(held, sample.target)
    for kernel in sample.kernels:
        timing, problem = time_kernel(kernel, sample.target, profile, cached_weights=cached)
        assert timing is not None, problem
        total += timing.seconds * kernel.times
    return total


def residuals(samples: Sequence[Sample], profile: Profile) -> np.ndarray[Any, Any]:
    """log(measured / predicted) of every sample."""
    return np.log([sample.seconds / predicted(sample, profile) for sample in samples])


def fit(samples: Sequence[Sample], start: Profile, names: Sequence[str]) -> Profile:
    """Choose the named fields, in log space, for the least mean absolute residual.

    Efficiencies stay below one: what is faster than the data sheet comes out of a cache.
    """

    bounded = {"compute_efficiency", "memory_efficiency"}
    bounds = [(None, 0.0 if name in bounded else None) for name in names]

    def made(logs: np.ndarray[Any, Any]) -> Profile:
        profile = start
        for name, value in zip(names, np.exp(logs).tolist(), strict=True):
            profile = _with(profile, name, value)
        return profile

    first = np.log([_field(start, name) for name in names])
    result = minimize(
        lambda logs: float(np.abs(residuals(samples, made(logs))).mean()),
        first,
        method="Nelder-Mead",
        bounds=bounds,
        options={"maxiter": 4000, "fatol": 1e-6, "xatol": 1e-4},
    )
    return made(result.x)


def _field(profile: Profile, name: str) -> float:
    """A field of a profile, or with ``slowdown.int8`` an entry of one."""
    field, _, key = name.partition(".")
    value = getattr(profile, field)
    return float(value[key] if key else value)


def _with(profile: Profile, name: str, value: float) -> Profile:
    field, _, key = name.partition(".")
    return replace(profile, **{field: {**getattr(profile, field), key: value} if key else value})


def report(samples: Sequence[Sample], start: Profile, names: Sequence[str]) -> None:
    """Print the fit on everything, and the residuals with each group left out in turn."""
    whole = fit(samples, start, names)
    print("fit:", {name: float(f"{_field(whole, name):.3g}") for name in names})
    print(f"  mean |log error| {np.abs(residuals(samples, whole)).mean():.3f}")
    left_out = []
    for group in sorted({sample.group for sample in samples}):
        rest = [sample for sample in samples if sample.group != group]
        own = [sample for sample in samples if sample.group == group]
        if not rest:
            continue
        errors = residuals(own, fit(rest, start, names))
        left_out.append(errors)
        print(f"  without {group}: bias {errors.mean():+.3f} spread {_spread(errors):.3f}")
    if left_out:
        print(f"  spread, left out: {_spread(np.concatenate(left_out)):.3f}")


def _spread(errors: np.ndarray[Any, Any]) -> float:
    """The log-deviation whose 80% interval covers 80% of the errors."""
    return float(np.quantile(np.abs(errors), 0.8) / 1.2816)


# --- published GEMMs -----------------------------------------------------------------------------

GEMM_DEVICES = {
    "a100_sxm": "nvidia-a100-80-sxm",
    "h100_sxm": "nvidia-h100-sxm",
    "l40s": "nvidia-l40s",
}


def gemm_samples(data: Path, count: int = 500) -> list[Sample]:
    from pyarrow import parquet

    samples: list[Sample] = []
    rng = np.random.default_rng(0)
    for folder, name in GEMM_DEVICES.items():
        file = data / f"measured/aiconfigurator/{folder}/gemm/sglang/0.5.10/gemm_perf.parquet"
        rows = [r for r in parquet.read_table(file).to_pylist() if r["gemm_dtype"] == "bfloat16"]
        for index in rng.choice(len(rows), count, replace=False):
            m, n, k = (rows[index][key] for key in "mnk")
            kernel = Kernel(
                "gemm",
                ("MatMul",),
                {"bfloat16": 2.0 * m * n * k},
                {},
                weight_bytes=2.0 * n * k,
                read_bytes=2.0 * m * k,
                written_bytes=2.0 * m * n,
            )
            samples.append(Sample(targets.find(name), [kernel], rows[index]["latency"] / 1e3, name))
    return samples


# --- TensorRT's BERT -----------------------------------------------------------------------------

BERT = {"BERT Base": (12, 768, 12), "BERT Large": (24, 1024, 16)}


def bert(layers: int, width: int, heads: int, batch: int, length: int, *, int8: bool) -> ir.Model:
    """The encoder's kernels in float16, products in int8 where asked: shapes only, no weights."""
    nodes: list[onnx.NodeProto] = []
    shapes: dict[str, list[int]] = {"x0": [batch, length, width]}
    weights: dict[str, tuple[int, list[int]]] = {}

    def quantized(name: str) -> str:
        if not int8 or name + ".d" in shapes:
            return name + ".d" if int8 else name
        nodes.append(oh.make_node("QuantizeLinear", [name, "s", "z"], [name + ".q"]))
        nodes.append(oh.make_node("DequantizeLinear", [name + ".q", "s", "z"], [name + ".d"]))
        shapes[name + ".q"] = shapes[name + ".d"] = shapes[name]
        return name + ".d"

    def linear(x: str, out: str, inside: int, outside: int, activation: str = "") -> None:
        kind = onnx.TensorProto.INT8 if int8 else onnx.TensorProto.FLOAT16
        weights[out + ".w"] = (kind, [inside, outside])
        weight = out + ".w"
        if int8:
            nodes.append(oh.make_node("DequantizeLinear", [weight, "s", "z"], [weight + ".d"]))
            weight += ".d"
            shapes[weight] = [inside, outside]
        nodes.append(oh.make_node("MatMul", [quantized(x), weight], [out + ".p"]))
        weights[out + ".b"] = (onnx.TensorProto.FLOAT16, [outside])
        target = out + ".a" if activation else out
        nodes.append(oh.make_node("Add", [out + ".p", out + ".b"], [target]))
        shapes[out + ".p"] = shapes[out] = shapes[target] = [batch, length, outside]
        if activation:
            nodes.append(oh.make_node(activation, [target], [out]))

    def normalized(x: str, skip: str, out: str) -> None:
        nodes.append(oh.make_node("Add", [x, skip], [out + ".s"]))
        for suffix in ("g", "b"):
            weights[f"{out}.{suffix}"] = (onnx.TensorProto.FLOAT16, [width])
        nodes.append(
            oh.make_node("LayerNormalization", [out + ".s", out + ".g", out + ".b"], [out])
        )
        shapes[out] = shapes[out + ".s"] = [batch, length, width]

    for layer in range(layers):
        x, prefix = f"x{layer}", f"l{layer}"
        for part in "qkv":
            linear(x, f"{prefix}.{part}", width, width)
        parts = [f"{prefix}.{part}" for part in "qkv"]
        nodes.append(
            oh.make_node("Attention", parts, [prefix + ".o"], q_num_heads=heads, kv_num_heads=heads)
        )
        shapes[prefix + ".o"] = [batch, length, width]
        linear(prefix + ".o", prefix + ".r", width, width)
        normalized(prefix + ".r", x, prefix + ".n")
        linear(prefix + ".n", prefix + ".h", width, 4 * width, "Gelu")
        linear(prefix + ".h", prefix + ".f", 4 * width, width)
        normalized(prefix + ".f", prefix + ".n", f"x{layer + 1}")
    half = onnx.TensorProto.FLOAT16
    infos = {name: oh.make_tensor_value_info(name, half, shape) for name, shape in shapes.items()}
    for name, info in infos.items():
        if name.endswith(".q"):
            info.type.tensor_type.elem_type = onnx.TensorProto.INT8
    graph = oh.make_graph(
        nodes,
        "bert",
        [infos["x0"]],
        [infos[f"x{layers}"]],
        [_blank(name, kind, dims) for name, (kind, dims) in weights.items()]
        + [
            oh.make_tensor("s", half, [], [1.0]),
            oh.make_tensor("z", onnx.TensorProto.INT8, [], [0]),
        ],
        value_info=[info for name, info in infos.items() if name not in ("x0", f"x{layers}")],
    )
    return ir.serde.deserialize_model(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 24)]))


def _blank(name: str, kind: int, dims: list[int]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims)
    tensor.raw_data = bytes(int(np.prod(dims)) * (1 if kind == onnx.TensorProto.INT8 else 2))
    return tensor


def bert_samples(data: Path) -> list[Sample]:
    target = targets.find("nvidia-a100-40-sxm")
    samples: list[Sample] = []
    with (data / "measured/nvidia_tensorrt_bert/bert_latency.csv").open() as stream:
        for row in csv.DictReader(stream):
            if row["model"] not in BERT:
                continue
            for kind in ("int8", "fp16"):
                shape = (int(row["batch"]), int(row["seq_len"]))
                model = bert(*BERT[row["model"]], *shape, int8=kind == "int8")
                kernels = kernels_of(model.graph, melts_elementwise)
                seconds = float(row[f"{kind}_avg_ms"]) / 1e3
                samples.append(Sample(target, kernels, seconds, f"{row['model']} {kind}"))
    return samples


# --- ONNX Runtime here ---------------------------------------------------------------------------

CPU_MODELS: dict[str, tuple[str, ...]] = {
    "cifar_resnet20": ("N=1",),
    "cifar_resnet32": ("N=8",),
    "mlperf_ic_resnet8_fp32": ("N=1",),
    "mlperf_kws_dscnn_fp32": ("N=1",),
    "mlperf_ad_autoencoder_fp32": ("N=1",),
    "mnist_cnn_cntk": (),
    "magika_v3_3": ("unk__214=1",),
    "ultraface_rfb320": (),
    "pytorch_superres_x3": ("batch_size=1",),
    "espcn_x3_float": (),
    "mlperf_ic_resnet8_int8_qdq": ("N=1",),
    "mlperf_kws_dscnn_int8_qdq": ("N=1",),
    "mobilenetv2_imagenet_int8": ("batch=1",),
}


def cpu_samples(data: Path, engine: str) -> list[Sample]:
    import importlib

    cost = importlib.import_module(f"trivium.backends.{engine}.cost")
    host = with_bandwidth(targets.find("cpu"))
    # One core: its own processor time is the same however busy the machine is.
    peaks = {dtype: rate / (host.units or 1) for dtype, rate in host.peak_ops.items()}
    target = replace(host, peak_ops=peaks)
    samples = []
    for name, shape in CPU_MODELS.items():
        model, _ = prepare.optimize(data / f"models/{name}.onnx", shape=shape)
        seconds = _best_seconds(ENGINES[engine](model), model)
        kernels = kernels_of(model.graph, cost.PROFILE.fused)
        samples.append(Sample(target, kernels, seconds, name))
    return samples


def _onnxruntime(model: ir.Model) -> Callable[[Any], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)


def _openvino(model: ir.Model) -> Callable[[Any], Any]:
    import io

    import openvino

    core = openvino.Core()
    data = ir.serde.serialize_model(model).SerializeToString()
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(io.BytesIO(data)), "CPU", properties)
    request = compiled.create_infer_request()
    return lambda feed: request.infer(feed)


ENGINES = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def _best_seconds(call: Callable[[Any], Any], model: ir.Model, budget: float = 1.5) -> float:
    """Processor seconds of the shortest of many runs on one thread."""
    from trivium.compiler import samples as feeds
    from trivium.compiler.types import Workload

    feed = feeds.seeded(model, Workload())[0]
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < budget:
        begin = time.process_time()
        call(feed)
        best = min(best, time.process_time() - begin)
    return best


def main(arguments: Sequence[str]) -> None:
    """Run one of the fits."""
    kind, data = arguments[0], Path(arguments[1])
    start = Profile(0.6, 0.8, 0.0, "", launch_s=3e-6, call_s=1e-5, cache_speedup=3.0)
    if kind == "gemm":
        fields = (*EFFICIENCIES, "cache_speedup")
        report(gemm_samples(data), replace(start, call_s=0.0), fields)
    elif kind == "tensorrt":
        report(bert_samples(data), start, ("compute_efficiency", "cache_speedup", "call_s"))
    elif kind in ("cpu", "openvino"):
        fields = ("compute_efficiency", "slowdown.int8", "launch_s", "call_s", "cache_speedup")
        start = replace(start, memory_efficiency=0.9, slowdown={"int8": 2.0})
        runs = cpu_samples(data, "onnxruntime" if kind == "cpu" else kind)
        report(runs, start, fields)
        fitted = fit(runs, start, fields)
        for run in runs:
            micros = (run.seconds * 1e6, predicted(run, fitted) * 1e6)
            print(f"  {run.group:30s} {micros[0]:9.1f} us, predicted {micros[1]:9.1f}")


EFFICIENCIES = ("compute_efficiency", "memory_efficiency")


if __name__ == "__main__":
    main(sys.argv[1:])

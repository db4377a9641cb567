"""Run the engine in this folder: python run_engine.py --input x.npz --output y.npz [--repeat 100]

Needs TensorRT 11, cuda-python and numpy. The plan is compared with its checksum before anything
reads it, because a damaged plan crashes the process that deserializes it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


def load_engine(folder: Path) -> Any:
    """Return the engine, deserialized after its checksum was seen to agree."""
    import tensorrt as trt

    settings = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    path = folder / settings["plan"]
    if not path.is_file():
        raise SystemExit(f"{path} is absent: run build_engine.py first")
    data = path.read_bytes()
    expected = path.with_suffix(".sha256").read_text().strip()
    if hashlib.sha256(data).hexdigest() != expected:
        raise SystemExit(f"{path} does not match its checksum: build it again")
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    if "VERSION_COMPATIBLE" in settings["flags"]:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise SystemExit(f"{path} is for another GPU or another TensorRT: build it here")
    if "WEIGHT_STREAMING" in settings["flags"]:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return engine


def numpy_type(dtype: Any) -> Any:
    """The numpy type of a tensor of the engine."""
    import tensorrt as trt

    table = {
        trt.DataType.FLOAT: np.float32,
        trt.DataType.HALF: np.float16,
        trt.DataType.INT64: np.int64,
        trt.DataType.INT32: np.int32,
        trt.DataType.INT8: np.int8,
        trt.DataType.UINT8: np.uint8,
        trt.DataType.BOOL: np.bool_,
    }
    if dtype not in table:
        raise SystemExit(f"numpy has no type for {dtype}: cast it at the border of the graph")
    return np.dtype(table[dtype])


def check(result: tuple[Any, ...]) -> Any:
    """Return what a CUDA call gave, or stop with its error."""
    error, *values = result
    if int(error) != 0:
        raise SystemExit(f"CUDA error: {error}")
    return values[0] if values else None


def run(engine: Any, feeds: dict[str, Any], repeat: int) -> tuple[dict[str, Any], list[float]]:
    """Run the engine; return the outputs and the seconds that each of ``repeat`` runs took."""
    import tensorrt as trt
    from cuda.bindings import runtime as cudart

    context = engine.create_execution_context()
    stream = check(cudart.cudaStreamCreate())
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    for name in inputs:
        if name not in feeds:
            raise SystemExit(f"the input {name!r} is missing")
        feeds[name] = np.ascontiguousarray(feeds[name], numpy_type(engine.get_tensor_dtype(name)))
        if not context.set_input_shape(name, feeds[name].shape):
            raise SystemExit(f"{name!r}: no profile of the engine holds {feeds[name].shape}")
    held: dict[str, tuple[int, Any]] = {}
    for name in names:
        shape = tuple(context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise SystemExit(f"{name!r}: the shape {shape} depends on the data")
        host = feeds.get(name)
        if host is None:
            host = np.empty(shape, numpy_type(engine.get_tensor_dtype(name)))
        device = check(cudart.cudaMalloc(max(host.nbytes, 1)))
        held[name] = (device, host)
        context.set_tensor_address(name, device)
    to_device = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
    to_host = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
    for name in inputs:
        device, host = held[name]
        check(cudart.cudaMemcpyAsync(device, host.ctypes.data, host.nbytes, to_device, stream))
    seconds = []
    for _ in range(repeat):
        check(cudart.cudaStreamSynchronize(stream))
        started = time.perf_counter()
        if not context.execute_async_v3(stream):
            raise SystemExit("TensorRT could not start the engine: its log above says why")
        check(cudart.cudaStreamSynchronize(stream))
        seconds.append(time.perf_counter() - started)
    outputs = {}
    for name in names:
        device, host = held[name]
        if name not in inputs:
            check(cudart.cudaMemcpy(host.ctypes.data, device, host.nbytes, to_host))
            outputs[name] = host
        check(cudart.cudaFree(device))
    check(cudart.cudaStreamDestroy(stream))
    return outputs, seconds


def main() -> None:
    """Read feeds, run, write outputs, say how long a run took."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--input", type=Path, required=True, help="an .npz with one array an input"
    )
    arguments.add_argument("--output", type=Path, required=True, help="the .npz to write")
    arguments.add_argument("--repeat", type=int, default=1, help="runs to time")
    given = arguments.parse_args()
    with np.load(given.input, allow_pickle=False) as archive:
        feeds = {name: archive[name] for name in archive.files}
    outputs, seconds = run(load_engine(HERE), feeds, given.repeat)
    np.savez(given.output, **outputs)
    print(json.dumps({"median_s": statistics.median(seconds), "runs": len(seconds)}))


if __name__ == "__main__":
    main()

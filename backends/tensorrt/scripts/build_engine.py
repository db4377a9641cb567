"""Build a TensorRT engine from the model in this folder: python build_engine.py

Needs TensorRT 11 (pip install tensorrt) and the GPU that the engine is for; nothing of Trivium.
Reads engine.json and model.onnx; writes the plan, its SHA-256, the timing cache, and
layers.json, which says what was fused into what and in which precision.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def build(folder: Path) -> Path:
    """Build the engine that ``engine.json`` describes; return the plan's path."""
    import tensorrt as trt

    settings = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    logger = trt.Logger(trt.Logger.INFO)
    builder = trt.Builder(logger)
    network = builder.create_network(
        flags=1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = trt.OnnxParser(network, logger)
    # From the file, not from its bytes: external weights are found beside it.
    if not parser.parse_from_file(str(folder / settings["model"])):
        errors = (parser.get_error(index) for index in range(parser.num_errors))
        raise SystemExit(
            "\n".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors)
        )

    config = builder.create_builder_config()
    configure(trt, config, settings)
    add_profiles(builder, config, settings["profiles"])
    cache_file = folder / settings["timing_cache"]
    cache = config.create_timing_cache(cache_file.read_bytes() if cache_file.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit("TensorRT could not build the engine: its log above says why")
    data = bytes(plan)
    path = Path(folder, settings["plan"])
    path.write_bytes(data)
    path.with_suffix(".sha256").write_text(hashlib.sha256(data).hexdigest() + "\n")
    cache = config.get_timing_cache()
    cache_file.write_bytes(bytes(cache.serialize()))
    (folder / "layers.json").write_text(describe(trt, logger, data, settings))
    return path


def configure(trt: Any, config: Any, settings: dict[str, Any]) -> None:
    """Set flags, memory and effort. Precision is the graph's: there are no flags for it."""
    for name in ("TF32", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"):
        flag = {
            "TF32": trt.BuilderFlag.TF32,
            "SPARSE_WEIGHTS": trt.BuilderFlag.SPARSE_WEIGHTS,
            "VERSION_COMPATIBLE": trt.BuilderFlag.VERSION_COMPATIBLE,
            "WEIGHT_STREAMING": trt.BuilderFlag.WEIGHT_STREAMING,
        }[name]
        if name in settings["flags"]:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    if settings["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_bytes"])
    config.builder_optimization_level = settings["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def add_profiles(builder: Any, config: Any, profiles: list[dict[str, Any]]) -> None:
    """Add the ranges of shapes that the engine serves, one profile for each entry."""
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, sizes in ranges.items():
            profile.set_shape(name, min=sizes["min"], opt=sizes["opt"], max=sizes["max"])
        if config.add_optimization_profile(profile) < 0:
            raise SystemExit(f"TensorRT rejects the profile {ranges}")


def describe(trt: Any, logger: Any, plan: bytes, settings: dict[str, Any]) -> str:
    """Return what the engine inspector says of every layer, as JSON."""
    runtime = trt.Runtime(logger)
    if "VERSION_COMPATIBLE" in settings["flags"]:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE))

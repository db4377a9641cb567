"""ONNX Runtime on our artifact against ONNX Runtime on the source model: CPU time of one call on
one thread, calls in turn, in one process."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Samples, ratio, seconds
from benchmarks.workloads import minilm, shared

TITLE = "Artifacts for the CPU"

MODELS = {
    "cifar_resnet32": ["N=1"],
    "mlperf_ic_resnet8_fp32": ["N=1"],
    "mlperf_kws_dscnn_fp32": ["N=1"],
    "mlperf_ad_autoencoder_fp32": ["N=1"],
    "magika_v3_3": [],
    "mobilenetv2_imagenet_int8": ["batch=1"],
    "ultraface_rfb320": [],
    "silero_vad_16k_op15": [],
    "minilm": ["batch=1", "seq=128"],
}
CALLS = 60
NOISE = 1.03
"""A median ratio up to this is no difference that these machines can tell."""


def rows() -> list[Row]:
    found = []
    for name in [name for name in MODELS if name != "minilm"]:
        path = shared(f"models/{name}.onnx")
        if path is not None:
            found.append(_compare(name, path))
    with tempfile.TemporaryDirectory() as folder:
        encoder = minilm(Path(folder))
        if encoder is not None:
            found.append(_compare("minilm", encoder))
    return found


def _compare(name: str, source: Path) -> Row:
    import trivium
    from trivium.compiler.verify import carried_feeds

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        artifact = trivium.compile(source, "cpu", shape=MODELS[name], out=out, use_cache=False)
        feed = carried_feeds(artifact)[0]
        return _row(name, _session(source), _session(artifact.path / "model.onnx"), feed)


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _row(name: str, source: Any, ours: Any, feed: dict[str, Any]) -> Row:
    a, b = Samples(), Samples()
    for session in (source, ours):
        for _ in range(3):
            session.run(None, feed)
    for _ in range(CALLS):
        for session, samples in ((ours, a), (source, b)):
            started = time.process_time()
            session.run(None, feed)
            samples.seconds.append(time.process_time() - started)
    middle, text = ratio(a.seconds, b.seconds)
    return Row(name, seconds(a), seconds(b), text, f"at most {NOISE}", middle <= NOISE)

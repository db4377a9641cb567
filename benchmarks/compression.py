"""Quantization against the quantizers of others, each run a whole process that reads a model,
calibrates, quantizes and writes it: quality on labelled or real samples, wall time, peak memory.

ONNX Runtime's quantizers run in this environment. NNCF (and whatever else has an ONNX road) runs in
the interpreter that TRIVIUM_PEERS_PYTHON names; rows of peers that are not there are left out with
a word on standard error. Neural Compressor 3.10 has no ONNX road any more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.harness import Row, Samples, mebibytes, python, ratio, run_command, seconds

TITLE = "Quantization"

RUNS = int(os.environ.get("TRIVIUM_BENCH_RUNS", "3"))
PEERS = os.environ.get("TRIVIUM_PEERS_PYTHON", "")

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


@dataclass(frozen=True)
class Case:
    """A model, what to calibrate it on, and how good a quantized one is.

    Attributes:
        quality: Of a file; higher is better unless ``lower`` says so.
    """

    name: str
    source: Path
    feeds: Path
    quality: Callable[[Path], float]
    what: str
    ours: Sequence[str]
    peers: Sequence[Tool]
    lower: bool = False


def rows() -> list[Row]:
    made = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for make in (_resnets, _magika, _minilm, _shakespeare):
            for case in make(folder):
                made += _compared(case, folder)
        made += _speeds(folder)
    return made


def _compared(case: Case, folder: Path) -> list[Row]:
    """One row for each recipe and figure, beside the best of the peers in that figure."""
    tools = [Tool(recipe, _OURS, recipe) for recipe in case.ours]
    done: dict[Tool, tuple[Samples, float]] = {}
    out = {tool: folder / f"{index}.onnx" for index, tool in enumerate((*tools, *case.peers))}
    taken = {tool: Samples() for tool in out}
    failed: set[Tool] = set()
    for _ in range(RUNS):
        for tool in [tool for tool in out if tool not in failed]:
            try:
                run_command(tool.command(case.source, case.feeds, out[tool]), taken[tool])
            except RuntimeError as error:
                print(f"{case.name}, {tool.name}: {str(error)[-300:]}", file=sys.stderr)
                failed.add(tool)
    for tool in out:
        if tool not in failed:
            done[tool] = taken[tool], case.quality(out[tool])
    base = case.quality(case.source)
    rivals = [tool for tool in case.peers if tool in done]
    sign = -1 if case.lower else 1
    made = []
    for tool in (tool for tool in tools if tool in done):
        samples, quality = done[tool]
        shown = f"{quality:.4g} (float32 {base:.4g})"
        if not rivals:
            made.append(Row(f"{case.name}, {tool.name}: {case.what}", shown, "no peer", ""))
            continue
        best = max(rivals, key=lambda one: sign * done[one][1])
        quick = min(rivals, key=lambda one: done[one][0].median)
        small = min(rivals, key=lambda one: done[one][0].peak)
        all_of_them = ", ".join(f"{one.name} {done[one][1]:.4g}" for one in rivals)
        better = sign * quality >= sign * done[best][1]
        made.append(
            Row(f"{case.name}, {tool.name}: {case.what}", shown, all_of_them, "",
                "no worse", better)
        )  # fmt: skip
        time, words = ratio(samples.seconds, done[quick][0].seconds)
        made.append(
            Row(f"{case.name}, {tool.name}: seconds", seconds(samples),
                f"{quick.name} {seconds(done[quick][0])}", words, "under 1", time < 1)
        )  # fmt: skip
        size, words = ratio(samples.peak_bytes, done[small][0].peak_bytes)
        made.append(
            Row(f"{case.name}, {tool.name}: peak memory", mebibytes(samples.peak),
                f"{small.name} {mebibytes(done[small][0].peak)}", words, "under 1", size < 1)
        )  # fmt: skip
    return made


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Whatever makes the models: the fusion that hides int8 products from their kernels is off.
    return ort.InferenceSession(path, options, disabled_optimizers=["MatMulAddFusion"])


def _nncf(method: str = "") -> list[Tool]:
    if not PEERS:
        print("TRIVIUM_PEERS_PYTHON is not set: NNCF left out", file=sys.stderr)
        return []
    found = subprocess.run([PEERS, "-c", "import nncf"], capture_output=True, check=False)
    if found.returncode:
        print(f"{PEERS} has no NNCF: left out", file=sys.stderr)
        return []
    return [Tool("NNCF", _NNCF, method, PEERS)]


def _static(*methods: str) -> list[Tool]:
    return [Tool(f"ONNX Runtime {method}", _ONNXRUNTIME, method) for method in methods]


# --- the models ----------------------------------------------------------------------------------


def _accuracy(feeds: Any, labels: Any) -> Callable[[Path], float]:
    def quality(path: Path) -> float:
        import numpy as np

        session = _session(path)
        name = session.get_inputs()[0].name
        step = 20
        scores = [
            session.run(None, {name: feeds[i : i + step]})[0] for i in range(0, len(feeds), step)
        ]
        found = np.concatenate(scores).reshape(len(feeds), -1).argmax(axis=1)
        return float((found == labels).mean())

    return quality


def _resnets(folder: Path) -> list[Case]:
    import numpy as np

    data = workloads.shared("samples/cifar10_test500.npz")
    cases = []
    for name in ("mlperf_ic_resnet8_fp32", "cifar_resnet20", "cifar_resnet32"):
        source = workloads.shared(f"models/{name}.onnx")
        if data is None or source is None:
            continue
        with np.load(data) as archive:
            x, y = archive["x"].astype(np.float32), archive["y"]
        if name.startswith("cifar"):
            mean = np.array([0.485, 0.456, 0.406], np.float32)
            deviation = np.array([0.229, 0.224, 0.225], np.float32)
            x = ((x / 255 - mean) / deviation).transpose(0, 3, 1, 2).astype(np.float32)
        feeds = folder / f"{name}.npz"
        np.savez(feeds, **{_session(source).get_inputs()[0].name: x[::4]})
        peers = [*_static("MinMax", "Entropy", "Percentile"), *_nncf()]
        cases.append(
            Case(name, source, feeds, _accuracy(x, y), "accuracy", ("int8", "int8-equalized"),
                 peers)
        )  # fmt: skip
    return cases


def _magika(folder: Path) -> list[Case]:
    import numpy as np

    source = workloads.shared("models/magika_v3_3.onnx")
    data = workloads.shared("samples/magika_basic.npz")
    if source is None or data is None:
        return []
    with np.load(data) as archive:
        x = archive["x"]
    session = _session(source)
    name = session.get_inputs()[0].name
    # The labels are folders of files, not the model's: what counts is to answer as in float32.
    wanted = session.run(None, {name: x})[0].argmax(axis=1)
    feeds = folder / "magika.npz"
    np.savez(feeds, **{name: x[::4]})
    return [
        Case("Magika", source, feeds, _accuracy(x, wanted), "same answers as float32", ("int8",),
             [*_static("MinMax", "Entropy"), *_nncf()])
    ]  # fmt: skip


def _minilm(folder: Path) -> list[Case]:
    import numpy as np

    source, feeds = workloads.minilm(folder), workloads.sentences(folder, 64, 128)
    if source is None or feeds is None:
        return []
    with np.load(feeds) as archive:
        arrays = dict(archive)
    calibration = folder / "sentences_calibration.npz"
    np.savez(calibration, **{k: v[:32] for k, v in arrays.items()})
    unseen = {k: v[32:] for k, v in arrays.items()}
    want = _session(source).run(None, unseen)[0].reshape(32, -1)

    def cosine(path: Path) -> float:
        have = _session(path).run(None, unseen)[0].reshape(32, -1)
        norms = np.linalg.norm(want, axis=1) * np.linalg.norm(have, axis=1)
        return float(((want * have).sum(axis=1) / norms).mean())

    peers = [*_static("MinMax"), *_nncf("transformer")]
    return [
        Case("MiniLM", source, calibration, cosine, "cosine on unseen sentences",
             ("int8-smooth", "int8-minmax"), peers)
    ]  # fmt: skip


def _shakespeare(folder: Path) -> list[Case]:
    import numpy as np
    from tokenizers import Tokenizer

    from trivium.compiler import model, prepare
    from trivium.compiler.evaluate import evaluate

    checkpoint, text = (
        workloads.shared("llm-shakespeare"),
        workloads.shared("text/tinyshakespeare.txt"),
    )
    if checkpoint is None or text is None:
        return []
    source = folder / "shakespeare.onnx"
    model.save(prepare.optimize(checkpoint)[0], source)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    # What the model was trained on; the rest of the text is what it is measured on.
    ids = np.array(tokenizer.encode(text.read_text()[:1_000_000]).ids, np.int64)
    windows = np.stack([ids[i : i + 256] for i in np.linspace(0, len(ids) - 256, 128, dtype=int)])
    feeds = folder / "shakespeare.npz"
    np.savez(feeds, input_ids=windows, attention_mask=np.ones_like(windows))

    def perplexity(path: Path) -> float:
        return evaluate(path, checkpoint / "val_ids.npy", metric="perplexity").value

    cases = []
    for bits, ours in ((4, ("int4", "int4-hqq", "int4-awq", "int4-gptq")), (3, ("int3-gptq",)),
                       (2, ("int2-gptq",))):  # fmt: skip
        peers = []
        if bits == 4:
            peers = [Tool("ONNX Runtime RTN", _NBITS, "RTN/4/128"),
                     Tool("ONNX Runtime HQQ", _NBITS, "HQQ/4/128")]  # fmt: skip
        if bits == 2:
            peers = [Tool("ONNX Runtime RTN 2 bits", _NBITS, "RTN/2/64")]
        name = f"Shakespeare, {bits} bits"
        cases.append(Case(name, source, feeds, perplexity, "perplexity", ours, peers, lower=True))
    return cases


def _speeds(folder: Path) -> list[Row]:
    """What the cost model says of each recipe on this CPU, beside what was measured."""
    made = []
    for name, source, feeds, shape, recipes in (
        ("ResNet-20", workloads.shared("models/cifar_resnet20.onnx"), "cifar_resnet20.npz", "N=1",
         ("int8",)),
        ("MiniLM", folder / "minilm.onnx", "sentences_calibration.npz", "batch=1,seq=128",
         ("int8-smooth", "int8-dynamic", "int4")),
    ):  # fmt: skip
        if source is not None and source.is_file():
            made += _speed(name, source, folder / feeds, shape.split(","), recipes)
    return made


def _speed(
    name: str, source: Path, feeds: Path, shape: Sequence[str], recipes: Sequence[str]
) -> list[Row]:
    import numpy as np

    from trivium.compiler import compare
    from trivium.compiler.report import units

    with np.load(feeds) as archive:
        calibration = [{k: v[i : i + 1] for k, v in archive.items()} for i in range(8)]
    found = compare.compare(
        source, ["cpu"], recipes=["none", *recipes], shape=shape, measure=True,
        calibration=calibration,
    )  # fmt: skip
    by_recipe = {one.recipe: compare.row(one) for one in found.candidates}
    base = by_recipe["none"]
    made = []
    for recipe in recipes:
        row = by_recipe[recipe]
        if not all(one["measured"] and one["latency_s"] for one in (row, base)):
            print(f"{name}, {recipe}: not measured: {row['refusals']}", file=sys.stderr)
            continue
        before, after = (one["measured"]["latency_s"] for one in (base, row))
        predicted = base["latency_s"] / row["latency_s"]
        times = f"{units.seconds(before)} to {units.seconds(after)}"
        made.append(
            Row(f"{name}, {recipe}: speed-up on this CPU", f"predicted {predicted:.2f}",
                f"measured {before / after:.2f} ({times})", f"{predicted * after / before:.2f}")
        )  # fmt: skip
    return made

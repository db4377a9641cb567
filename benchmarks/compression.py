"""Quantization against the quantizers of others, each run a whole process that reads a model,
calibrates, quantizes and writes it: quality on labelled or real samples, wall time, peak memory.
Samples that calibrate are never those that are scored. A copy that scores above its float32 source
is lucky: it is shown, and ours need not be as lucky; how far the outputs are from those in float32
(the row of divergence) then says which copy is the better one.

ONNX Runtime's quantizers run in this environment. NNCF, ModelOpt and Neural Compressor 2 (version 3
has no ONNX road) run in the interpreters that TRIVIUM_PEERS_PYTHON names, joined by colons; rows of
peers that are not there are left out with a word on standard error. ModelOpt places Q/DQ for
TensorRT, with float sums, whatever runs it. `pieces` says how to measure in parts.

Not here: MobileNetV2, of which the test data has only a quantized copy and no labelled images.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.harness import Row, Samples, mebibytes, python, ratio, run_command, seconds
from benchmarks.pieces import Pieces

TITLE = "Quantization"

RUNS = int(os.environ.get("TRIVIUM_BENCH_RUNS", "3"))
PEERS = os.environ.get("TRIVIUM_PEERS_PYTHON", "").split(os.pathsep)

LIMIT = 300.0
"""Seconds that one quantization may take."""

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


@dataclass(frozen=True)
class Measure:
    """How good a quantized model is.

    Attributes:
        lower: Whether less is better.
        loss: How much worse than in float32 it may be, where there is a bar.
    """

    what: str
    lower: bool = False
    loss: float | None = None

    def better(self, one: float, other: float) -> bool:
        """Whether a figure is no worse than another."""
        return one <= other + 1e-9 if self.lower else one >= other - 1e-9


@dataclass(frozen=True)
class Part:
    """What calibrates, and how good a file is on samples that did not.

    Attributes:
        quality: From a file to a figure for each measure of the case.
    """

    feeds: Path
    quality: Callable[[Path], list[float]]


@dataclass(frozen=True)
class Case:
    """A model, and its parts: quality is the mean over them, time and memory are of the first."""

    name: str
    source: Path
    parts: Sequence[Part]
    measures: Sequence[Measure]
    ours: Sequence[str]
    peers: Sequence[Tool]

    def quality(self, files: Sequence[Path]) -> list[float]:
        found = [part.quality(file) for part, file in zip(self.parts, files, strict=True)]
        return [sum(column) / len(column) for column in zip(*found, strict=True)]


def rows() -> list[Row]:
    made = []
    pieces = Pieces("compression")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for make in (_resnets, _magika, _minilm, _shakespeare):
            for case in make(folder):
                made += _compared(case, folder, pieces)
        made += _speeds(folder, pieces)
    return made


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What a tool took and gave."""

    samples: Samples
    quality: list[float]


def _compared(case: Case, folder: Path, pieces: Pieces) -> list[Row]:
    ours = [Tool(recipe, _OURS, recipe) for recipe in case.ours]
    done = _measured(case, [*ours, *case.peers], folder, pieces)
    base = pieces.of(f"{case.name}/float32", lambda: case.quality([case.source] * len(case.parts)))
    rivals = {tool.name: done[tool.name] for tool in case.peers if tool.name in done}
    return [
        row
        for tool in ours
        if tool.name in done and base is not None
        for row in _rows(case, tool.name, done[tool.name], rivals, base)
    ]


def _measured(
    case: Case, tools: Sequence[Tool], folder: Path, pieces: Pieces
) -> dict[str, Figures]:
    """Run the tools in turn, as often as asked; then score what each made."""
    samples = {tool.name: Samples() for tool in tools}
    failed: set[str] = set()
    for run in range(RUNS):
        for tool in (tool for tool in tools if tool.name not in failed):
            found = pieces.of(
                f"{case.name}/{tool.name}/run {run}", partial(_run, case, tool, folder)
            )
            if found is None:
                continue
            if "failed" in found:
                failed.add(tool.name)
                continue
            samples[tool.name].seconds.append(found["seconds"])
            samples[tool.name].peak_bytes.append(found["peak_bytes"])
    made = {}
    for tool in (tool for tool in tools if samples[tool.name].seconds):
        quality = pieces.of(f"{case.name}/{tool.name}/quality", partial(_score, case, tool, folder))
        if isinstance(quality, list):
            made[tool.name] = Figures(samples[tool.name], quality)
    return made


def _run(case: Case, tool: Tool, folder: Path) -> dict[str, Any]:
    samples = Samples()
    command = tool.command(case.source, case.parts[0].feeds, _out(case, tool, 0, folder))
    try:
        run_command(command, samples, limit=LIMIT, folder=folder)
    except RuntimeError as error:
        return {"failed": str(error)[-300:]}
    return {"seconds": samples.seconds[0], "peak_bytes": samples.peak_bytes[0]}


def _score(case: Case, tool: Tool, folder: Path) -> list[float] | dict[str, str]:
    files: list[Path] = []
    try:
        _make_all(case, tool, folder, files)
        return case.quality(files)
    except Exception as error:  # a peer's file may be one that onnxruntime refuses, in its own ways
        return {"failed": str(error)[-300:]}


def _make_all(case: Case, tool: Tool, folder: Path, files: list[Path]) -> None:
    for index, part in enumerate(case.parts):
        files.append(_out(case, tool, index, folder))
        if not files[-1].is_file():
            command = tool.command(case.source, part.feeds, files[-1])
            run_command(command, Samples(), limit=LIMIT, folder=folder)


def _out(case: Case, tool: Tool, part: int, folder: Path) -> Path:
    made = folder / "made" / f"{case.name}-{tool.name}-{part}".replace(" ", "-")
    made.mkdir(parents=True, exist_ok=True)
    return made / "model.onnx"


def _rows(
    case: Case, name: str, own: Figures, rivals: dict[str, Figures], base: list[float]
) -> list[Row]:
    """One row for each figure, beside the best of the peers in that figure."""
    made = []
    for index, measure in enumerate(case.measures):
        value, before = own.quality[index], base[index]
        others = {peer: found.quality[index] for peer, found in rivals.items()}
        bars, met = [], True
        if measure.loss is not None:
            least = before + measure.loss if measure.lower else before - measure.loss
            bars.append(f"{least:.4g}")
            met &= measure.better(value, least)
        if others:
            bars.append("no worse than a peer")
            # A copy that is better than its source is lucky: it counts as no better.
            met &= all(
                measure.better(value, other)
                for other in others.values()
                if measure.better(before, other)
            )
        made.append(
            Row(
                f"{case.name}, {name}: {measure.what}",
                f"{value:.4g} (float32 {before:.4g})",
                ", ".join(f"{peer} {other:.4g}" for peer, other in others.items()) or "no peer",
                "", ", ".join(bars), met if bars else None,
            )
        )  # fmt: skip
    if rivals:
        quick = min(rivals, key=lambda peer: rivals[peer].samples.median)
        time, words = ratio(own.samples.seconds, rivals[quick].samples.seconds)
        made.append(
            Row(f"{case.name}, {name}: seconds", seconds(own.samples),
                f"{quick} {seconds(rivals[quick].samples)}", words, "under 1", time < 1)
        )  # fmt: skip
        small = min(rivals, key=lambda peer: rivals[peer].samples.peak)
        size, words = ratio(own.samples.peak_bytes, rivals[small].samples.peak_bytes)
        made.append(
            Row(f"{case.name}, {name}: peak memory", mebibytes(own.samples.peak),
                f"{small} {mebibytes(rivals[small].samples.peak)}", words, "under 1", size < 1)
        )  # fmt: skip
    return made


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Whatever makes the models: the fusion that hides int8 products from their kernels is off.
    return ort.InferenceSession(path, options, disabled_optimizers=["MatMulAddFusion"])


# --- the peers ------------------------------------------------------------------------------------


def _static(*methods: str) -> list[Tool]:
    return [Tool(f"ONNX Runtime {method}", _ONNXRUNTIME, method) for method in methods]


def _others(modelopt: str, kind: str = "") -> list[Tool]:
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
        holders = [path for path in PEERS if path and _runs([path, "-c", probe])]
        if holders:
            found.append(Tool(name, script, method, holders[0]))
        else:
            print(f"TRIVIUM_PEERS_PYTHON has no {name}: left out", file=sys.stderr)
    return found


def _runs(command: Sequence[str]) -> bool:
    return not subprocess.run(command, capture_output=True, check=False).returncode


# --- the models -----------------------------------------------------------------------------------


def _scores(path: Path, feeds: Any) -> Any:
    """[samples, classes] of a model with one input."""
    import numpy as np

    session = _session(path)
    name = session.get_inputs()[0].name
    step = 20
    made = [session.run(None, {name: feeds[i : i + step]})[0] for i in range(0, len(feeds), step)]
    return np.concatenate(made).reshape(len(feeds), -1)


def _divergence(wanted: Any, found: Any) -> float:
    """Mean Kullback-Leibler divergence of probabilities, or of scores that a softmax makes so."""
    import numpy as np

    logarithms = []
    for scores in (wanted, found):
        if scores.min() >= 0:  # the model's own softmax
            scores = np.log(np.maximum(scores, 1e-9))
        scores = scores - scores.max(axis=1, keepdims=True)
        logarithms.append(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))
    first, second = logarithms
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


def _classified(source: Path, feeds: Any, labels: Any) -> Callable[[Path], list[float]]:
    """Accuracy, and divergence from the source."""

    def quality(path: Path) -> list[float]:
        found, wanted = _scores(path, feeds), _scores(source, feeds)
        right = (found.argmax(axis=1) == labels).mean()
        return [float(right), _divergence(wanted, found)]

    return quality


_ACCURACY = Measure("accuracy", loss=0.005)
_DIVERGENCE = Measure("divergence from float32", lower=True)


def _resnets(folder: Path) -> list[Case]:
    import numpy as np

    data = workloads.shared("samples/cifar10_test500.npz")
    cases = []
    for name, file in (
        ("ResNet-8", "mlperf_ic_resnet8_fp32"),
        ("ResNet-20", "cifar_resnet20"),
        ("ResNet-32", "cifar_resnet32"),
    ):
        source = workloads.shared(f"models/{file}.onnx")
        if data is None or source is None:
            continue
        with np.load(data) as archive:
            x, y = archive["x"].astype(np.float32), archive["y"]
        if file.startswith("cifar"):
            mean = np.array([0.485, 0.456, 0.406], np.float32)
            deviation = np.array([0.229, 0.224, 0.225], np.float32)
            x = ((x / 255 - mean) / deviation).transpose(0, 3, 1, 2).astype(np.float32)
        order = np.random.default_rng(0).permutation(len(x))
        halves = order[: len(x) // 2], order[len(x) // 2 :]
        parts = []
        for index, (own, other) in enumerate((halves, halves[::-1])):
            feeds = folder / f"{file}-{index}.npz"
            np.savez(feeds, **{_session(source).get_inputs()[0].name: x[own]})
            parts.append(Part(feeds, _classified(source, x[other], y[other])))
        peers = [*_static("MinMax", "Entropy", "Percentile"), *_others("entropy")]
        ours = ("int8", "int8-minmax")
        cases.append(Case(name, source, parts, (_ACCURACY, _DIVERGENCE), ours, peers))
    return cases


def _magika(folder: Path) -> list[Case]:
    import numpy as np

    source = workloads.shared("models/magika_v3_3.onnx")
    data = workloads.shared("samples/magika_basic.npz")
    if source is None or data is None:
        return []
    with np.load(data) as archive:
        x = archive["x"]
    chosen = np.arange(len(x)) % 4 == 0
    feeds = folder / "magika.npz"
    np.savez(feeds, **{_session(source).get_inputs()[0].name: x[chosen]})
    # The labels are folders of files, not the model's: what counts is to answer as in float32.
    wanted = _scores(source, x[~chosen]).argmax(axis=1)
    part = Part(feeds, _classified(source, x[~chosen], wanted))
    measures = Measure("same answers as float32"), _DIVERGENCE
    peers = [*_static("MinMax", "Entropy"), *_others("max")]
    return [Case("Magika", source, [part], measures, ("int8", "int8-minmax"), peers)]


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

    def cosine(path: Path) -> list[float]:
        have = _session(path).run(None, unseen)[0].reshape(32, -1)
        norms = np.linalg.norm(want, axis=1) * np.linalg.norm(have, axis=1)
        return [float(((want * have).sum(axis=1) / norms).mean())]

    peers = [*_static("MinMax"), *_others("max", "transformer")]
    measures = (Measure("cosine on unseen sentences"),)
    part = Part(calibration, cosine)
    return [Case("MiniLM", source, [part], measures, ("int8", "int8-smooth"), peers)]


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

    def perplexity(path: Path) -> list[float]:
        return [evaluate(path, checkpoint / "val_ids.npy", metric="perplexity").value]

    part = Part(feeds, perplexity)
    measures = (Measure("perplexity", lower=True),)
    cases = []
    for bits, ours in ((4, ("int4", "int4-hqq", "int4-awq", "int4-gptq")), (3, ("int3-gptq",)),
                       (2, ("int2-gptq",))):  # fmt: skip
        peers = []
        if bits == 4:
            peers = [Tool("ONNX Runtime RTN", _NBITS, "RTN/4/128"),
                     Tool("ONNX Runtime HQQ", _NBITS, "HQQ/4/128")]  # fmt: skip
        if bits == 2:
            peers = [Tool("ONNX Runtime RTN 2 bits", _NBITS, "RTN/2/64")]
        cases.append(Case(f"Shakespeare, {bits} bits", source, [part], measures, ours, peers))
    return cases


# --- predicted and measured -----------------------------------------------------------------------


def _speeds(folder: Path, pieces: Pieces) -> list[Row]:
    """What the cost model says of each recipe on this CPU, beside what was measured."""
    made = []
    for name, source, feeds, shape, recipes in (
        ("ResNet-8", workloads.shared("models/mlperf_ic_resnet8_fp32.onnx"),
         "mlperf_ic_resnet8_fp32-0.npz", "input_1=1x32x32x3", ("int8",)),
        ("ResNet-20", workloads.shared("models/cifar_resnet20.onnx"), "cifar_resnet20-0.npz", "N=1",
         ("int8",)),
        ("ResNet-32", workloads.shared("models/cifar_resnet32.onnx"), "cifar_resnet32-0.npz", "N=1",
         ("int8",)),
        ("MiniLM", folder / "minilm.onnx", "sentences_calibration.npz", "batch=1,seq=128",
         ("int8-smooth", "int8-dynamic", "int4")),
    ):  # fmt: skip
        if source is None or not source.is_file():
            continue
        figures = pieces.of(
            f"{name}/speed", partial(_speed, source, folder / feeds, shape.split(","), recipes)
        )
        for recipe, found in (figures or {}).items():
            if "refused" in found:
                print(f"{name}, {recipe}: not measured: {found['refused']}", file=sys.stderr)
                continue
            made.append(_speed_row(f"{name}, {recipe}: speed-up on this CPU", found))
    return made


def _speed(
    source: Path, feeds: Path, shape: Sequence[str], recipes: Sequence[str]
) -> dict[str, Any]:
    import numpy as np

    from trivium.compiler import compare
    from trivium.compiler import rows as shown

    with np.load(feeds) as archive:
        calibration = [{k: v[i : i + 1] for k, v in archive.items()} for i in range(8)]
    found = compare.compare(
        source, ["cpu"], recipes=["none", *recipes], shape=shape, measure=True,
        calibration=calibration,
    )  # fmt: skip
    by_recipe = {one.recipe: shown.row(one) for one in found.candidates}
    base = by_recipe["none"]
    made: dict[str, Any] = {}
    for recipe in recipes:
        row = by_recipe[recipe]
        if not all(one["measured"] and one["latency_s"] for one in (row, base)):
            made[recipe] = {"refused": str(row["refusals"] or base["refusals"])}
            continue
        made[recipe] = {
            "predicted": base["latency_s"] / row["latency_s"],
            "before_s": base["measured"]["latency_s"],
            "after_s": row["measured"]["latency_s"],
        }
    return made


def _speed_row(what: str, found: dict[str, float]) -> Row:
    from trivium.compiler.report import units

    before, after, predicted = found["before_s"], found["after_s"], found["predicted"]
    times = f"{units.seconds(before)} to {units.seconds(after)}"
    return Row(
        what, f"predicted {predicted:.2f}", f"measured {before / after:.2f} ({times})",
        f"{predicted * after / before:.2f}",
    )  # fmt: skip

"""Quantization against the quantizers of others, each run a whole process that reads a model,
calibrates, quantizes and writes it: quality on labelled or real samples, wall time, peak memory.
Samples that calibrate are never those that are scored. A copy that scores above its float32 source
is lucky: it is shown, and ours need not be as lucky; how far the outputs are from those in float32
(the row of divergence) then says which copy is the better one.

ONNX Runtime's quantizers run in this environment, NNCF, ModelOpt and Neural Compressor in others
(`quantizers`); rows of peers that are not there are left out with a word on standard error.
ModelOpt places Q/DQ for TensorRT, with float sums, whatever runs it. `pieces` says how to measure
in parts.

MobileNetV2 is made of the quantized copy that the test data has (`mobilenet`); it has no labelled
images, so what counts is to answer as in float32.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import mobilenet, quantizers, recipe_speeds, workloads
from benchmarks.harness import Row, Samples, mebibytes, ratio, run_command, seconds
from benchmarks.pieces import Pieces
from benchmarks.quantizers import Tool, others, static

TITLE = "Quantization"

RUNS = int(os.environ.get("TRIVIUM_BENCH_RUNS", "3"))
LIMIT = 300.0
"""Seconds that one quantization may take."""


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
        for make in (_resnets, _magika, _mobilenet, _minilm, _shakespeare):
            for case in make(folder):
                made += _compared(case, folder, pieces)
        made += recipe_speeds.rows(folder, pieces)
    return made


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What a tool took and gave."""

    samples: Samples
    quality: list[float]


def _compared(case: Case, folder: Path, pieces: Pieces) -> list[Row]:
    ours = [quantizers.ours(recipe) for recipe in case.ours]
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
        peers = [*static("MinMax", "Entropy", "Percentile"), *others("entropy")]
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
    peers = [*static("MinMax", "Entropy"), *others("max")]
    return [Case("Magika", source, [part], measures, ("int8", "int8-minmax"), peers)]


def _mobilenet(folder: Path) -> list[Case]:
    import numpy as np

    source, images = mobilenet.float_copy(folder), mobilenet.pictures(160)
    if source is None or images is None:
        return []
    feeds = folder / "mobilenetv2.npz"
    np.savez(feeds, image=images[:32])
    unseen = images[32:]
    part = Part(feeds, _classified(source, unseen, _scores(source, unseen).argmax(axis=1)))
    measures = Measure("same answers as float32"), _DIVERGENCE
    peers = [*static("MinMax", "Entropy", "Percentile"), *others("entropy")]
    return [Case("MobileNetV2", source, [part], measures, ("int8", "int8-minmax"), peers)]


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

    peers = [*static("MinMax"), *others("max", "transformer")]
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
            peers = [quantizers.nbits("RTN", 4, 128), quantizers.nbits("HQQ", 4, 128)]
        if bits == 2:
            peers = [quantizers.nbits("RTN", 2, 64)]
        cases.append(Case(f"Shakespeare, {bits} bits", source, [part], measures, ours, peers))
    return cases

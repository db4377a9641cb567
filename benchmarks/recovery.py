"""What training gives back: 4-bit weights, 2:4 sparsity, half of the operations, by distillation.

No labels are used. The CIFAR network learns from one half of the 500 test images there are, changed
at random, and is scored on the other half, both ways round; MiniLM and the decoder learn from
Shakespeare and are scored on text that they did not see. The peer is the model as it was.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workloads
from benchmarks.harness import Row, Samples, in_turn, ratio, seconds

TITLE = "Recovery by distillation"

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

STAGES = tuple(f"layer{stage}.{block}.relu2" for stage in (1, 2, 3) for block in range(5))
LAYERS = tuple(f"layer.{index}.mlp.LayerNormalization" for index in range(6))
TOKENS = 64


def rows() -> list[Row]:
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for part in (decoder, encoder, network):
            made += part(Path(name))
    return made


def _tune(
    source: Any, data: Any, passes: Sequence[tuple[str, dict[str, Any]]], **options: Any
) -> Any:
    """Tune with a recipe made of passes, and print what it took."""
    import trivium
    from trivium.compiler.recipe import Recipe, Step

    recipe = Recipe("benchmark", tuple(Step(name, given) for name, given in passes))
    started, cpu = time.perf_counter(), time.process_time()
    made = trivium.tune(source, data, recipe=recipe, **options)
    took = f"{time.process_time() - cpu:.0f} s of CPU in {time.perf_counter() - started:.0f} s"
    print(f"{passes}: {made.before} -> {made.after}, {made.stopped}, {took}", flush=True)
    return made.model, took


# --- the decoder -----------------------------------------------------------------------------


def decoder(folder: Path) -> list[Row]:
    """int4 of the Shakespeare model: perplexity on the validation text."""
    from tokenizers import Tokenizer

    from trivium.compiler import evaluate, model, prepare

    source, text = workloads.shared("llm-shakespeare"), workloads.shared("text/tinyshakespeare.txt")
    if source is None or text is None:
        return []
    held_out = source / "val_ids.npy"
    whole, last = text.read_text(), (source / "val.txt").read_text()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = tokenizer.encode(whole.removesuffix(last), add_special_tokens=False).ids

    def perplexity(path: Path) -> float:
        return evaluate.evaluate(path, held_out, metric="perplexity").value

    plain = folder / "rounded.onnx"
    model.save(prepare.optimize(source, "int4")[0], plain)
    steps = [("quantize-weights", {"bits": 4, "block_size": 128})]
    made, took = _tune(
        source, np.array(ids), steps, steps=120, batch=8, rate=1e-4, alpha=0.0, validation=0.02,
        evaluations=6,
    )  # fmt: skip
    model.save(made, folder / "tuned.onnx")
    before, rounded, after = (
        perplexity(source),
        perplexity(plain),
        perplexity(folder / "tuned.onnx"),
    )
    loss = after / before - 1
    return [
        Row(
            f"int4 decoder: perplexity, {_bits(made):.3g} bits a weight",
            f"{after:.3f} ({took}; {rounded:.3f} by rounding alone)",
            f"float32: {before:.3f}", f"+{loss:.2%}", "+0.5% or less", loss <= 0.005,
        )
    ]  # fmt: skip


def _bits(made: Any) -> float:
    """Bits stored for a weight of a product, scales and zero points counted in."""
    bits = count = 0
    for node in made.graph:
        if node.op_type == "DequantizeLinear":
            stored = [value.const_value for value in node.inputs if value is not None]
            bits += sum(tensor.size * tensor.dtype.bitwidth for tensor in stored)
            count += stored[0].size
    return bits / count


# --- the encoder -----------------------------------------------------------------------------


def encoder(folder: Path) -> list[Row]:
    """MiniLM: cosine of its sentence vectors with those of the model as it was."""
    source = workloads.minilm(folder)
    feeds = workloads.sentences(folder, 1024, TOKENS)
    if source is None or feeds is None:
        return []
    arrays = dict(np.load(feeds))
    data = {name: array[:-128] for name, array in arrays.items()}
    held = {name: array[-128:] for name, array in arrays.items()}
    made = []
    for what, steps in (
        ("2:4", [("prune-sparsegpt", {"m": 4})]),
        (
            "half of the operations",
            [("prune-structured", {"operations": 0.5, "rank": "activation"})],
        ),
    ):
        model, took = _tune(
            source, data, steps, steps=300, batch=8, rate=3e-4, hidden=LAYERS, hidden_weight=0.3,
            evaluations=6, patience=0,
        )  # fmt: skip
        cosine = _cosine(source, _saved(model, folder / "encoder.onnx"), held)
        row = (f"MiniLM, {what}: cosine", f"{cosine:.4f} ({took})", "1", "", "0.99 or more")
        made.append(Row(*row, cosine >= 0.99))
        if "operations" in what:
            made.append(_faster(f"MiniLM, {what}", source, folder / "encoder.onnx", first(held, 1)))
    return made


def first(feeds: dict[str, Any], count: int) -> dict[str, Any]:
    return {name: array[:count] for name, array in feeds.items()}


def _cosine(source: Path, made: Path, feeds: dict[str, Any]) -> float:
    want, have = (_session(path).run(None, feeds)[0] for path in (source, made))
    want, have = (array.reshape(len(array), -1) for array in (want, have))
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(have, axis=1)
    return float(((want * have).sum(axis=1) / norms).mean())


# --- the network -----------------------------------------------------------------------------


def network(folder: Path) -> list[Row]:
    """CIFAR ResNet-32: accuracy on the half of the images that it did not learn from."""
    source = workloads.shared("models/cifar_resnet32.onnx")
    samples = workloads.shared("samples/cifar10_test500.npz")
    if source is None or samples is None:
        return []
    arrays = np.load(samples)
    images = np.ascontiguousarray(
        ((arrays["x"] / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2)
    )
    labels = arrays["y"]
    order = np.random.default_rng(0).permutation(len(images))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    made = []
    ends = STAGES[4::5]
    channels = {"operations": 0.5, "kinds": ["channels"], "rank": "activation"}
    blocks = {"count": 7, "rank": "activation"}
    single = {"input": images[:1]}
    for what, passes, rate, hidden in (
        ("2:4", [("prune-sparsegpt", {"m": 4})], 2e-4, STAGES),
        ("half of the operations, channels", [("prune-structured", channels)], 1e-3, STAGES),
        ("half of the operations, 7 of 15 blocks", [("prune-layers", blocks)], 1e-3, ends),
    ):
        right = base = 0
        small = folder / "network.onnx"
        for own, other in (halves, halves[::-1]):
            model, took = _tune(
                source, {"input": images[own]}, passes, steps=600, batch=32, rate=rate,
                optimizer="adam", hidden=hidden, hidden_weight=0.2, evaluations=6, patience=0,
                augment=("flip", "shift", "mix", "paste"),
            )  # fmt: skip
            _saved(model, small)
            right += _right(small, images[other], labels[other])
            base += _right(source, images[other], labels[other])
        after, before = right / len(labels), base / len(labels)
        ours = f"{after:.1%} (each half {took})"
        row = (f"ResNet-32, {what}: accuracy", ours, f"{before:.1%}", f"{after - before:+.1%}")
        made.append(Row(*row, "-1 point or better", after >= before - 0.01))
        if "operations" in what:
            made.append(_faster(f"ResNet-32, {what}", source, small, single))
    return made


def _right(path: Path, images: Any, labels: Any) -> int:
    scores = _session(path).run(None, {"input": images})[0]
    return int((scores.argmax(axis=1) == labels).sum())


# --- what they share -------------------------------------------------------------------------


def _saved(model: Any, path: Path) -> Path:
    from trivium.compiler import model as models

    models.save(model, path)
    return path


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _faster(what: str, source: Path, made: Path, feeds: dict[str, Any]) -> Row:
    """CPU time of a call in ONNX Runtime on one thread, in turn with the model as it was."""
    small, whole = _session(made), _session(source)

    def measure(session: Any, samples: Samples) -> None:
        started = time.process_time()
        for _ in range(10):
            session.run(None, feeds)
        samples.seconds.append((time.process_time() - started) / 10)
        samples.peak_bytes.append(0)

    ours, peer = in_turn(
        lambda samples: measure(small, samples), lambda samples: measure(whole, samples), runs=9
    )
    speed, words = ratio(peer.seconds, ours.seconds)
    row = (f"{what}: times faster", seconds(ours), seconds(peer), words)
    return Row(*row, "1.6 or more", speed >= 1.6)

"""What training gives back: 4-bit weights, 2:4 sparsity, half of the operations, by distillation.

No labels are used. The CIFAR network learns from one half of the 500 test images there are, changed
at random, and is scored on the other half, both ways round; MiniLM and the decoder learn from
Shakespeare and are scored on text that they did not see. The peer is the model as it was.

`pieces` says how to measure in parts; trainings that are killed go on from their checkpoints, which
lie beside the file of lines.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workloads
from benchmarks.harness import Row, Samples, in_turn, ratio, seconds
from benchmarks.pieces import LINES, Pieces

TITLE = "Recovery by distillation"

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

STAGES = tuple(f"layer{stage}.{block}.relu2" for stage in (1, 2, 3) for block in range(5))
LAYERS = tuple(f"layer.{index}.mlp.LayerNormalization" for index in range(6))
TOKENS = 64


def _steps(usual: int) -> int:
    """Updates of a training of a pruned model."""
    return int(os.environ.get("TRIVIUM_BENCH_STEPS", usual))


def rows() -> list[Row]:
    made: list[Row] = []
    pieces = Pieces("recovery")
    with tempfile.TemporaryDirectory() as name:
        for part in (decoder, encoder, network):
            made += part(Path(name), pieces)
    return made


def _tune(
    name: str, source: Any, data: Any, passes: Sequence[tuple[str, dict[str, Any]]], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Tune with a recipe made of passes; say what it took and gave."""
    import trivium
    from trivium.compiler.recipe import Recipe, Step

    recipe = Recipe("benchmark", tuple(Step(name, given) for name, given in passes))
    started, cpu = time.perf_counter(), time.process_time()

    def watch(step: int, steps: int, figures: Any) -> None:
        if not step % max(1, steps // 10):
            took = f"{time.process_time() - cpu:.0f} s of CPU"
            print(f"{name}: {step} of {steps}, {took}, {dict(figures)}", flush=True)

    made = trivium.tune(source, data, recipe=recipe, checkpoint=_kept(name), watch=watch, **options)
    return made.model, {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - started,
        "loss": [made.before.loss, made.after.loss],
        "updates": made.after.step,
    }


def _kept(name: str) -> Path | None:
    """Where a training's checkpoint lies until its figures are written."""
    lines = os.environ.get(LINES)
    return Path(f"{lines}.training", name.replace(" ", "-")) if lines else None


def _piece(pieces: Pieces, name: str, measure: Callable[[], dict[str, Any]]) -> Any:
    """The figures of a training, which is forgotten when they are there."""
    figures, kept = pieces.of(name, measure), _kept(name)
    if figures and kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    return figures


def _took(*found: dict[str, Any]) -> str:
    """Updates up to the best state; of a training that was resumed, the time since."""
    updates, cpu, wall = (
        " and ".join(dict.fromkeys(f"{figures[key]:.0f}" for figures in found))
        for key in ("updates", "cpu_s", "wall_s")
    )
    return f"{updates} updates, {cpu} s of CPU in {wall} s"


# --- the decoder -----------------------------------------------------------------------------


def decoder(folder: Path, pieces: Pieces) -> list[Row]:
    """int4 of the Shakespeare model: perplexity on the validation text."""
    figures = _piece(pieces, "decoder", partial(_decoder, folder))
    if not figures:
        return []
    before, rounded, after = (figures[key] for key in ("float32", "rounded", "tuned"))
    loss = after / before - 1
    return [
        Row(
            f"int4 decoder: perplexity, {figures['bits']:.3g} bits a weight",
            f"{after:.3f} ({_took(figures)}; {rounded:.3f} by GPTQ alone)",
            f"float32: {before:.3f}", f"{loss:+.2%}", "+0.5% or less, and no worse than GPTQ",
            loss <= 0.005 and after <= rounded,
        )
    ]  # fmt: skip


def _decoder(folder: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    from trivium.compiler import evaluate, model, prepare

    source, text = workloads.shared("llm-shakespeare"), workloads.shared("text/tinyshakespeare.txt")
    if source is None or text is None:
        return {}
    held_out = source / "val_ids.npy"
    whole, last = text.read_text(), (source / "val.txt").read_text()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = np.array(
        tokenizer.encode(whole.removesuffix(last), add_special_tokens=False).ids, np.int64
    )

    def perplexity(path: Path) -> float:
        return evaluate.evaluate(path, held_out, metric="perplexity").value

    plain = folder / "rounded.onnx"
    windows = np.stack([ids[i : i + 256] for i in np.linspace(0, len(ids) - 256, 128, dtype=int)])
    feeds = [{"input_ids": one[None], "attention_mask": np.ones_like(one[None])} for one in windows]
    model.save(prepare.optimize(source, "int4-gptq", calibration=feeds)[0], plain)
    steps = [("quantize-weights", {"bits": 4, "block_size": 128, "method": "gptq"})]
    made, figures = _tune(
        "decoder", source, ids, steps, steps=120, batch=8, rate=3e-5, alpha=0.0, validation=0.02,
        evaluations=6, temperature=1.0,
    )  # fmt: skip
    model.save(made, folder / "tuned.onnx")
    return {
        **figures,
        "bits": _bits(made),
        "float32": perplexity(source),
        "rounded": perplexity(plain),
        "tuned": perplexity(folder / "tuned.onnx"),
    }


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


def encoder(folder: Path, pieces: Pieces) -> list[Row]:
    """MiniLM: cosine of a text's states with those of the model as it was."""
    made = []
    half = {"operations": 0.5, "rank": "activation"}
    # Few products keep their width in a half, and their sums are all that could be refitted.
    refit = {"refit": True, "rate": 1.5e-4}
    for what, steps, options in (
        ("2:4", [("prune-sparsegpt", {"m": 4})], refit),
        ("half of the operations", [("prune-structured", half)], {"rate": 3e-4}),
    ):
        name = f"MiniLM, {what}"
        figures = _piece(pieces, name, partial(_encoder, name, steps, options, folder))
        if not figures:
            continue
        cosine, pruned = (float(np.ravel(figures[key])[0]) for key in ("cosine", "pruned"))
        shown = f"{cosine:.4f} ({_took(figures)}; {pruned:.4f} untrained)"
        row = (f"{name}: cosine", shown, "1", "", "0.99 or more")
        made.append(Row(*row, cosine >= 0.99))
        if "operations" in what:
            speed = pieces.of(f"{name}, speed", partial(_encoder_speed, steps, folder))
            made += [_speed_row(name, speed)] if speed else []
    return made


def _encoder(
    name: str,
    steps: Sequence[tuple[str, dict[str, Any]]],
    options: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    source = workloads.minilm(folder)
    feeds = workloads.sentences(folder, 4096, TOKENS)
    if source is None or feeds is None:
        return {}
    arrays = dict(np.load(feeds))
    data = {name: array[:-128] for name, array in arrays.items()}
    held = {name: array[-128:] for name, array in arrays.items()}
    pruned = _pruned(source, steps, first(data, 256), folder)
    model, figures = _tune(
        name, source, data, steps, steps=_steps(2400), batch=8, hidden=LAYERS, hidden_weight=0.3,
        evaluations=20, patience=0, freeze=("embeddings.*",), validation=0.02, **options,
    )  # fmt: skip
    small = _saved(model, folder / "encoder.onnx")
    return {
        **figures,
        "pruned": _cosine(source, pruned, held),
        "cosine": _cosine(source, small, held),
    }


def _encoder_speed(
    steps: Sequence[tuple[str, dict[str, Any]]], folder: Path
) -> dict[str, list[float]]:
    source = workloads.minilm(folder)
    feeds = workloads.sentences(folder, 256, TOKENS)
    if source is None or feeds is None:
        return {}
    data = dict(np.load(feeds))
    return _speed(source, _pruned(source, steps, data, folder), first(data, 1))


def first(feeds: dict[str, Any], count: int) -> dict[str, Any]:
    return {name: array[:count] for name, array in feeds.items()}


def _cosine(source: Path, made: Path, feeds: dict[str, Any]) -> list[float]:
    """Of each output: the mean over the texts."""
    found = []
    for want, have in zip(
        *(_session(path).run(None, feeds) for path in (source, made)), strict=True
    ):
        a, b = (array.reshape(len(array), -1) for array in (want, have))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        found.append(float(((a * b).sum(axis=1) / norms).mean()))
    return found


# --- the network -----------------------------------------------------------------------------


def network(folder: Path, pieces: Pieces) -> list[Row]:
    """CIFAR ResNet-32: accuracy on the half of the images that it did not learn from."""
    made = []
    # ONNX Runtime convolves channels in blocks: half by eights was only 1.3 times faster.
    channels = {"operations": 0.94, "kinds": ["channels"], "rank": "activation", "multiple": 16}
    both = [
        ("prune-layers", {"count": 7, "rank": "activation"}),
        ("prune-structured", channels),
    ]
    ends = STAGES[4::5]
    for what, passes, rate, hidden, updates in (
        ("2:4", [("prune-sparsegpt", {"m": 4})], 1e-4, STAGES, 4000),
        ("half of the operations, 7 blocks and channels", both, 3e-4, ends, 700),
    ):
        name = f"ResNet-32, {what}"
        halves = [
            _piece(pieces, f"{name}, half {half}", partial(
                _network, f"{name}, half {half}", passes, rate, hidden, updates, half, folder))
            for half in (0, 1)
        ]  # fmt: skip
        found = [half for half in halves if half]
        if len(found) < len(halves):
            continue
        total = sum(half["images"] for half in found)
        after, before, pruned = (
            sum(half[key] for half in found) / total for key in ("right", "base", "pruned")
        )
        ours = f"{after:.1%} (the halves {_took(*found)}; {pruned:.1%} untrained)"
        row = (f"{name}: accuracy", ours, f"{before:.1%}", f"{after - before:+.1%}")
        made.append(Row(*row, "-1 point or better", after >= before - 0.01))
        if "operations" in what:
            speed = pieces.of(f"{name}, speed", partial(_network_speed, passes, folder))
            made += [_speed_row(name, speed)] if speed else []
    return made


def _network_speed(
    passes: Sequence[tuple[str, dict[str, Any]]], folder: Path
) -> dict[str, list[float]]:
    found = _images()
    if found is None:
        return {}
    source, images, _ = found
    pruned = _pruned(source, passes, {"input": images[:256]}, folder)
    return _speed(source, pruned, {"input": images[:1]})


def _images() -> tuple[Path, Any, Any] | None:
    """The network, what it takes, and labels."""
    source = workloads.shared("models/cifar_resnet32.onnx")
    samples = workloads.shared("samples/cifar10_test500.npz")
    if source is None or samples is None:
        return None
    arrays = np.load(samples)
    images = ((arrays["x"] / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2)
    return source, np.ascontiguousarray(images), arrays["y"]


def _network(
    name: str,
    passes: Sequence[tuple[str, dict[str, Any]]],
    rate: float,
    hidden: Sequence[str],
    updates: int,
    half: int,
    folder: Path,
) -> dict[str, Any]:
    found = _images()
    if found is None:
        return {}
    source, images, labels = found
    order = np.random.default_rng(0).permutation(len(images))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    own, other = halves if half == 0 else halves[::-1]
    data = {"input": images[own]}
    pruned = _pruned(source, passes, data, folder)
    model, figures = _tune(
        name, source, data, passes, steps=_steps(updates), batch=32, rate=rate, optimizer="adam",
        hidden=tuple(hidden), hidden_weight=0.2, evaluations=20, patience=0,
        augment=("flip", "shift", "mix", "paste"), refit=True,
    )  # fmt: skip
    small = _saved(model, folder / "network.onnx")
    return {
        **figures,
        "images": len(other),
        "right": _right(small, images[other], labels[other]),
        "pruned": _right(pruned, images[other], labels[other]),
        "base": _right(source, images[other], labels[other]),
    }


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


def _pruned(
    source: Path,
    passes: Sequence[tuple[str, dict[str, Any]]],
    data: dict[str, Any],
    folder: Path,
) -> Path:
    """The recipe alone."""
    from trivium.compiler import prepare
    from trivium.compiler.recipe import Recipe, Step

    recipe = Recipe("benchmark", tuple(Step(name, given) for name, given in passes))
    count = len(next(iter(data.values())))
    feeds = [{k: v[i : i + 32] for k, v in data.items()} for i in range(0, count, 32)]
    return _saved(prepare.optimize(source, recipe, calibration=feeds)[0], folder / "pruned.onnx")


def _speed(source: Path, made: Path, feeds: dict[str, Any]) -> dict[str, list[float]]:
    """CPU time of a call in ONNX Runtime on one thread, in turn with the model as it was."""
    small, whole = _session(made), _session(source)

    def measure(session: Any, samples: Samples) -> None:
        started = time.process_time()
        for _ in range(10):
            session.run(None, feeds)
        samples.seconds.append((time.process_time() - started) / 10)

    ours, peer = in_turn(
        lambda samples: measure(small, samples), lambda samples: measure(whole, samples), runs=9
    )
    return {"ours": ours.seconds, "peer": peer.seconds}


def _speed_row(what: str, figures: dict[str, list[float]]) -> Row:
    speed, words = ratio(figures["peer"], figures["ours"])
    ours, peer = (seconds(Samples(figures[key])) for key in ("ours", "peer"))
    return Row(f"{what}: times faster", ours, peer, words, "1.6 or more", speed >= 1.6)

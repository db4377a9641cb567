"""Tuning: what is written back is what was trained, is better for it, and survives accidents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import trivium
from tests.backends.transformer import write_transformer
from tests.property.graphs import run
from trivium.compiler import model as models
from trivium.compiler import prepare
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import weight
from trivium.compiler.recipe import Recipe, Step

jax = pytest.importorskip("jax", reason="tuning needs the extra trivium[tune]")
pytest.importorskip("optax", reason="tuning needs the extra trivium[tune]")

Array = np.ndarray[Any, np.dtype[Any]]

INT4 = Recipe(
    "int4",
    (Step("quantize-weights", {"bits": 4, "block_size": 16, "min_elements": 64}),),
)
HALVES = Recipe("2:4", (Step("prune-n-m", {"n": 2, "m": 4}),))


def network(seed: int = 0, softmax: bool = False) -> ir.Model:
    """16 inputs, 32 hidden, 4 classes."""
    rng = np.random.default_rng(seed)
    last = "l = Gemm(h, w2, b2)\n y = Softmax(l)" if softmax else "y = Gemm(h, w2, b2)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        small (float[N,16] x) => (float[N,4] y) {{
           a = Gemm(x, w1, b1)
           h = Relu(a)
           {last}
        }}"""
    )
    for name, shape in {"w1": (16, 32), "b1": (32,), "w2": (32, 4), "b2": (4,)}.items():
        array = (rng.standard_normal(shape) * 2 / np.sqrt(16)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def samples(count: int = 256, labelled: bool = True) -> dict[str, Array]:
    """Inputs and the classes that another network gives them."""
    x = np.random.default_rng(7).standard_normal((count, 16)).astype(np.float32)
    y = run(network(seed=3), {"x": x})[0].argmax(axis=1)
    return {"x": x, "y": y} if labelled else {"x": x}


def tune(model: Any, data: Any, **options: Any) -> Any:
    return trivium.tune(model, data, **{"batch": 64, "steps": 40, "evaluations": 4, **options})


def divergence(student: Array, teacher: Array, temperature: float) -> float:
    """The textbook's ``T^2 KL(teacher || student)``, in numpy."""

    def softmax(x: Array) -> Array:
        e = np.exp(x / temperature - (x / temperature).max(axis=1, keepdims=True))
        return np.asarray(e / e.sum(axis=1, keepdims=True))

    p, q = softmax(teacher.astype(np.float64)), softmax(student.astype(np.float64))
    return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


def test_int4_comes_back_and_the_file_holds_what_was_trained() -> None:
    data = samples(labelled=False)
    plain, _ = prepare.optimize(network(), INT4)
    tuned = tune(network(), data, recipe=INT4, rate=3e-3, validation=0.5, temperature=3.0)
    assert tuned.stopped == "finished"
    assert tuned.matched == {"y": "kl"}
    assert tuned.after.loss < 0.8 * tuned.before.loss
    # The engine that runs the file sees the loss that training saw, on the samples held out.
    order = np.arange(256)
    np.random.default_rng([0, 1]).shuffle(order)
    held = data["x"][np.sort(order[-128:])]
    teacher = run(network(), {"x": held})[0]
    for model, look in ((plain, tuned.before), (tuned.model, tuned.after)):
        measured = divergence(run(model, {"x": held})[0], teacher, 3.0)
        assert measured == pytest.approx(look.loss, rel=1e-3)
    codes = tuned.model.graph.initializers["w1_quantized"]
    before = plain.graph.initializers["w1_quantized"]
    assert codes.dtype == ir.DataType.INT4
    assert not np.array_equal(weight(codes), weight(before))  # type: ignore[arg-type]
    assert [n.op_type for n in tuned.model.graph] == [n.op_type for n in plain.graph]


def test_static_int8_trains_weights_and_biases_through_its_rounding() -> None:
    data = samples(labelled=False)
    coarse = Recipe("static", (Step("quantize-static", {"weight_bits": 3, "method": "minmax"}),))
    tuned = tune(network(), data, recipe=coarse, rate=3e-3)
    assert tuned.after.loss < tuned.before.loss
    bias = next(
        value
        for name, value in tuned.model.graph.initializers.items()
        if value.dtype == ir.DataType.INT32
    )
    assert bias.const_value is not None
    plain, _ = prepare.optimize(network(), "int8-entropy", calibration=[{"x": data["x"]}])
    scales = {n: weight(v) for n, v in tuned.model.graph.initializers.items() if "scale" in n}
    for name, value in scales.items():
        assert value is not None
        assert np.isfinite(value).all(), name
    for node in tuned.model.graph:
        # Activations' scales have learned, and biases lie on the grid that both scales make.
        if node.op_type == "Gemm":
            x, w, b = (weight(v.producer().inputs[1]) for v in node.inputs)
            assert x is not None
            assert w is not None
            assert b is not None
            np.testing.assert_allclose(b, x * w, rtol=1e-5)
    frozen = tune(network(), data, recipe=coarse, rate=3e-3, scales=False, steps=1).model
    before = weight(frozen.graph.initializers["x_scale"])
    assert scales["x_scale"] != before
    assert set(scales) == {n for n in plain.graph.initializers if "scale" in n}


def test_pruned_weights_stay_pruned() -> None:
    tuned = tune(network(), samples(), recipe=HALVES, rate=3e-3)
    assert tuned.after.loss < tuned.before.loss
    array = weight(tuned.model.graph.initializers["w1"])
    assert array is not None
    groups = array.T.reshape(-1, 4)
    assert (np.count_nonzero(groups, axis=1) <= 2).all()
    source = weight(network().graph.initializers["w1"])
    assert source is not None
    assert (array[array != 0] != source[array != 0]).mean() > 0.9, "what is left was trained"


def test_refitting_comes_before_the_first_update_and_keeps_zeros() -> None:
    options: dict[str, Any] = {"recipe": HALVES, "steps": 1, "evaluations": 1}
    plain = tune(network(), samples(labelled=False), **options)
    tuned = tune(network(), samples(labelled=False), **options, refit=True)
    assert (plain.refitted, tuned.refitted) == (0, 2)
    assert tuned.before.loss < 0.9 * plain.before.loss
    for name in ("w1", "w2"):
        have, want = (weight(one.model.graph.initializers[name]) for one in (tuned, plain))
        assert have is not None
        assert want is not None
        np.testing.assert_array_equal(have == 0, want == 0)
    frozen = tune(network(), samples(labelled=False), **options, refit=True, freeze=("w1", "b1"))
    kept, pruned = (
        weight(model.graph.initializers["w1"])
        for model in (frozen.model, prepare.optimize(network(), HALVES)[0])
    )
    assert frozen.refitted == 1
    assert kept is not None
    np.testing.assert_array_equal(kept, pruned)


@pytest.mark.parametrize("quantized", [False, True])
def test_sparsity_rises_to_what_the_recipe_asks(quantized: bool) -> None:
    steps = (Step("prune-magnitude", {"sparsity": 0.75, "min_elements": 8}),)
    chosen = Recipe("gradual", steps + (INT4.steps if quantized else ()))
    tuned = tune(network(), samples(), recipe=chosen, gradual=0.5, rate=3e-3, evaluations=8)
    assert tuned.after.step >= 20, "what is not sparse yet is no candidate"
    if not quantized:
        assert tuned.sparsity == pytest.approx(0.75, abs=0.01)
    else:
        codes = weight(tuned.model.graph.initializers["w1_quantized"])
        assert codes is not None
        assert np.mean(codes.astype(np.float32) == 0) >= 0.74


def test_labels_alone_teach(tmp_path: Path) -> None:
    data = samples(1024)
    out = tmp_path / "tuned.onnx"
    tuned = tune(
        network(), data, recipe="finetune", rate=1e-2, steps=150, out=out, optimizer="lion"
    )
    assert tuned.measure == "accuracy"
    assert tuned.before.score < 0.5
    assert tuned.after.score > 0.7
    have = run(models.load(out), {"x": data["x"]})[0].argmax(axis=1)
    assert (have == data["y"]).mean() > 0.7
    assert not tuned.matched


def test_a_softmax_at_the_end_stays_and_is_not_trained_through() -> None:
    data = samples(labelled=False)
    tuned = tune(network(softmax=True), data, recipe=INT4, rate=3e-3)
    assert tuned.matched == {"y": "kl"}
    assert tuned.model.graph.outputs[0].producer().op_type == "Softmax"
    np.testing.assert_allclose(run(tuned.model, {"x": data["x"]})[0].sum(axis=1), 1, rtol=1e-5)
    assert tuned.after.loss < tuned.before.loss


def test_a_loss_of_ones_own_and_weights_left_alone() -> None:
    def loss(outputs: dict[str, Any], batch: dict[str, Any]) -> Any:
        return ((outputs["y"] - batch["y"]) ** 2).mean()

    x = samples()["x"]
    data = {"x": x, "y": run(network(seed=3), {"x": x})[0]}
    tuned = tune(network(), data, recipe="finetune", loss=loss, rate=1e-2, freeze=("w1", "b*"))
    assert tuned.after.loss < tuned.before.loss
    made, source = tuned.model.graph.initializers, network().graph.initializers
    same = {name: bool((weight(made[name]) == weight(source[name])).all()) for name in source}  # type: ignore[union-attr]
    assert same == {"w1": True, "b1": True, "b2": True, "w2": False}


def test_hidden_states_and_attention_maps_are_matched(tmp_path: Path) -> None:
    path = write_transformer(tmp_path / "t.onnx")
    x = np.random.default_rng(0).standard_normal((64, 6, 32)).astype(np.float32)
    losses = {}
    chosen: dict[str, dict[str, Any]] = {
        "none": {},
        "hidden": {"hidden": ("r",), "hidden_weight": 2.0},
        "attention": {"attention": ("attend",)},
    }
    for name, options in chosen.items():
        tuned = tune(
            path, {"x": x}, recipe=INT4, steps=1, evaluations=1, batch=16, match="mse", **options
        )
        losses[name] = tuned.before.loss
        assert len(tuned.model.graph.outputs) == 1, "what was tapped is not written"
        assert all(len(node.outputs) == 1 for node in tuned.model.graph)
    assert losses["hidden"] > losses["none"]
    assert losses["attention"] > losses["none"]
    with pytest.raises(BadInput, match="no value or node named 'attendd'"):
        tune(path, {"x": x}, recipe=INT4, attention=("attendd",))


def test_the_structured_pass_ranks_by_gradients_here() -> None:
    step = Step("prune-structured", {"rank": "taylor", "ratio": 0.5})
    tuned = tune(network(), samples(), recipe=Recipe("half", (step,)), rate=3e-3)
    assert tuned.model.graph.initializers["w1"].shape == [16, 16]
    assert tuned.after.loss < tuned.before.loss


def test_a_diverging_run_gives_back_the_best() -> None:
    data = samples(labelled=False)
    plain, _ = prepare.optimize(network(), INT4)
    tuned = tune(network(), data, recipe=INT4, rate=1e4, clip=0.0, optimizer="sgd", warmup=0.0)
    assert tuned.stopped == "diverged"
    assert "loss" in tuned.reason
    assert tuned.after.step == 0
    np.testing.assert_allclose(run(tuned.model, data)[0], run(plain, data)[0], rtol=1e-4, atol=1e-4)


def test_no_gain_stops_early() -> None:
    tuned = tune(network(), samples(labelled=False), rate=1e-2, patience=2, evaluations=20)
    assert tuned.stopped == "early"
    assert "2 evaluations" in tuned.reason
    assert tuned.history[-1].step < 40
    assert tuned.after.step == 0, "it was its own teacher"


CHILD = """
import sys
import numpy as np
import trivium
from tests.backends.xla.test_training import INT4, network, samples

def noisy(rng, batch):
    noise = rng.standard_normal(batch["x"].shape).astype("f4")
    return {**batch, "x": batch["x"] + np.float32(0.01) * noise}

def watch(step, steps, figures):
    print(step, flush=True)
    if len(sys.argv) > 3 and step == int(sys.argv[3]):
        import time
        time.sleep(60)

made = trivium.tune(
    network(), samples(), recipe=INT4, batch=32, steps=30, evaluations=6, rate=3e-3,
    augment=noisy, checkpoint=sys.argv[1], out=sys.argv[2], watch=watch,
)
print("resumed", made.resumed)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}

    def command(folder: str, out: str, *extra: str) -> list[str]:
        return [sys.executable, "-c", CHILD, str(tmp_path / folder), str(tmp_path / out), *extra]

    child = subprocess.Popen(
        command("state", "resumed.onnx", "17"), stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "17":
            break
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "resumed.onnx").exists()
    facts = json.loads((tmp_path / "state" / "tuning.json").read_text())
    assert facts["step"] == 15
    outputs = [
        subprocess.run(
            command(*names), env=environment, capture_output=True, text=True, check=True
        ).stdout
        for names in (("state", "resumed.onnx"), ("other", "whole.onnx"))
    ]
    assert outputs[0].splitlines()[-1] == "resumed 15"
    assert outputs[1].splitlines()[-1] == "resumed 0"
    assert not (tmp_path / "state").exists(), "a finished run leaves no state"
    assert (tmp_path / "resumed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    tune(network(), samples(64), recipe=INT4, steps=2, checkpoint=tmp_path / "state")
    with pytest.raises(BadInput, match="another model, data, recipe or settings"):
        tune(network(), samples(64), recipe=INT4, steps=3, checkpoint=tmp_path / "state")
    next((tmp_path / "state").glob("*.npz")).write_bytes(b"no archive")
    with pytest.raises(BadInput, match="is damaged"):
        tune(network(), samples(64), recipe=INT4, steps=2, checkpoint=tmp_path / "state")


def test_text_teaches_a_decoder(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("llm-shakespeare")
    ids = np.load(folder / "val_ids.npy")[:1200]
    tuned = trivium.tune(
        folder, ids, recipe="int4+distill", steps=8, batch=8, window=32, evaluations=1,
        alpha=0.0, rate=1e-4, warmup=0.0,
    )  # fmt: skip
    assert tuned.matched == {"logits": "kl"}
    assert tuned.after.loss < tuned.before.loss


def test_a_fixed_batch_is_kept() -> None:
    made = network()
    made.graph.inputs[0].shape = ir.Shape([4, 16])
    tuned = tune(made, samples(), recipe=INT4, rate=3e-3, batch=16)
    assert tuned.after.loss < tuned.before.loss
    assert tuned.model.graph.inputs[0].shape == [4, 16]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two words": ({"recipe": "distill+finetune"}, "contradict each other"),
    "teacher and finetune": ({"recipe": "finetune", "teacher": network()}, "has no teacher"),
    "optimizer": ({"optimizer": "magic"}, "'magic' is not known; known: adam, "),
    "refit and finetune": ({"recipe": "finetune", "refit": True}, "no teacher to fit"),
    "option": ({"stepps": 3}, "no option 'stepps'"),
    "rate": ({"rate": float("nan")}, "not a finite number"),
    "share": ({"alpha": 1.5}, "not between 0 and 1"),
    "gradual without pruning": ({"recipe": "int8-weights", "gradual": 0.5}, "no pass whose"),
    "gradual units": (
        {"recipe": "prune-channels+distill", "gradual": 0.5},
        "prune-structured takes units out, and the graph that is trained keeps its shapes",
    ),
    "blended labels": ({"augment": ("mix",)}, "labels do not blend"),
    "augment": ({"augment": ("turn",)}, "known: flip, shift"),
    "no images": ({"augment": ("flip",), "steps": 1}, "batch of images"),
    "nothing left": ({"freeze": ("*",)}, "no float or quantized weight"),
    "neither": ({"recipe": "int8+distil"}, "no recipe named 'distil'"),
    "no recipe": ({"recipe": "int5+distill"}, "no recipe named 'int5'"),
}


@pytest.mark.parametrize("name", BAD)
def test_contradictions_are_named(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(BadInput, match=message):
        tune(network(), samples(64), **options)


def test_data_that_does_not_fit_is_named(tmp_path: Path) -> None:
    good = samples(8)
    for data, message in (
        ({"z": good["x"], "u": good["x"]}, "no array for the input 'x'"),
        ({"x": good["x"][:, :3]}, r"the model takes \['N', 16\]"),
        ({"x": np.full((4, 16), np.nan, np.float32)}, "NaN or infinity"),
        ({"x": good["x"], "y": good["y"][:3]}, "different lengths: x 8, y 3"),
        ({"x": good["x"][:0]}, "no samples"),
        (np.arange(100), "no .batch, sequence. input of token ids"),
    ):
        with pytest.raises(BadInput, match=message):
            tune(network(), data)
    with pytest.raises(BadInput, match="needs labels"):
        tune(network(), {"x": good["x"]}, loss="cross-entropy")
    with pytest.raises(BadInput, match="nothing to learn from"):
        tune(network(), {"x": good["x"]}, recipe="finetune")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BadInput, match="text needs a tokenizer"):
        tune(network(), tmp_path / "a.txt")
    with pytest.raises(BadInput, match="no such file"):
        tune(network(), tmp_path / "none.npz")


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    models.save(network(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **samples())  # type: ignore[arg-type]
    (tmp_path / "mine.py").write_text(
        "def loss(outputs, batch):\n    return -(outputs['y'].max(-1)).mean() * 0 + 1.0\n"
    )
    base = [sys.executable, "-m", "trivium.compiler.cli", "tune", str(tmp_path / "m.onnx")]
    base += ["--data", str(tmp_path / "d.npz"), "-o", str(tmp_path / "out.onnx")]
    started = time.monotonic()
    done = subprocess.run(
        [*base, "--recipe", "prune-2:4+distill", "--steps", "20", "--rate", "3e-3", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert time.monotonic() - started < 600
    document = json.loads(done.stdout)
    assert document["after"]["loss"] < document["before"]["loss"]
    assert document["stopped"] == "finished"
    assert document["measure"] == "accuracy"
    assert "update 20/20: loss" in done.stderr
    assert (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "out.onnx.tuning").exists()
    for extra, message in (
        (["--loss", f"{tmp_path / 'mine.py'}:other"], "holds no function 'other'"),
        (["--optimizer", "magic"], "'magic' is not known"),
        (["--teacher", str(tmp_path / "none.onnx")], "no such model"),
    ):
        failed = subprocess.run([*base, *extra], capture_output=True, text=True)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1

"""Ensembles of trees against onnx's reference, ONNX Runtime and scikit-learn, on random trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from trivium.backends.xla import onnx_backend, platforms
from trivium.backends.xla.exporting import export, symbols_of
from trivium.backends.xla.lowering import lower, precise
from trivium.compiler.errors import Unsupported

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

ML, FEATURES = "ai.onnx.ml", 5
NAMES = ("LEQ", "LT", "GTE", "GT", "EQ", "NEQ", "MEMBER")
MEMBER = NAMES.index("MEMBER")
Trees = list[dict[str, Any]]


def grow(seed: int, *, targets: int, trees: int = 7, modes: int = MEMBER, low: float = -1) -> Trees:
    """Random trees as nodes in preorder: ``node`` counts within the tree, children are its ids."""
    rng = np.random.default_rng(seed)
    nodes: Trees = []

    def add(tree: int, level: int) -> int:
        node = {"tree": tree, "node": sum(n["tree"] == tree for n in nodes), "leaf": False}
        nodes.append(node)
        if level == 5 or (level > 1 and rng.random() < 0.3):
            weight = np.float32(rng.uniform(low, 1))
            node.update(leaf=True, weight=weight, target=(tree + level) % targets)
            return int(node["node"])
        node.update(
            feature=int(rng.integers(FEATURES)),
            mode=int(rng.integers(modes)),
            split=np.float32(rng.integers(1, 5)),
            missing=int(rng.integers(2)),
            members=rng.choice(np.arange(1, 6), rng.integers(1, 4), replace=False),
        )
        node["true"], node["false"] = add(tree, level + 1), add(tree, level + 1)
        return int(node["node"])

    for tree in range(trees):
        add(tree, 0)
    return nodes


def inputs(seed: int, rows: int = 40) -> np.ndarray[Any, Any]:
    """Whole numbers, so that equality happens, and a few that are missing."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, (rows, FEATURES)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    return x


def tensor(values: Any, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype))


def model(op: str, outputs: dict[str, tuple[int, int]], **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(op, ["x"], list(outputs), domain=ML, **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])
    made = [
        helper.make_tensor_value_info(name, kind, ["n", None][:rank])
        for name, (kind, rank) in outputs.items()
    ]
    version = 5 if op == "TreeEnsemble" else 3
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(ML, version)]
    graph = helper.make_graph([node], "g", [x], made)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def ensemble(nodes: Trees, targets: int, **attributes: Any) -> onnx.ModelProto:
    inner = [n for n in nodes if not n["leaf"]]
    leaves = [n for n in nodes if n["leaf"]]
    place = {
        (n["tree"], n["node"]): (at, n["leaf"])
        for some in (inner, leaves)
        for at, n in enumerate(some)
    }
    for side in ("true", "false"):
        to = [place[n["tree"], n[side]] for n in inner]
        attributes[f"nodes_{side}nodeids"] = [at for at, _ in to]
        attributes[f"nodes_{side}leafs"] = [int(leaf) for _, leaf in to]
    sets = [[*n["members"], np.nan] for n in inner if n["mode"] == MEMBER]
    if sets:
        attributes["membership_values"] = tensor(np.concatenate(sets))
    return model(
        "TreeEnsemble",
        {"y": (TensorProto.FLOAT, 2)},
        n_targets=targets,
        tree_roots=[at for at, n in enumerate(inner) if n["node"] == 0],
        nodes_featureids=[n["feature"] for n in inner],
        nodes_modes=tensor([n["mode"] for n in inner], np.uint8),
        nodes_splits=tensor([n["split"] for n in inner]),
        nodes_missing_value_tracks_true=[n["missing"] for n in inner],
        leaf_targetids=[n["target"] for n in leaves],
        leaf_weights=tensor([n["weight"] for n in leaves]),
        **attributes,
    )


def older(op: str, nodes: Trees, times: int, **attributes: Any) -> onnx.ModelProto:
    """A deprecated form, where each leaf votes some ``times`` for its target."""
    kind = "target" if op == "TreeEnsembleRegressor" else "class"
    leaves = [n for n in nodes if n["leaf"]]
    votes = [(n, n["weight"] / part) for part in range(1, times + 1) for n in leaves]
    outputs: dict[str, tuple[int, int]] = {"y": (TensorProto.FLOAT, 2)}
    if kind == "class":
        outputs = {"label": (TensorProto.INT64, 1), **outputs}
    return model(
        op,
        outputs,
        nodes_treeids=[n["tree"] for n in nodes],
        nodes_nodeids=[n["node"] for n in nodes],
        nodes_featureids=[n.get("feature", 0) for n in nodes],
        nodes_modes=["LEAF" if n["leaf"] else f"BRANCH_{NAMES[n['mode']]}" for n in nodes],
        nodes_values=[float(n.get("split", 0)) for n in nodes],
        nodes_missing_value_tracks_true=[n.get("missing", 0) for n in nodes],
        nodes_truenodeids=[n.get("true", 0) for n in nodes],
        nodes_falsenodeids=[n.get("false", 0) for n in nodes],
        **{
            f"{kind}_treeids": [n["tree"] for n, _ in votes],
            f"{kind}_nodeids": [n["node"] for n, _ in votes],
            f"{kind}_ids": [n["target"] for n, _ in votes],
            f"{kind}_weights": [float(weight) for _, weight in votes],
        },
        **attributes,
    )


def reference(one: onnx.ModelProto, x: np.ndarray[Any, Any]) -> list[Any]:
    return list(ReferenceEvaluator(one).run(None, {"x": x}))


def runtime(one: onnx.ModelProto, x: np.ndarray[Any, Any]) -> list[Any]:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def agrees(one: onnx.ModelProto, x: np.ndarray[Any, Any], *others: Any) -> list[Any]:
    rep = onnx_backend.prepare(one)
    got = list(rep.run([x]))
    assert not rep.baked
    for other in others:
        for mine, theirs in zip(got, other(one, x), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert len(np.unique(got[-1], axis=0)) > 5, "these trees tell nothing apart"
    return got


@pytest.mark.parametrize("aggregate", range(4), ids=["average", "sum", "min", "max"])
@pytest.mark.parametrize("targets", [1, 3])
def test_every_mode_and_aggregate(aggregate: int, targets: int) -> None:
    nodes = grow(aggregate, targets=targets, modes=len(NAMES))
    assert {n["mode"] for n in nodes if not n["leaf"]} == set(range(len(NAMES)))
    one = ensemble(nodes, targets, aggregate_function=aggregate)
    # Where no leaf spoke for a target, ONNX Runtime's minimum is 0, the reference's is not.
    settled = targets == 1 or aggregate < 2
    agrees(one, inputs(aggregate), reference, *([runtime] if settled else []))


@pytest.mark.parametrize("mode", range(len(NAMES)), ids=NAMES)
def test_trees_of_one_mode(mode: int) -> None:
    nodes = grow(mode, targets=2)
    for node in nodes:
        node["mode"] = mode
    agrees(ensemble(nodes, 2), inputs(mode), reference, runtime)


TRANSFORMS = ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO"]


@pytest.mark.parametrize("transform", TRANSFORMS[1:])
def test_scores_are_transformed(transform: str) -> None:
    """ONNX Runtime takes the number 1 for LOGISTIC, against ONNX; by their names it takes both."""
    nodes = [n | {"mode": n.get("mode", 0) % 5} for n in grow(5, targets=3, trees=3)]
    named = older("TreeEnsembleRegressor", nodes, 1, n_targets=3, post_transform=transform)
    agrees(named, inputs(5), runtime)
    numbered = ensemble(nodes, 3, post_transform=TRANSFORMS.index(transform))
    agrees(numbered, inputs(5), lambda _, x: runtime(named, x))


def test_a_probability_becomes_a_probit() -> None:
    one = ensemble(grow(6, targets=1, low=0), 1, post_transform=4, aggregate_function=0)
    agrees(one, inputs(6), runtime)


@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE", "MIN", "MAX"])
@pytest.mark.parametrize("times", [1, 2])
def test_the_older_regressor(aggregate: str, times: int) -> None:
    nodes = [n | {"mode": n.get("mode", 0) % 5} for n in grow(7, targets=1)]
    one = older(
        "TreeEnsembleRegressor", nodes, times, n_targets=1, aggregate_function=aggregate,
        base_values=[0.5],
    )  # fmt: skip
    # ONNX Runtime hears the leaf of a single target once.
    agrees(one, inputs(7), reference, *([runtime] if times == 1 else []))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_older_classifier(transform: str) -> None:
    nodes = [n | {"mode": n.get("mode", 0) % 5} for n in grow(8, targets=3, low=0)]
    one = older(
        "TreeEnsembleClassifier", nodes, 2, classlabels_int64s=[4, 7, 1], post_transform=transform,
        base_values=[0.1, 0.2, 0.3],
    )  # fmt: skip
    label, _ = agrees(one, inputs(8), reference, runtime)
    assert len(set(label.tolist())) > 1


@pytest.mark.parametrize("low", [0, -1], ids=["probabilities", "margins"])
@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC"])
def test_the_older_classifier_of_two_classes(low: float, transform: str) -> None:
    nodes = [n | {"mode": n.get("mode", 0) % 5} for n in grow(9, targets=1, trees=3, low=low)]
    for node in nodes:
        if low == 0 and node["leaf"]:
            node["weight"] /= 5
    one = older(
        "TreeEnsembleClassifier", nodes, 1, classlabels_int64s=[4, 7], post_transform=transform
    )
    label, _ = agrees(one, inputs(9), runtime)
    assert set(label.tolist()) == {4, 7}


def test_a_forest_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.ensemble")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, FEATURES)).astype(np.float32)
    forest = sklearn.RandomForestRegressor(12, random_state=0).fit(x, x[:, 0] * x[:, 1] - x[:, 2])
    nodes = []
    for at, fitted in enumerate(forest.estimators_):
        tree = fitted.tree_
        for node in range(tree.node_count):
            one = {"tree": at, "node": node, "leaf": tree.children_left[node] < 0, "mode": 0}
            one |= {"feature": tree.feature[node], "target": 0, "missing": 0}
            one |= {"weight": tree.value[node].item(), "split": tree.threshold[node]}
            nodes.append(
                one | {"true": tree.children_left[node], "false": tree.children_right[node]}
            )
    fresh = rng.normal(size=(64, FEATURES)).astype(np.float32)
    (got,) = agrees(ensemble(nodes, 1, aggregate_function=0), fresh, runtime)
    np.testing.assert_allclose(got[:, 0], forest.predict(fresh), rtol=1e-4, atol=1e-5)


def test_a_tree_may_be_a_leaf() -> None:
    """One node whose branches are the same leaf, and not the first of the leaves."""
    nodes = grow(10, targets=1, trees=2)
    one = ensemble(nodes, 1)
    leaf = {"tree": 2, "node": 1, "leaf": True, "weight": np.float32(100), "target": 0}
    root = {"tree": 2, "node": 0, "leaf": False, "mode": 0, "split": 0, "feature": 0, "missing": 0}
    both = ensemble([*nodes, root | {"true": 1, "false": 1}, leaf], 1)
    x = inputs(10)
    (more,), (less,) = agrees(both, x, runtime), agrees(one, x, runtime)
    np.testing.assert_allclose(more - 100, less, atol=1e-4)


def test_the_batch_may_stay_symbolic() -> None:
    one = ensemble(grow(12, targets=3, modes=len(NAMES)), 3)
    lowered = lower(ir.from_proto(one), platform="cpu", pack=True)
    program = export(lowered, platforms.Device("cpu"), "highest", symbols=symbols_of(["n"]))
    for rows in (1, 9):
        x = inputs(12, rows)
        with precise():
            got = jax.jit(program.call)(lowered.read(), {"x": x})
        np.testing.assert_allclose(got["y"], runtime(one, x)[0], rtol=1e-5, atol=1e-6)


def test_what_is_refused_says_why() -> None:
    nodes = grow(11, targets=1)
    words = older("TreeEnsembleClassifier", nodes, 1, classlabels_strings=["no", "yes"])
    words.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    nodes[0]["true"] = 0
    for one, why in ((words, "strings"), (ensemble(nodes, 1), "own descendant")):
        with pytest.raises(Unsupported, match=why):
            onnx_backend.prepare(one, bake=False).run([inputs(11)])

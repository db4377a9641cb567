"""Ensembles of decision trees of ``ai.onnx.ml``, all samples and all trees in step.

The nodes of all trees are columns of one table, a leaf being a node whose children are itself. Each
(sample, tree) holds the index of a node, and takes as many steps as the deepest tree has levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.lowering.ops.traditional import DOMAIN
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

Array = np.ndarray[Any, Any]

MODES = (
    "BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ",
    "BRANCH_MEMBER", "LEAF",
)  # fmt: skip
MEMBER, LEAF = MODES.index("BRANCH_MEMBER"), MODES.index("LEAF")
COMPARE: tuple[Callable[[Any, Any], Any], ...] = (
    lambda x, split: x <= split,
    lambda x, split: x < split,
    lambda x, split: x >= split,
    lambda x, split: x > split,
    lambda x, split: x == split,
    lambda x, split: x != split,
)
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


@dataclass(frozen=True)
class Forest:
    """Every node of every tree, and what each leaf says of each target.

    Attributes:
        members: The set of each node whose mode is MEMBER, padded with NaN; one row for the others.
        member_row: Where a node's set is in ``members``.
        votes: By leaf and target, combined already where a leaf has several for one target.
    """

    roots: Array
    mode: Array
    feature: Array
    split: Array
    missing: Array
    if_true: Array
    if_false: Array
    members: Array
    member_row: Array
    votes: Array

    def depth(self, op: Op) -> int:
        """The most steps from a root to a leaf."""
        steps, level = 0, np.unique(self.roots)
        while (level := level[self.mode[level] != LEAF]).size:
            if steps > self.mode.size:
                raise op.refuse("has a node that is its own descendant")
            level = np.unique([self.if_true[level], self.if_false[level]])
            steps += 1
        return steps


def _narrow(table: Array) -> Array:
    """Indices in 32 bits: every step reads several, and half the bytes."""
    return table.astype(np.int32) if table.dtype == np.int64 else table


def _leaves(op: Op, forest: Forest, x: Any) -> Any:
    """The leaf that each sample reaches in each tree."""
    inner = forest.mode != LEAF
    modes = np.unique(forest.mode[inner])
    if inner.any() and not 0 <= forest.feature[inner].max() < x.shape[1]:
        raise op.refuse(f"reads feature {forest.feature[inner].max()} of {x.shape[1]}")
    tables = {name: jnp.asarray(_narrow(table)) for name, table in vars(forest).items()}

    def step(_: Any, at: Any) -> Any:
        value = jnp.take_along_axis(x, tables["feature"][at], axis=1, mode="clip")
        hit = jnp.zeros(at.shape, bool)
        for mode in modes:
            if mode == MEMBER:
                sets = tables["members"][tables["member_row"][at]]
                found = jnp.any(value[..., None] == sets, axis=-1)
            else:
                found = COMPARE[mode](value, tables["split"][at])
            hit = found if modes.size == 1 else jnp.where(tables["mode"][at] == mode, found, hit)
        if forest.missing.any():
            hit |= jnp.isnan(value) & tables["missing"][at]
        return jnp.where(hit, tables["if_true"][at], tables["if_false"][at])

    start = jnp.broadcast_to(tables["roots"], (x.shape[0], forest.roots.size))
    return jax.lax.fori_loop(0, forest.depth(op), step, start)


def _scores(op: Op, forest: Forest, aggregate: str, x: Any) -> Any:
    """The leaves' votes for each sample and target, over all trees."""
    x = jnp.asarray(x).reshape(1, -1) if x.ndim == 1 else jnp.asarray(x)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(np.float32)
    said = jnp.asarray(forest.votes)[_leaves(op, forest, x)]
    if aggregate in ("MIN", "MAX"):
        return jnp.min(said, axis=1) if aggregate == "MIN" else jnp.max(said, axis=1)
    total = jnp.sum(said, axis=1)
    return total / forest.roots.size if aggregate == "AVERAGE" else total


def _votes(
    op: Op, aggregate: str, shape: tuple[int, int], where: Array, targets: Array, weights: Array
) -> Array:
    """A table of nodes by targets; what nobody votes for is left at the aggregate's neutral value,
    as in onnx's reference.
    """
    if targets.size and not 0 <= targets.min() <= targets.max() < shape[1]:
        raise op.refuse(f"votes for target {targets.max()} of {shape[1]}")
    limits = np.finfo(weights.dtype)
    neutral, combine = {"MIN": (limits.max, np.minimum), "MAX": (limits.min, np.maximum)}.get(
        aggregate, (0, np.add)
    )
    table = np.full(shape, neutral, weights.dtype)
    combine.at(table, (where, targets), weights)
    return table


def _transform(op: Op, name: str, scores: Any) -> Any:
    """The scores after ``post_transform``, by the formulas of onnx's reference."""
    if name == "NONE":
        return scores
    if name == "SOFTMAX":
        return jax.nn.softmax(scores, axis=-1)
    if name == "LOGISTIC":
        return jax.nn.sigmoid(scores)
    if name == "SOFTMAX_ZERO":
        top = jnp.max(scores, axis=-1, keepdims=True)
        zero = jnp.abs(scores) <= 1e-7
        parts = jnp.where(zero, scores * jnp.exp(-top), jnp.exp(scores - top))
        total = jnp.sum(parts, axis=-1, keepdims=True)
        return jnp.where(total == 0, 0.5, parts / jnp.where(total == 0, 1, total))
    if name == "PROBIT":  # Winitzki's approximation of the inverse error function
        around = 2 * scores - 1
        inside = (1 - around) * (1 + around)
        log = jnp.log(inside)
        half = 2 / (np.pi * 0.147) + 0.5 * log
        found = jnp.sign(around) * jnp.sqrt(jnp.sqrt(half * half - log / 0.147) - half)
        return jnp.where(inside == 0, 0, 2**0.5 * found).astype(scores.dtype)
    raise op.refuse(f"has post_transform {name}, which ONNX does not")


def _ints(op: Op, name: str) -> Array:
    return np.asarray(op.attr(name, []), np.int64)


def _numbers(op: Op, name: str) -> Array:
    """An attribute of floats, which may be given as a tensor of doubles instead."""
    tensor = op.attr(f"{name}_as_tensor")
    if tensor is None:
        return np.asarray(op.attr(name, []), np.float32)
    return np.asarray(tensor.numpy()).reshape(-1)


def _named(op: Op, name: str, names: Sequence[str]) -> str:
    """What an attribute that is a number stands for."""
    number = int(op.attr(name, names.index("SUM") if "SUM" in names else 0))
    if not 0 <= number < len(names):
        raise op.refuse(f"has {name} {number}, which ONNX does not")
    return names[number]


def _sets(op: Op, mode: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The sets of the MEMBER nodes, in the order of the nodes, and the row of each node."""
    given = op.attr("membership_values")
    values = np.zeros(0, dtype) if given is None else np.asarray(given.numpy()).reshape(-1)
    sets = np.split(values, np.flatnonzero(np.isnan(values)) + 1)
    sets = sets if sets[-1].size else sets[:-1]
    wanted = int((mode == MEMBER).sum())
    if len(sets) != wanted:
        raise op.refuse(f"has {len(sets)} sets of members for {wanted} nodes of mode BRANCH_MEMBER")
    table = np.full((max(wanted, 1), max([1, *map(len, sets)])), np.nan, dtype)
    for row, members in zip(table, sets, strict=False):
        row[: len(members)] = members
    return table, np.maximum(np.cumsum(mode == MEMBER) - 1, 0)


@handles("TreeEnsemble", domain=DOMAIN, since=5)
def tree_ensemble(op: Op, x: Any) -> Any:
    aggregate = _named(op, "aggregate_function", AGGREGATES)
    mode = np.asarray(op.attr("nodes_modes").numpy()).reshape(-1).astype(np.int64)
    weights = np.asarray(op.attr("leaf_weights").numpy()).reshape(-1)
    count, leaves = mode.size, np.arange(weights.size) + mode.size
    if mode.size and mode.max() > MEMBER:
        raise op.refuse(f"has mode {mode.max()}, which ONNX does not")

    def column(values: Array, of_leaves: Any = 0) -> Array:
        return np.concatenate([values, np.broadcast_to(of_leaves, leaves.shape)])

    def child(side: str) -> Array:
        to = _ints(op, f"nodes_{side}nodeids")
        return column(np.where(_ints(op, f"nodes_{side}leafs") > 0, to + count, to), leaves)

    members, member_row = _sets(op, mode, weights.dtype)
    missing = op.attr("nodes_missing_value_tracks_true") or [0] * count
    targets = _ints(op, "leaf_targetids")
    shape = (count + leaves.size, op.attr("n_targets") or int(targets.max()) + 1)
    forest = Forest(
        roots=_ints(op, "tree_roots"),
        mode=column(mode, LEAF),
        feature=column(_ints(op, "nodes_featureids")),
        split=column(np.asarray(op.attr("nodes_splits").numpy()).reshape(-1)),
        missing=column(np.asarray(missing) > 0, False),
        if_true=child("true"),
        if_false=child("false"),
        members=members,
        member_row=column(member_row),
        votes=_votes(op, aggregate, shape, leaves, targets, weights),
    )
    scores = _scores(op, forest, aggregate, x).astype(x.dtype)
    return _transform(op, _named(op, "post_transform", TRANSFORMS), scores)


def _older(op: Op, kind: str, aggregate: str, targets: int) -> Forest:
    """The trees of a TreeEnsembleRegressor (``kind`` is target) or -Classifier (class)."""
    trees, ids = _ints(op, "nodes_treeids"), _ints(op, "nodes_nodeids")
    place = {key: at for at, key in enumerate(zip(trees.tolist(), ids.tolist(), strict=True))}
    own = np.arange(trees.size)
    try:
        mode = np.asarray([MODES.index(name) for name in op.attr("nodes_modes")], np.int64)
    except ValueError as error:
        raise op.refuse(f"has a mode that ONNX does not: {error}") from error

    def find(of_tree: Array, node: Array) -> Array:
        keys = zip(of_tree.tolist(), node.tolist(), strict=True)
        return np.asarray([place[key] for key in keys], np.int64)

    def child(side: str) -> Array:
        to = np.where(mode == LEAF, ids, _ints(op, f"nodes_{side}nodeids"))
        return find(trees, to)

    where = find(_ints(op, f"{kind}_treeids"), _ints(op, f"{kind}_nodeids"))
    weights, voted = _numbers(op, f"{kind}_weights"), _ints(op, f"{kind}_ids")
    missing = op.attr("nodes_missing_value_tracks_true") or [0] * own.size
    return Forest(
        roots=np.unique(trees, return_index=True)[1],
        mode=mode,
        feature=_ints(op, "nodes_featureids"),
        split=_numbers(op, "nodes_values"),
        missing=np.asarray(missing) > 0,
        if_true=child("true"),
        if_false=child("false"),
        members=np.zeros((1, 1), np.float32),
        member_row=np.zeros_like(own),
        votes=_votes(op, aggregate, (own.size, targets), where, voted, weights),
    )


@handles("TreeEnsembleRegressor", domain=DOMAIN)
def tree_ensemble_regressor(op: Op, x: Any) -> Any:
    aggregate = op.attr("aggregate_function", "SUM")
    if aggregate not in AGGREGATES:
        raise op.refuse(f"has aggregate_function {aggregate}, which ONNX does not")
    targets = op.attr("n_targets") or int(_ints(op, "target_ids").max()) + 1
    scores = _scores(op, _older(op, "target", aggregate, targets), aggregate, x)
    base = _numbers(op, "base_values")
    scores = (scores + base if base.size else scores).astype(np.float32)
    return _transform(op, op.attr("post_transform", "NONE"), scores)


@handles("TreeEnsembleClassifier", domain=DOMAIN)
def tree_ensemble_classifier(op: Op, x: Any) -> Any:
    if op.attr("classlabels_strings"):
        raise op.refuse("has labels that are strings, which XLA does not have")
    labels, voted = _ints(op, "classlabels_int64s"), np.unique(_ints(op, "class_ids"))
    base, transform = _numbers(op, "base_values"), op.attr("post_transform", "NONE")
    if labels.size < 2 or (voted.size == 1 and (labels.size > 2 or voted[0] or base.size > 1)):
        raise op.refuse("votes for one class in a form that runtimes read differently")
    if voted.size == 1 and transform not in ("NONE", "LOGISTIC"):
        raise op.refuse(f"votes for one class with {transform}, which runtimes read differently")
    forest = _older(op, "class", "SUM", labels.size)
    scores = _scores(op, forest, "SUM", x)
    if voted.size > 1:
        scores = (scores + base if base.size else scores).astype(np.float32)
        top = jnp.argmax(scores, axis=-1)
        return jnp.asarray(labels)[top], _transform(op, transform, scores)
    # One column of votes for two classes, read as ONNX Runtime reads it, which is what converters
    # write it for: where no vote is negative it is a probability.
    score = (scores[:, 0] + base if base.size else scores[:, 0]).astype(np.float32)
    likely = bool((_numbers(op, "class_weights") >= 0).all())
    rest = 1 - score if likely and transform == "NONE" else -score
    pair = _transform(op, transform, jnp.stack([rest, score], axis=-1))
    return jnp.asarray(labels)[(score > (0.5 if likely else 0)).astype(np.int32)], pair

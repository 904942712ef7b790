"""Ensembles of trees as ONNX, so that the score is scikit-learn's own to the bit.

The usual conversion adds up float32 leaves: the score differs in the last bits, and where two classes tie, noise
decides the label (4 of 10,000 with 50 extra trees). Here one `TreeEnsembleRegressor` of ai.onnx.ml 3 compares and adds
in float64, as scikit-learn does, and rounds its result to float32 once.

**Sums that go on.** That result is final for a forest of votes. Boosting and the isolation forest put it through an
exponential, and would see the rounding. For them every leaf value is cut into three parts: multiples of a power of two
so coarse that any sum of them fits the 24 bits of a float32, multiples of a finer one for the rest, and what remains.
The three sums leave the operator unharmed, and their sum in float64 is what scikit-learn has, but for about 1e-16.

**Isolation forest.** The path length of a leaf, `depth + c(samples)`, is its value; the sum over all trees is put into
`2 ** (-sum / (trees * c(max_samples)))` (Liu, Ting, Zhou: Isolation forest, ICDM 2008). One operator and a `Pow` answer
one window in tens of microseconds, where the graph that skl2onnx writes, which walks every tree by itself, needs about
a millisecond and seconds to load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from contract.models import ONNX_IR, ONNX_ML_OPSET, ONNX_OPSET

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

PARTS = 3
"""Into which a leaf is cut where its sum goes on."""
_MANTISSA_BITS = 24
_EULER = 0.5772156649015329
ESTIMATOR_INPUT, ESTIMATOR_SCORE = "x", "score"
"""Names at the rim of every converted estimator: `x: float64[batch, F]`, `score: float32[batch]` or `[batch, K]`."""


class Tree(NamedTuple):
    """One tree. Node 0 is the root; a node goes left where `x[feature] <= threshold`."""

    feature: Int64s
    threshold: Float64s
    left: Int64s
    """Number of a node; -1 for a leaf."""
    right: Int64s
    value: Float64s
    """`[nodes, targets]`; only that of leaves counts."""


def convert_forest(estimator: Any) -> onnx.ModelProto | None:
    """An estimator of trees as ONNX.

    Args:
        estimator: fitted; of scikit-learn.

    Returns:
        A model from `x` to `score`, or None where it is none of the kinds known here.
    """
    from sklearn import ensemble

    if isinstance(estimator, ensemble.RandomForestClassifier | ensemble.ExtraTreesClassifier):
        return _votes(estimator)
    if isinstance(estimator, ensemble.HistGradientBoostingClassifier):
        return _boosting(estimator)
    if isinstance(estimator, ensemble.IsolationForest):
        return _isolation(estimator)
    return None


def average_path_length(samples: npt.ArrayLike) -> Float64s:
    """Mean depth at which a search in a random binary tree of `samples` points fails: `c(n)` of the paper."""
    number = np.asarray(samples, dtype=np.float64)
    found = np.zeros_like(number)
    found[number == 2] = 1.0
    many = number > 2
    found[many] = 2.0 * (np.log(number[many] - 1.0) + _EULER) - 2.0 * (number[many] - 1.0) / number[many]
    return found


def _votes(estimator: Any) -> onnx.ModelProto:
    trees = [
        _tree_of(member.tree_, member.tree_.value[:, 0, :] / len(estimator.estimators_))
        for member in estimator.estimators_
    ]
    classes = len(estimator.classes_)
    node = _ensemble(trees, classes, ESTIMATOR_INPUT, ESTIMATOR_SCORE)
    return estimator_model([node], [], estimator.n_features_in_, classes)


def _boosting(estimator: Any) -> onnx.ModelProto:
    targets = int(estimator.n_trees_per_iteration_)
    trees = []
    for iteration in estimator._predictors:
        for target, predictor in enumerate(iteration):
            nodes = predictor.nodes
            value = np.zeros((len(nodes), targets))
            value[:, target] = nodes["value"]
            leaf = nodes["is_leaf"].astype(bool)
            left, right = (np.where(leaf, -1, nodes[side].astype(np.int64)) for side in ("left", "right"))
            trees.append(Tree(nodes["feature_idx"].astype(np.int64), nodes["num_threshold"], left, right, value))
    constants = [numpy_helper.from_array(np.asarray(estimator._baseline_prediction, np.float64).reshape(1, -1), "base")]
    nodes_, constants_ = _exact_sum(trees, targets, "sum")
    nodes_.append(helper.make_node("Add", ["sum", "base"], ["raw"]))
    if targets == 1:
        constants.append(numpy_helper.from_array(np.asarray(1.0), "one"))
        nodes_ += [
            helper.make_node("Neg", ["raw"], ["negative"]),
            helper.make_node("Exp", ["negative"], ["odds"]),
            helper.make_node("Add", ["odds", "one"], ["whole"]),
            helper.make_node("Div", ["one", "whole"], ["second"]),
            helper.make_node("Sub", ["one", "second"], ["first"]),
            helper.make_node("Concat", ["first", "second"], ["probability"], axis=1),
        ]
    else:
        nodes_.append(helper.make_node("Softmax", ["raw"], ["probability"], axis=1))
    nodes_.append(helper.make_node("Cast", ["probability"], [ESTIMATOR_SCORE], to=TensorProto.FLOAT))
    return estimator_model(nodes_, constants + constants_, estimator.n_features_in_, max(2, targets))


def _isolation(estimator: Any) -> onnx.ModelProto:
    trees = []
    for member, chosen in zip(estimator.estimators_, estimator.estimators_features_, strict=True):
        tree = member.tree_
        length = _depths(tree.children_left, tree.children_right) + average_path_length(tree.n_node_samples)
        if estimator.max_samples_ == 1:
            # Nothing to isolate: scikit-learn then says 2 ** -1.
            length += 1.0
        feature = np.where(tree.feature >= 0, np.asarray(chosen)[np.maximum(tree.feature, 0)], 0)
        trees.append(_tree_of(tree, length[:, np.newaxis])._replace(feature=feature.astype(np.int64)))
    expected = len(trees) * (float(average_path_length([estimator.max_samples_])[0]) or 1.0)
    nodes, constants = _exact_sum(trees, 1, "sum")
    constants += [
        numpy_helper.from_array(np.asarray(-1.0 / expected), "scale"),
        numpy_helper.from_array(np.asarray(2.0), "two"),
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
    ]
    nodes += [
        helper.make_node("Mul", ["sum", "scale"], ["exponent"]),
        helper.make_node("Pow", ["two", "exponent"], ["power"]),
        helper.make_node("Squeeze", ["power", "axis"], ["flat"]),
        helper.make_node("Cast", ["flat"], [ESTIMATOR_SCORE], to=TensorProto.FLOAT),
    ]
    return estimator_model(nodes, constants, estimator.n_features_in_, None)


def _tree_of(tree: Any, value: Float64s) -> Tree:
    return Tree(
        tree.feature.astype(np.int64),
        tree.threshold.astype(np.float64),
        tree.children_left.astype(np.int64),
        tree.children_right.astype(np.int64),
        value,
    )


def _depths(left: Int64s, right: Int64s) -> Float64s:
    """Edges from the root, by node; a child has a higher number than its parent."""
    depth = np.zeros(len(left))
    for node in np.flatnonzero(left >= 0):
        depth[left[node]] = depth[right[node]] = depth[node] + 1
    return depth


def _exact_sum(trees: Sequence[Tree], targets: int, output: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes that give the sums over all trees as `float64[batch, targets]`, exact but for about 1e-16."""
    leaves = [tree.left < 0 for tree in trees]
    most = math.fsum(float(np.abs(tree.value[leaf]).max(initial=0.0)) for tree, leaf in zip(trees, leaves, strict=True))
    rest = [tree.value for tree in trees]
    parts: list[list[Float64s]] = []
    for _ in range(PARTS - 1):
        unit = 2.0 ** (math.ceil(math.log2(most)) - _MANTISSA_BITS) if most > 0 else 1.0
        coarse = [np.round(value / unit) * unit for value in rest]
        rest = [value - part for value, part in zip(rest, coarse, strict=True)]
        parts.append(coarse)
        most = len(trees) * unit / 2
    parts.append(rest)
    cut = [
        tree._replace(value=np.concatenate([part[number] for part in parts], axis=1))
        for number, tree in enumerate(trees)
    ]
    nodes = [
        _ensemble(cut, PARTS * targets, ESTIMATOR_INPUT, "parts"),
        helper.make_node("Cast", ["parts"], ["parts64"], to=TensorProto.DOUBLE),
        helper.make_node("Reshape", ["parts64", "by_part"], ["parts_apart"]),
        helper.make_node("ReduceSum", ["parts_apart", "part_axis"], [output], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(np.array([-1, PARTS, targets], np.int64), "by_part"),
        numpy_helper.from_array(np.array([1], np.int64), "part_axis"),
    ]
    return nodes, constants


def _ensemble(trees: Sequence[Tree], targets: int, source: str, output: str) -> onnx.NodeProto:
    """One TreeEnsembleRegressor in float64 over all trees."""
    sizes = [len(tree.left) for tree in trees]
    owner = np.repeat(np.arange(len(trees)), sizes)
    number = np.concatenate([np.arange(size) for size in sizes])
    left, right, feature, threshold = (
        np.concatenate([getattr(tree, part) for tree in trees]) for part in ("left", "right", "feature", "threshold")
    )
    leaf = left < 0
    value = np.concatenate([tree.value for tree in trees])
    # Zeros add nothing, but a leaf without any value is not one.
    kept = leaf[:, np.newaxis] & (value != 0)
    kept[leaf & ~kept.any(axis=1), 0] = True
    node, target = np.nonzero(kept)
    return helper.make_node(
        "TreeEnsembleRegressor",
        [source],
        [output],
        domain="ai.onnx.ml",
        n_targets=targets,
        aggregate_function="SUM",
        post_transform="NONE",
        nodes_treeids=owner.tolist(),
        nodes_nodeids=number.tolist(),
        nodes_featureids=np.where(leaf, 0, feature).tolist(),
        nodes_modes=["LEAF" if ends else "BRANCH_LEQ" for ends in leaf.tolist()],
        nodes_values_as_tensor=numpy_helper.from_array(np.where(leaf, 0.0, threshold), "thresholds"),
        nodes_truenodeids=np.where(leaf, 0, left).tolist(),
        nodes_falsenodeids=np.where(leaf, 0, right).tolist(),
        target_treeids=owner[node].tolist(),
        target_nodeids=number[node].tolist(),
        target_ids=target.tolist(),
        target_weights_as_tensor=numpy_helper.from_array(value[node, target], "leaves"),
    )


def estimator_model(
    nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto], features: int, classes: int | None
) -> onnx.ModelProto:
    """A model from `x: float64[batch, features]` to `score: float32[batch, classes]`, or `[batch]` without classes."""
    shape: list[str | int] = ["batch"] if classes is None else ["batch", classes]
    graph = helper.make_graph(
        list(nodes),
        "estimator",
        [helper.make_tensor_value_info(ESTIMATOR_INPUT, TensorProto.DOUBLE, ["batch", features])],
        [helper.make_tensor_value_info(ESTIMATOR_SCORE, TensorProto.FLOAT, shape)],
        list(constants),
    )
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid("ai.onnx.ml", ONNX_ML_OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ONNX_IR, producer_name="headwater")

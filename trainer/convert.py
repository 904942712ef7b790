"""A fitted estimator as ONNX: trees by our own conversion, the rest by skl2onnx and onnxmltools.

Every converted estimator has the same rim: `x: float64[batch, F]` in, `score: float32` out. Within, it computes in
float64 where the converter can, as the estimator was fitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from contract.models import ONNX_ML_OPSET, ONNX_OPSET
from trainer.errors import TrainingError
from trainer.forest import ESTIMATOR_INPUT, ESTIMATOR_SCORE, convert_forest, estimator_model

_TREES: Final = frozenset(
    {
        "DecisionTreeClassifier",
        "ExtraTreesClassifier",
        "GradientBoostingClassifier",
        "HistGradientBoostingClassifier",
        "IsolationForest",
        "LGBMClassifier",
        "RandomForestClassifier",
        "XGBClassifier",
    }
)
_OURS: Final = frozenset(
    {
        "ExtraTreesClassifier",
        "HistGradientBoostingClassifier",
        "IsolationForest",
        "RandomForestClassifier",
        "RobustZScore",
        "OneClassSVM",
    }
)
_BOOSTERS: Final = frozenset({"LGBMClassifier", "XGBClassifier"})
_TARGETS: Final = {"": ONNX_OPSET, "ai.onnx.ml": ONNX_ML_OPSET}
_BOOSTER_OPSET: Final = 15
"""The highest that onnxmltools knows. The few operators it writes mean the same in ours."""


def is_tree(estimator: Any) -> bool:
    """Whether it compares features with thresholds."""
    return type(estimator).__name__ in _TREES


def is_supported(estimator: Any) -> bool:
    """Whether there is a conversion for estimators of its class; it need not be fitted."""
    if type(estimator).__name__ in _OURS | _BOOSTERS:
        return True
    from skl2onnx import supported_converters
    from skl2onnx._supported_operators import sklearn_operator_name_map

    return sklearn_operator_name_map.get(type(estimator)) in supported_converters()


def convert(estimator: Any, features: int) -> onnx.ModelProto:
    """A fitted estimator as ONNX.

    Args:
        estimator: one that `families.build` makes, fitted.
        features: columns of its input.

    Returns:
        A model from `x: float64[batch, features]` to `score: float32[batch, K]`, or `[batch]` for anomalies.

    Raises:
        TrainingError: the converter refuses it.
    """
    from trainer.detectors import convert_detector

    found = convert_forest(estimator) or convert_detector(estimator)
    if found is not None:
        return found
    kind = type(estimator).__name__
    try:
        return _convert_booster(estimator, features) if kind in _BOOSTERS else _convert_other(estimator, features)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{kind} cannot be written as ONNX ({str(error)[:300]}); leave its family out of [families]"
        ) from error


def _convert_other(estimator: Any, features: int) -> onnx.ModelProto:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import DoubleTensorType

    last = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    model = to_onnx(
        estimator,
        initial_types=[(ESTIMATOR_INPUT, DoubleTensorType([None, features]))],
        target_opset=_TARGETS,
        options={id(last): {"zipmap": False}},
    )
    return _with_rim(model, features, len(last.classes_))


def _convert_booster(estimator: Any, features: int) -> onnx.ModelProto:
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    kinds = [(ESTIMATOR_INPUT, FloatTensorType([None, features]))]
    if type(estimator).__name__ == "LGBMClassifier":
        model = onnxmltools.convert_lightgbm(estimator, initial_types=kinds, target_opset=_BOOSTER_OPSET, zipmap=False)
    else:
        model = onnxmltools.convert_xgboost(estimator, initial_types=kinds, target_opset=_BOOSTER_OPSET)
    return _with_rim(model, features, len(estimator.classes_))


def _with_rim(model: onnx.ModelProto, features: int, classes: int) -> onnx.ModelProto:
    """The operators that lead to the probabilities, between the input and output that all estimators have.

    What leads only to the label is left behind: the merged graph makes its own from the score.
    """
    graph = model.graph
    if list(graph.initializer) and any(tensor.name == ESTIMATOR_SCORE for tensor in graph.initializer):
        raise ValueError(f"a constant is already called {ESTIMATOR_SCORE}")
    source = graph.input[0]
    nodes = needed_nodes(graph.node, [graph.output[1].name])
    if source.type.tensor_type.elem_type == TensorProto.FLOAT:
        for node in nodes:
            node.input[:] = ["x_float" if name == source.name else name for name in node.input]
        nodes.insert(0, helper.make_node("Cast", [source.name], ["x_float"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("Cast", [graph.output[1].name], [ESTIMATOR_SCORE], to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    return estimator_model(nodes, constants, features, classes)


def needed_nodes(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes from which some outputs are made, in their order."""
    wanted = set(outputs)
    found = []
    for node in reversed(list(nodes)):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]

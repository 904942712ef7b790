"""Small ONNX models as the trainer would export them: made by hand, with a known answer."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from contract.models import ONNX_IR, ONNX_OPSET

FLOAT, INT64, DOUBLE, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE, TensorProto.BOOL


def classifier(rows: int = 4, fields: int = 2, offset: int = 0) -> bytes:
    """Features: mean of each field, in float64, cast. score = softmax(features), label = argmax + offset; nan_count
    counts."""
    nodes = [
        *_features(fields, rows),
        helper.make_node("Softmax", ["features"], ["score"], axis=1),
        helper.make_node("ArgMax", ["features"], ["best"], axis=1, keepdims=0),
        helper.make_node("Add", ["best", "offset"], ["label"]),
        *_nan_count(),
    ]
    outputs = [
        helper.make_tensor_value_info("score", FLOAT, ["batch", fields]),
        helper.make_tensor_value_info("label", INT64, ["batch"]),
        helper.make_tensor_value_info("nan_count", INT64, ["batch"]),
        helper.make_tensor_value_info("features", FLOAT, ["batch", fields]),
    ]
    return _model(nodes, outputs, rows, fields, [numpy_helper.from_array(np.array(offset, np.int64), "offset")])


def hanging(rows: int = 4, fields: int = 2, trips: int = 2**62) -> bytes:
    """Passes the checker, loads, and loops for centuries before it gives the sum of the window as score."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_out"]),
            helper.make_node("Add", ["sum", "step"], ["sum_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", INT64, []),
            helper.make_tensor_value_info("go", BOOL, []),
            helper.make_tensor_value_info("sum", FLOAT, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("go_out", BOOL, []),
            helper.make_tensor_value_info("sum_out", FLOAT, ["batch"]),
        ],
        [numpy_helper.from_array(np.array(1e-9, np.float32), "step")],
    )
    nodes = [
        helper.make_node("ReduceSum", ["window", "both"], ["total"], keepdims=0),
        helper.make_node("Loop", ["trips", "yes", "total"], ["score"], body=body),
        *_nan_count(),
    ]
    outputs = [
        helper.make_tensor_value_info("score", FLOAT, ["batch"]),
        helper.make_tensor_value_info("nan_count", INT64, ["batch"]),
    ]
    more = [
        numpy_helper.from_array(np.array(trips, np.int64), "trips"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    return _model(nodes, outputs, rows, fields, more)


def _features(fields: int, rows: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Transpose", ["window"], ["channels"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["channels", "flat"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["wide"], to=DOUBLE),
        helper.make_node("ReduceMean", ["wide", "last"], ["means"], keepdims=0),
        helper.make_node("Reshape", ["means", "wide_back"], ["by_window"]),
        helper.make_node("Cast", ["by_window"], ["features"], to=FLOAT),
    ]


def _nan_count() -> list[onnx.NodeProto]:
    return [
        helper.make_node("IsNaN", ["window"], ["missing"]),
        helper.make_node("Cast", ["missing"], ["ones"], to=INT64),
        helper.make_node("ReduceSum", ["ones", "both"], ["nan_count"], keepdims=0),
    ]


def _model(nodes, outputs, rows: int, fields: int, more=()) -> bytes:
    initializers = {
        "flat": np.array([-1, rows]),
        "last": np.array([1]),
        "wide_back": np.array([-1, fields]),
        "both": np.array([1, 2]),
    }
    used = {name for node in nodes for name in node.input}
    constants = [
        numpy_helper.from_array(values.astype(np.int64), name) for name, values in initializers.items() if name in used
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("window", FLOAT, ["batch", rows, fields])],
        outputs,
        [*constants, *more],
    )
    model = helper.make_model(graph, ir_version=ONNX_IR, opset_imports=[helper.make_opsetid("", ONNX_OPSET)])
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()

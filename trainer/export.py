"""Export: one ONNX file of feature graph and estimator, proved, with what devices need to try and to watch it.

`model.onnx`      `window: float32[batch, W, C]` to `score, label, nan_count, features` (see `contract.models`)
`probe.arrow`     64 judged windows with the answers that are expected, an Arrow IPC file: `window:
                  fixed_size_list<float32>[W * C]` row by row, `score: list<float32>`, `label: int64`,
                  `nan_count: int64`, `features: list<float32>`
`reference.json`  distributions in training (see `lake.monitoring.reference`). The score of a classification is that of
                  the chosen class
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from contract.models import (
    INPUT,
    MODEL_BYTES_MAX,
    ONNX_IR,
    ONNX_ML_OPSET,
    ONNX_OPSET,
    OUTPUT_FEATURES,
    OUTPUT_LABEL,
    OUTPUT_NAN_COUNT,
    OUTPUT_SCORE,
)
from lake.monitoring.reference import Reference, encode_reference, make_reference
from trainer.candidates import Trained
from trainer.convert import convert
from trainer.errors import TrainingError
from trainer.families import FAMILIES, labels_of
from trainer.forest import ESTIMATOR_INPUT, ESTIMATOR_SCORE
from trainer.graph import FeatureSpec, build_graph
from trainer.material import Material, load_material
from trainer.parity import WINDOWS_MAX, Expected, Parity, evenly, probe_tolerance, prove
from trainer.runtime import Answers
from trainer.search import load_result
from trainer.steps import Outputs, StepContext
from trainer.windowset import WindowSet

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

ONNX_FILE = "model.onnx"
PROBE_FILE = "probe.arrow"
REFERENCE_FILE = "reference.json"
PROBE_WINDOWS = 64
REFERENCE_ROWS_MAX = 200_000


def merge(spec: FeatureSpec, selected: tuple[str, ...], trained: Trained, name: str) -> onnx.ModelProto:
    """Feature graph and estimator as one model.

    Args:
        spec: of the feature graph.
        selected: names of the features that the estimator was trained with, in their order.
        trained: the estimator, and the threshold of a detector.
        name: of the model.

    Returns:
        A model that passes `onnx.checker`, with opsets and IR of `contract.models`.

    Raises:
        TrainingError: the estimator has no conversion, or the model is too large.
    """
    features = build_graph(spec, selected)
    estimator = convert(trained.estimator, len(selected)).graph
    nodes = list(features.graph.node)
    constants = list(features.graph.initializer)
    # The estimator's names get a prefix, for both halves count theirs from nought; at the rim they meet.
    rim = {ESTIMATOR_INPUT: "features64", ESTIMATOR_SCORE: OUTPUT_SCORE}
    nodes.append(helper.make_node("Cast", [OUTPUT_FEATURES], ["features64"], to=TensorProto.DOUBLE))
    for node in estimator.node:
        moved = onnx.NodeProto()
        moved.CopyFrom(node)
        moved.name = f"estimator_{node.name or node.output[0]}"
        for names in (moved.input, moved.output):
            names[:] = [rim.get(value, f"estimator_{value}" if value else "") for value in names]
        nodes.append(moved)
    for tensor in estimator.initializer:
        kept = onnx.TensorProto()
        kept.CopyFrom(tensor)
        kept.name = f"estimator_{tensor.name}"
        constants.append(kept)
    if trained.threshold is None:
        nodes.append(helper.make_node("ArgMax", [OUTPUT_SCORE], [OUTPUT_LABEL], axis=1, keepdims=0))
    else:
        constants.append(numpy_helper.from_array(np.asarray(trained.threshold, np.float32), "threshold"))
        nodes.append(helper.make_node("Greater", [OUTPUT_SCORE, "threshold"], ["above"]))
        nodes.append(helper.make_node("Cast", ["above"], [OUTPUT_LABEL], to=TensorProto.INT64))
    score = next(iter(estimator.output)).type.tensor_type.shape
    shape: list[str | int] = ["batch", *(dimension.dim_value for dimension in score.dim[1:])]
    by_name = {output.name: output for output in features.graph.output}
    outputs = [
        helper.make_tensor_value_info(OUTPUT_SCORE, TensorProto.FLOAT, shape),
        helper.make_tensor_value_info(OUTPUT_LABEL, TensorProto.INT64, ["batch"]),
        by_name[OUTPUT_NAN_COUNT],
        by_name[OUTPUT_FEATURES],
    ]
    graph = helper.make_graph(nodes, name, list(features.graph.input), outputs, constants)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid("ai.onnx.ml", ONNX_ML_OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ONNX_IR, producer_name="headwater")
    model.model_version = 1
    model.doc_string = f"{name}: {trained.family} over {len(selected)} features"
    check_model(model)
    return model


def check_model(model: onnx.ModelProto) -> None:
    """Whether a model is what devices expect.

    Raises:
        TrainingError: naming what it is not.
    """
    try:
        size = model.ByteSize()
        if size > MODEL_BYTES_MAX:
            raise TrainingError(
                f"the model has {size} bytes, more than {MODEL_BYTES_MAX}; narrow n_estimators or max_depth, or raise "
                "min_samples_leaf, in [families]"
            )
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise TrainingError(
            f"the exported graph is not valid ONNX ({str(error)[:300]}); a fault of the export"
        ) from error
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    wanted = {"": ONNX_OPSET, "ai.onnx.ml": ONNX_ML_OPSET}
    if opsets != wanted or len(model.opset_import) != len(wanted) or model.ir_version != ONNX_IR:
        raise TrainingError(
            f"the exported graph has opsets {opsets} and IR {model.ir_version}, not {wanted} and {ONNX_IR}"
        )
    names = [value.name for value in model.graph.output]
    if [value.name for value in model.graph.input] != [INPUT] or names != [
        OUTPUT_SCORE,
        OUTPUT_LABEL,
        OUTPUT_NAN_COUNT,
        OUTPUT_FEATURES,
    ]:
        raise TrainingError(f"the exported graph has the outputs {names}: a fault of the export")


def expected_answers(material: Material, trained: Trained, windows: Float32s, rows: Int64s) -> Expected:
    """What training says of some windows of the dataset."""
    scores = trained.scores(material.features[rows])
    features = np.ascontiguousarray(material.features[np.ix_(rows, trained.columns)])
    return Expected(np.ascontiguousarray(windows[rows]), features, scores, labels_of(scores, trained.threshold))


def write_probe(path: Path, expected: Expected) -> None:
    """Write windows with their expected answers.

    Raises:
        OSError: the disk refused.
    """
    count, rows, channels = expected.windows.shape
    cells = pa.array(expected.windows.reshape(-1), pa.float32())
    scores = expected.score.reshape(count, -1)
    missing = np.count_nonzero(~np.isfinite(expected.windows), axis=(1, 2))
    table = pa.table(
        {
            "window": pa.FixedSizeListArray.from_arrays(cells, rows * channels),
            "score": pa.array(scores.tolist(), pa.list_(pa.float32())),
            "label": pa.array(expected.label, pa.int64()),
            "nan_count": pa.array(missing.astype(np.int64), pa.int64()),
            "features": pa.array(expected.features.tolist(), pa.list_(pa.float32())),
        }
    ).replace_schema_metadata({"headwater.window": json.dumps({"rows": rows, "fields": channels})})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def reference_of(dataset: WindowSet, material: Material, trained: Trained, rows: Int64s) -> Reference:
    """Distributions of features and scores over training windows, what devices are measured against later."""
    rows = rows[evenly(len(rows), REFERENCE_ROWS_MAX)]
    scores = trained.scores(material.features[rows])
    labels = labels_of(scores, trained.threshold)
    lacking = sum(int((~np.isfinite(piece).all(axis=(1, 2))).sum()) for piece in dataset.pieces(rows))
    return make_reference(
        material.features[np.ix_(rows, trained.columns)],
        scores if scores.ndim == 1 else scores[np.arange(len(scores)), labels],
        # An anomaly is what drift looks like: its windows must not be compared with each other only.
        np.array(material.classes)[labels] if material.classes else None,
        names=[material.names[column] for column in trained.columns],
        groups=dataset.devices[rows],
        nan_windows=lacking / len(rows),
    )


def step(context: StepContext) -> Outputs:
    """Export the chosen model and prove it: `model.onnx`, `probe.arrow`, `reference.json`."""
    recipe, dataset, split = context.recipe, context.windows(), context.split()
    result, trained = load_result(context)
    material = load_material(dataset, recipe, context.folder("search"))
    names = tuple(material.names[column] for column in trained.columns)
    model = merge(material.spec, names, trained, recipe.name)
    content = model.SerializeToString(deterministic=True)
    path = context.into / ONNX_FILE
    path.write_bytes(content)
    rows = split.test[evenly(len(split.test), WINDOWS_MAX)]
    tolerance = FAMILIES[trained.family].tolerance
    with context.progress.track("parity", len(rows)) as done:
        proof = prove(path, expected_answers(material, trained, dataset.windows, rows), tolerance)
        done(len(rows))
    probes = rows[evenly(len(rows), PROBE_WINDOWS)]
    write_probe(context.into / PROBE_FILE, expected_answers(material, trained, dataset.windows, probes))
    reference = reference_of(dataset, material, trained, split.train)
    (context.into / REFERENCE_FILE).write_bytes(encode_reference(reference))
    return {
        "task": recipe.task,
        "family": trained.family,
        "params": result.best.candidate.params,
        "stream": recipe.data.stream,
        "fields": list(dataset.fields),
        "dtypes": list(dataset.meta.dtypes),
        "window": {"rows": recipe.window.rows, "stride": recipe.window.stride, "gap_s": recipe.window.gap_s},
        "sample_rate_hz": dataset.meta.sample_rate_hz,
        "classes": list(material.classes),
        "threshold": trained.threshold,
        "features": list(names),
        "opset": ONNX_OPSET,
        "ir": ONNX_IR,
        "model": {"file": ONNX_FILE, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)},
        "probe": {"file": PROBE_FILE, "windows": len(probes), "score_tolerance": probe_tolerance(tolerance)},
        "reference": {"file": REFERENCE_FILE},
        "parity": proof._asdict(),
    }


__all__ = ["Answers", "Parity", "merge", "prove", "step"]

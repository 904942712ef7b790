"""A model scored for gateway and batch: what it must be, what it gives, and that it ends.

Mutants tried, each made a test fail: no look at the hash; no timer; no check of shapes; labels not checked.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from lake.scoring import ModelError, ModelTimeoutError, Scorer
from tests.unit import onnx_models
from tests.unit.inference_parts import manifest

WINDOWS = np.random.default_rng(7).normal(size=(33, 4, 2)).astype(np.float32)


def scorer(data=None, **members) -> Scorer:
    data = onnx_models.classifier() if data is None else data
    return Scorer(data, manifest(onnx=data, **members))


def hanging() -> Scorer:
    return scorer(onnx_models.hanging(), classes=(), features=())


def test_scores_are_those_of_the_graph():
    found = scorer().score(WINDOWS, 10)
    means = WINDOWS.astype(np.float64).mean(axis=1).astype(np.float32)
    assert np.array_equal(found.features, means)
    assert np.array_equal(found.label, means.argmax(axis=1))
    assert np.array_equal(found.chosen, found.score.max(axis=1))
    assert found.nan_count.tolist() == [0] * 33


def test_features_of_a_window_do_not_depend_on_its_batch():
    model = scorer()
    whole = model.score(WINDOWS, 10)
    for number in range(len(WINDOWS)):
        alone = model.score(WINDOWS[number : number + 1], 10)
        assert np.array_equal(alone.features[0].view(np.uint32), whole.features[number].view(np.uint32))


def test_missing_values_are_counted():
    windows = WINDOWS[:2].copy()
    windows[1, :3, 0] = np.nan
    assert scorer().score(windows, 10).nan_count.tolist() == [0, 3]


def test_a_model_that_hangs_is_ended_and_answers_nobody_else_late():
    model = hanging()
    began_s = time.monotonic()
    with pytest.raises(ModelTimeoutError, match=r"within 0\.3 s"):
        model.score(WINDOWS[:1], 0.3)
    assert time.monotonic() - began_s < 5
    with pytest.raises(ModelTimeoutError):
        model.score(WINDOWS[:1], 0.1)


def test_one_run_that_is_ended_does_not_end_another():
    model = hanging()
    ended = []

    def run(deadline_s):
        with pytest.raises(ModelTimeoutError):
            model.score(WINDOWS[:1], deadline_s)
        ended.append(deadline_s)

    threads = [threading.Thread(target=run, args=(deadline_s,)) for deadline_s in (1.5, 0.2)]
    for thread in threads:
        thread.start()
    threads[1].join(10)
    assert ended == [0.2]
    threads[0].join(10)
    assert ended == [0.2, 1.5]


def test_other_bytes_than_the_manifest_names_are_refused():
    data = onnx_models.classifier()
    with pytest.raises(ModelError, match="sha256"):
        Scorer(data + b" ", manifest(onnx=data))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"rows": 5}, r"\[batch, 5, 2\]"),
        ({"fields": ("x", "y", "z")}, r"\[batch, 4, 3\]"),
    ],
)
def test_a_model_that_eats_something_else_than_its_manifest_says_is_refused(members, said):
    with pytest.raises(ModelError, match=said):
        scorer(**members)


def test_bytes_that_are_no_model_are_refused():
    with pytest.raises(ModelError, match="cannot be loaded"):
        scorer(b"no model")


def test_a_classifier_without_labels_is_refused():
    with pytest.raises(ModelError, match="output label is missing"):
        scorer(onnx_models.hanging(), classes=("low", "high"))


@pytest.mark.parametrize(
    ("members", "said"), [({"features": ("a",)}, "output features"), ({"classes": ("a", "b", "c")}, "output score")]
)
def test_outputs_of_another_shape_than_promised_are_refused(members, said):
    with pytest.raises(ModelError, match=said):
        scorer(**members).score(WINDOWS, 10)


def test_a_label_without_a_class_is_refused():
    model = scorer(onnx_models.classifier(offset=1))
    with pytest.raises(ModelError, match="label is outside"):
        model.score(WINDOWS, 10)

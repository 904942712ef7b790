"""The Open Inference Protocol's JSON: any tensor there and back, any JSON answered or refused in words.

Mutants tried, each made a test fail: flatten without comparing lengths; no count of commas; `null` read as 0; floats
kept as float64; infinities let through.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.inference import (
    InferenceLimits,
    InferRequest,
    Tensor,
    Unanswered,
    decode_request,
    decode_response,
    encode,
    response_of,
    tensor_of,
    window_of,
)
from tests.unit.inference_parts import body, manifest

LIMITS = InferenceLimits(body_bytes_max=1 << 20, cells_max=4_096, batch_max=64)
MANIFEST = manifest()
VALUES = st.one_of(st.floats(width=32, allow_infinity=False), st.none())
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda shape: math.prod(shape) <= 512)


@st.composite
def tensors(draw):
    shape = draw(SHAPES)
    values = draw(st.lists(VALUES, min_size=math.prod(shape), max_size=math.prod(shape)))
    return shape, [None if value is None or math.isnan(value) else value for value in values]


def nested(values, shape):
    if len(shape) == 1:
        return values
    step = len(values) // shape[0]
    return [nested(values[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def bits(values) -> list[int]:
    """As float32; every NaN is the same."""
    found = np.asarray(values, np.float32)
    found[np.isnan(found)] = np.nan
    return found.view(np.uint32).tolist()


@given(tensors(), st.booleans(), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_tensor_arrives_to_the_bit_flat_or_nested(tensor, is_nested, indent):
    shape, values = tensor
    data = nested(values, shape) if is_nested else values
    request = json.dumps(
        {"inputs": [{"name": "t", "shape": shape, "datatype": "FP32", "data": data}], "id": "7"}, indent=indent or None
    )
    read = decode_request(request.encode(), LIMITS)
    assert read.id == "7"
    assert read.inputs[0].shape == tuple(shape)
    assert isinstance(read.inputs[0].values, array)
    assert bits(read.inputs[0].values) == bits([math.nan if value is None else value for value in values])


@given(tensors(), st.integers(0, 100), st.integers(-1, 3))
@settings(max_examples=150, deadline=None)
def test_data_that_contradicts_its_shape_is_refused(tensor, where, change):
    shape, values = tensor
    axis = where % len(shape)
    wrong = [length + (change or 2 if number == axis else 0) for number, length in enumerate(shape)]
    for data in (values, nested(values, shape)):
        with pytest.raises(Unanswered, match="shape"):
            decode_request(body(data, wrong), LIMITS)


@given(st.lists(VALUES, min_size=16, max_size=16), st.data())
@settings(max_examples=100, deadline=None)
def test_nested_data_with_as_many_values_but_another_form_is_refused(values, data):
    values = [None if value is None or math.isnan(value) else value for value in values]
    cut = data.draw(st.integers(1, 15).filter(lambda at: at != 8))
    with pytest.raises(Unanswered, match="shape"):
        decode_request(body([values[:cut], values[cut:]], [2, 8]), LIMITS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["window", "other"]) | JSON,
        "shape": st.just([1, 4, 2]) | st.lists(st.integers(-2, 2**41), max_size=9) | JSON,
        "datatype": st.sampled_from(["FP32", "FP64", "INT64", "BYTES", "X"]) | JSON,
        "data": st.just([0.5] * 8) | JSON,
        "parameters": JSON,
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.lists(TENSORS, max_size=3) | JSON,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(["score", "nothing"])}), max_size=3) | JSON,
        "id": st.text(max_size=300) | JSON,
        "parameters": JSON,
    },
)


@given(REQUESTS | JSON)
@settings(max_examples=400, deadline=None)
def test_any_json_is_a_request_or_refused_with_a_remedy(content):
    check(json.dumps(content).encode())


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused(content):
    check(content)


def check(content: bytes) -> None:
    try:
        request = decode_request(content, LIMITS)
        assert isinstance(request, InferRequest)
        window = window_of(request, MANIFEST, LIMITS)
        assert window.shape[1:] == (4, 2)
        assert len(window.values) == math.prod(window.shape)
    except Unanswered as refusal:
        assert refusal.status in (400, 413)
        assert "; " in str(refusal) or ", " in str(refusal)
        assert len(str(refusal)) < 1_200


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused(depth):
    deep = b"[" * depth + b"1" + b"]" * depth
    with pytest.raises(Unanswered):
        decode_request(
            b'{"inputs":[{"name":"window","shape":[1],"datatype":"FP32","data":' + deep + b"}]}",
            LIMITS,
        )


def test_a_long_list_behind_a_small_shape_is_refused_before_it_is_built():
    """A list of a million numbers takes 32 MB; the refusal must not."""
    content = b'{"inputs":[{"name":"w","shape":[2],"datatype":"FP32","data":[1' + b",1" * 250_000 + b"]}]}"
    tracemalloc.start()
    try:
        with pytest.raises(Unanswered, match="250001"):
            decode_request(content, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", ["1e39", "-1e39", "3.5e38"])
def test_a_number_that_float32_cannot_hold_is_refused(number):
    content = b'{"inputs":[{"name":"w","shape":[1],"datatype":"FP32","data":[' + number.encode() + b"]}]}"
    with pytest.raises(Unanswered, match="beyond"):
        decode_request(content, LIMITS)


@given(
    st.lists(st.floats(width=32), min_size=6, max_size=6),
    st.lists(st.sampled_from([0, 1]), min_size=3, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_every_answer_is_read_as_it_was_given_but_for_infinities(scores, labels):
    request = decode_request(body([0.0] * 24, [3, 4, 2], id="a"), LIMITS)
    given_scores = np.array(scores, np.float32).reshape(3, 2)
    outputs = [
        tensor_of("score", given_scores),
        tensor_of("label", np.array(labels, np.int64)),
        tensor_of("nan_count", np.array([0, 1, 2], np.int64)),
    ]
    read = decode_response(encode(response_of(MANIFEST, request, outputs)))
    assert (read.model_name, read.model_version, read.id) == ("shaker", "1", "a")
    found = {tensor.name: tensor for tensor in read.outputs}
    assert list(found) == ["score", "label", "label_name", "nan_count"]
    given_scores[np.isinf(given_scores)] = np.nan
    assert bits(found["score"].data) == bits(given_scores.ravel())
    assert found["score"].shape == (3, 2)
    assert found["label"] == Tensor(name="label", shape=(3,), datatype="INT64", data=labels)
    assert found["label_name"].data == [MANIFEST.classes[label] for label in labels]
    assert found["nan_count"].data == [0, 1, 2]

"""Prediction over HTTP by a real gateway: any approved release, in bounded time and memory, and nothing else.

Mutants tried, each made a test fail: drafts answer too; the newest release whatever its state; no deadline for a run;
no bound on requests; no eviction; the body read without a bound; a length that is
announced not looked at.
"""

from __future__ import annotations

import json
import socket
import threading
import time

import msgspec
import numpy as np
import pytest

from contract.inference import decode_response
from lake.store import Store, StoreSettings
from tests.integration.gateway_parts import GatewayProcess
from tests.integration.release_parts import release, retire
from tests.integration.servers import PATIENCE_S, wait_until
from tests.unit import onnx_models
from tests.unit.inference_parts import body, manifest

INFER = "/v2/models/shaker/infer"
WINDOWS = np.random.default_rng(5).normal(size=(9, 4, 2)).astype(np.float32)
TIMEOUT_S = 3.0


def content(windows=WINDOWS, **members) -> bytes:
    values = [None if np.isnan(value) else float(value) for value in windows.ravel()]
    return body(values, windows.shape, **members)


class Served:
    """A gateway over a lake with releases: shaker 1 and 2 approved, 3 a draft, 4 retired; hangs 1."""

    def __init__(self, gateway: GatewayProcess, store: Store) -> None:
        self.gateway, self.store = gateway, store

    def ask(self, method, path, data=None, **headers):
        status, answer, _ = self.gateway.request(method, path, data, **headers)
        return status, json.loads(answer)


@pytest.fixture(scope="module")
def served(mosquitto, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inference")
    store = Store(StoreSettings(url=f"file://{folder}/lake"))
    data = onnx_models.classifier()
    for seed in (1, 2, 3, 4):
        made = release(store, _with(manifest(), seed=seed), data, approved=seed != 3)
        assert made.version == seed
    retire(store, made)
    release(store, manifest("hangs", classes=(), features=()), onnx_models.hanging())
    settings = {"inference": {"timeout_s": TIMEOUT_S, "requests_max": 4, "workers": 2, "models_max": 2}}
    with GatewayProcess(folder, mosquitto.url, {"url": store.url}, **settings) as gateway:
        found = Served(gateway, store)
        # The first model costs the import of onnxruntime, which is no part of what is asked here.
        wait_until(lambda: found.ask("GET", "/v2/models/shaker/ready")[0] == 200, PATIENCE_S, "a model is loaded")
        yield found


def _with(found, **members):
    return msgspec.structs.replace(found, **members)


def test_windows_are_scored_by_the_newest_approved_release_to_the_bit(served):
    windows = WINDOWS.copy()
    windows[3, 1, 0] = np.nan
    status, found = served.ask("POST", INFER, content(windows, id="q-1"))
    assert status == 200, found
    answer = decode_response(json.dumps(found).encode())
    assert (answer.model_name, answer.model_version, answer.id) == ("shaker", "2", "q-1")
    outputs = {tensor.name: tensor for tensor in answer.outputs}
    means = windows.astype(np.float64).mean(axis=1).astype(np.float32)
    features = np.array(outputs["features"].data, np.float32).reshape(outputs["features"].shape)
    assert np.array_equal(features[:3].view(np.uint32), means[:3].view(np.uint32))
    assert np.isnan(features[3, 0])
    assert outputs["nan_count"].data == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    names = ["low", "high"]
    assert outputs["label_name"].data == [names[label] for label in outputs["label"].data]
    assert outputs["score"].shape == (9, 2)


def test_an_older_release_is_asked_by_its_version(served):
    status, found = served.ask(
        "POST", "/v2/models/shaker/versions/1/infer", content(WINDOWS[:1], outputs=[{"name": "label"}])
    )
    assert (status, found["model_version"]) == (200, "1")
    assert [output["name"] for output in found["outputs"]] == ["label"]


def test_health_and_metadata(served):
    assert served.ask("GET", "/v2/health/live") == (200, {"live": True})
    assert served.ask("GET", "/v2/health/ready") == (200, {"ready": True})
    assert served.ask("GET", "/v2")[1]["extensions"] == []
    assert served.ask("GET", "/v2/models/shaker/ready") == (200, {"name": "shaker", "ready": True})
    status, found = served.ask("GET", "/v2/models/shaker")
    assert (status, found["versions"], found["platform"]) == (200, ["1", "2"], "onnx")
    assert found["inputs"] == [
        {"name": "window", "datatype": "FP32", "shape": [-1, 4, 2], "parameters": {"fields": ["x", "y"]}}
    ]
    labels = next(output for output in found["outputs"] if output["name"] == "label")
    assert labels["parameters"] == {"classes": ["low", "high"]}


@pytest.mark.parametrize(
    ("method", "path", "data", "status", "said"),
    [
        ("GET", "/v2/models/other", None, 404, "release list"),
        ("GET", "/v2/models/..%2f..%2fcontrol", None, 404, "release list"),
        ("POST", "/v2/models/shaker/versions/3/infer", content(), 404, "not approved; choose of 2, 1"),
        ("POST", "/v2/models/shaker/versions/4/infer", content(), 404, "not approved"),
        ("POST", "/v2/models/shaker/versions/01/infer", content(), 404, "not approved"),
        ("POST", INFER, b"[]", 400, "not an inference request"),
        ("POST", INFER, content(WINDOWS[:, :3]), 400, "[batch, 4, 2]"),
        ("POST", INFER, content(datatype="FP64"), 400, "send FP32"),
        ("POST", INFER, content(name="input"), 400, "'window'"),
        ("POST", INFER, b"[" * (16 * 1024 * 1024 + 1), 413, "16777216 bytes"),
        ("GET", "/v2/nothing", None, 404, "docs"),
        ("DELETE", "/v2", None, 405, "docs"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_remedy(served, method, path, data, status, said):
    found, refusal = served.ask(method, path, data)
    assert (found, list(refusal)) == (status, ["error"]), refusal
    assert said in refusal["error"]


@pytest.mark.parametrize(
    ("header", "sent"),
    [(b"Content-Length: 99999999999", b""), (b"Transfer-Encoding: chunked", b"1100000\r\n" + b" " * 17_000_000)],
)
def test_a_body_too_large_is_refused_before_its_end(served, header, sent):
    """Neither has an end: whoever read it whole would not answer."""
    with socket.create_connection(("127.0.0.1", served.gateway.port), timeout=5) as connection:
        connection.sendall(
            b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n\r\n" + sent
        )
        assert b" 413 " in connection.recv(4_096).split(b"\r\n")[0]


def test_a_model_that_hangs_is_ended_and_the_gateway_goes_on(served):
    for _ in range(2):
        began_s = time.monotonic()
        status, refusal = served.ask("POST", "/v2/models/hangs/infer", content(WINDOWS[:1]))
        assert (status, "within" in refusal["error"]) == (504, True), refusal
        assert time.monotonic() - began_s < TIMEOUT_S + 3
    assert served.ask("POST", INFER, content())[0] == 200
    wait_until(lambda: served.gateway.metric("inference_threads") == 0, PATIENCE_S, "no thread is left")
    assert served.gateway.get("/healthz")[0] == 200


def test_more_requests_than_may_wait_are_told_to_come_back_and_others_are_not_held_up(served):
    found = []

    def hang():
        found.append(served.ask("POST", "/v2/models/hangs/infer", content(WINDOWS[:1]))[0])

    askers = [threading.Thread(target=hang) for _ in range(4)]
    for asker in askers:
        asker.start()
    wait_until(lambda: served.gateway.metric("inference_requests_running") == 4, PATIENCE_S, "all of them wait")
    began_s = time.monotonic()
    status, refusal = served.ask("POST", INFER, content())
    assert (status, "try again" in refusal["error"]) == (503, True)
    assert served.gateway.get("/healthz")[0] == 200
    assert time.monotonic() - began_s < TIMEOUT_S
    for asker in askers:
        asker.join(PATIENCE_S)
    assert found == [504] * 4
    assert served.ask("POST", INFER, content())[0] == 200


def test_many_at_once_each_get_their_own_answer(served):
    found: dict[int, list[float]] = {}

    def ask(number):
        window = WINDOWS[number : number + 1]
        while (answer := served.ask("POST", INFER, content(window, outputs=[{"name": "features"}])))[0] == 503:
            time.sleep(0.01)
        found[number] = answer[1]["outputs"][0]["data"]

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(len(WINDOWS))]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(PATIENCE_S)
    means = WINDOWS.astype(np.float64).mean(axis=1).astype(np.float32)
    assert {number: np.array(data, np.float32).tolist() for number, data in found.items()} == {
        number: means[number].tolist() for number in range(len(WINDOWS))
    }


def test_models_beyond_the_bound_are_given_up_and_loaded_again(served):
    paths = ["/v2/models/shaker/versions/1/infer", "/v2/models/shaker/versions/2/infer", "/v2/models/hangs/ready"]
    loads = served.gateway.metric("inference_loads_total")
    for path in (*paths, *paths):
        method = "GET" if path.endswith("ready") else "POST"
        assert served.ask(method, path, None if method == "GET" else content())[0] == 200
        assert served.gateway.metric("inference_models") <= 2
    assert served.gateway.metric("inference_models") == 2
    assert served.gateway.metric("inference_loads_total") - loads >= 4
    assert served.gateway.metric("inference_evictions_total") >= 2


def test_a_release_that_is_retired_answers_no_more(served):
    made = release(served.store, manifest("shortlived"), onnx_models.classifier())
    path = "/v2/models/shortlived/infer"
    wait_until(lambda: served.ask("POST", path, content())[0] == 200, PATIENCE_S, "the new release answers")
    retire(served.store, made)
    wait_until(lambda: served.ask("POST", path, content())[0] == 404, PATIENCE_S, "the retired release is gone")


def test_a_replaced_artifact_is_refused(served):
    made = release(served.store, manifest("replaced", rows=5), onnx_models.classifier(rows=5))
    served.store.put(f"models/artifacts/{made.artifact.sha256}", onnx_models.classifier())
    windows = np.zeros((1, 5, 2), np.float32)
    found = wait_until(
        lambda: (found := served.ask("POST", "/v2/models/replaced/infer", content(windows)))[0] == 500 and found,
        PATIENCE_S,
        "the release is known, and refused",
    )
    assert made.artifact.sha256 in found[1]["error"]

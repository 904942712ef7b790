"""The device's inference endpoint over real sockets: it answers, refuses in words, and never lets clients take it over.

Mutants tried, each made a test fail: any host may be listened on; no look at the Host header; no bound on connections;
no cut of slow connections; the length of a body not checked; a stale socket not removed; a live one removed.
"""

from __future__ import annotations

import http.client
import json
import socket
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from contract.errors import ConfigurationError
from contract.inference import InferenceLimits, Tensor, Unanswered, decode_response
from edge_agent.models import endpoint as module
from edge_agent.models.answers import answer
from edge_agent.models.endpoint import Endpoint, read_address
from tests.integration.servers import PATIENCE_S, wait_until
from tests.unit.inference_parts import body, manifest

LIMITS = InferenceLimits(body_bytes_max=8_192, cells_max=1_024, batch_max=16)
INFER = "/v2/models/shaker/infer"


class Models:
    """Means of the fields as score; waits where told to."""

    def __init__(self) -> None:
        self.active = [manifest(version=3)]
        self.gate = threading.Event()
        self.gate.set()
        self.refusal: Unanswered | None = None

    def models(self):
        return self.active

    def infer(self, model, version, windows, batch, timeout_s):
        assert (model, version) == ("shaker", 3)
        if self.refusal is not None:
            raise self.refusal
        assert self.gate.wait(PATIENCE_S)
        means = np.frombuffer(windows, np.float32).reshape(batch, 4, 2).mean(axis=1)
        return [
            Tensor(name="score", shape=(batch, 2), datatype="FP32", data=means.ravel().tolist()),
            Tensor(name="label", shape=(batch,), datatype="INT64", data=means.argmax(axis=1).tolist()),
        ]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self._path)


@pytest.fixture
def models():
    return Models()


@pytest.fixture(params=["unix", "tcp"])
def served(request, models, tmp_path):
    """Asks: (method, path, body, headers) → (status, JSON)."""
    listen = f"unix:{tmp_path}/models.sock" if request.param == "unix" else "127.0.0.1:0"
    endpoint = Endpoint(listen, models, LIMITS)
    endpoint.start()

    def connect():
        if request.param == "unix":
            return UnixConnection(f"{tmp_path}/models.sock")
        return http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=PATIENCE_S)

    def ask(method, path, content=None, **headers):
        connection = connect()
        try:
            connection.request(method, path, content, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    ask.endpoint, ask.connect = endpoint, connect
    yield ask
    models.gate.set()
    endpoint.close()


def test_windows_are_scored_and_the_label_is_said_in_words(served):
    values = np.arange(16, dtype=np.float32) / 3
    status, content = served("POST", INFER, body(values.astype(float).tolist(), [2, 4, 2], id="q"))
    assert status == 200
    answer = decode_response(json.dumps(content).encode())
    assert (answer.model_name, answer.model_version, answer.id) == ("shaker", "3", "q")
    found = {tensor.name: tensor for tensor in answer.outputs}
    assert found["score"].data == values.reshape(2, 4, 2).mean(axis=1).ravel().tolist()
    assert found["label_name"].data == ["high", "high"]


def test_a_target_that_is_no_path_is_the_clients_mistake(models):
    status, refusal = answer(models, "GET", "http://[/v2", b"")
    assert (status, b"is no path" in refusal) == (400, True)


def test_health_and_metadata(served, models):
    assert served("GET", "/v2") == (200, {"name": "headwater-agent", "version": "2", "extensions": []})
    assert served("GET", "/v2/health/live") == (200, {"live": True})
    assert served("GET", "/v2/health/ready") == (200, {"ready": True})
    assert served("GET", "/v2/models/shaker/ready") == (200, {"name": "shaker", "ready": True})
    status, metadata = served("GET", "/v2/models/shaker/versions/3")
    assert (status, metadata["versions"], metadata["inputs"][0]["shape"]) == (200, ["3"], [-1, 4, 2])
    assert [output["name"] for output in metadata["outputs"]] == [
        "score",
        "label",
        "label_name",
        "nan_count",
        "features",
    ]
    models.active = []
    assert served("GET", "/v2/health/ready") == (503, {"ready": False})
    assert served("GET", "/v2/models/shaker")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "said"),
    [
        ("GET", "/v2/models/other", None, 404, "choose of: shaker"),
        ("GET", "/v2/models/shaker/versions/2", None, 404, "ask 3"),
        ("GET", "/v2/models/shaker/versions/x/ready", None, 404, "ask 3"),
        ("GET", "/metrics", None, 404, "/metrics"),
        ("GET", INFER, None, 405, "send POST"),
        ("POST", "/v2", b"{}", 405, "send GET"),
        ("POST", INFER, b"{", 400, "not an inference request"),
        ("POST", INFER, body([0.0] * 6, [1, 3, 2]), 400, "[batch, 4, 2]"),
        ("POST", INFER, body([0.0] * 8, [1, 4, 2], name="x"), 400, "'window'"),
        ("POST", INFER, body([0.0] * 8, [1, 4, 2], datatype="FP64"), 400, "send FP32"),
        ("POST", INFER, body([0.0] * 8, [1, 4, 2], outputs=[{"name": "logits"}]), 400, "choose of score"),
        ("POST", INFER, body([0.0] * 8, [1, 4, 2], outputs=[{"name": "features"}]), 400, "gives no features"),
        ("POST", INFER, body([0] * 136, [17, 4, 2]), 413, "more than 16"),
        ("POST", INFER, body([0.5] * 2_000, [250, 4, 2]), 413, "8192 bytes"),
        ("POST", INFER, body([0] * 2_000, [250, 4, 2]), 413, "1024 values"),
        ("DELETE", "/v2", None, 501, "GET or POST"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_remedy(served, method, path, content, status, said):
    found, refusal = served(method, path, content)
    assert (found, list(refusal)) == (status, ["error"])
    assert said in refusal["error"]


def test_binary_tensors_and_bodies_without_length_are_refused(served):
    assert served("POST", INFER, b"{}", Inference_Header_Content_Length="2")[0] == 400
    status, refusal = served("POST", INFER, iter([b"{}"]), Transfer_Encoding="chunked")
    assert (status, "length" in refusal["error"]) == (411, True)


def test_a_body_far_too_large_is_answered_although_it_is_not_read_into_memory(served):
    status, refusal = served("POST", INFER, b"[" * 5_000_000)
    assert (status, "8192 bytes" in refusal["error"]) == (413, True)


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(served):
    connection = served.connect()
    connection.connect()
    connection.sock.sendall(
        b"POST /v2/models/shaker/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n"
    )
    connection.sock.settimeout(2)
    assert b"413" in connection.sock.recv(4_096).split(b"\r\n")[0]
    connection.close()


def test_a_worker_that_is_busy_is_told_at_once(served, models):
    models.refusal = Unanswered(503, "the worker of shaker is busy; try again in a moment")
    began_s = time.monotonic()
    assert served("POST", INFER, body([0.0] * 8, [1, 4, 2])) == (503, {"error": str(models.refusal)})
    assert time.monotonic() - began_s < 2


def test_connections_beyond_the_bound_are_told_503_and_the_others_are_answered(served, models):
    models.gate.clear()
    found = []

    def ask():
        found.append(served("POST", INFER, body([0.0] * 8, [1, 4, 2]))[0])

    askers = [threading.Thread(target=ask) for _ in range(module.CONNECTIONS_MAX)]
    for asker in askers:
        asker.start()
    wait_until(
        lambda: len(served.endpoint._server._ends_s) == module.CONNECTIONS_MAX, PATIENCE_S, "all of them are accepted"
    )
    status, refusal = served("GET", "/v2")
    assert (status, "try again" in refusal["error"]) == (503, True)
    assert served.endpoint.refused == 1
    models.gate.set()
    for asker in askers:
        asker.join(PATIENCE_S)
    assert found == [200] * module.CONNECTIONS_MAX


def test_a_client_that_trickles_is_cut_off(served, monkeypatch):
    """Bytes come often enough for every single wait, and the request never ends."""
    monkeypatch.setattr(module, "CONNECTION_S", 0.6)
    connection = served.connect()
    connection.connect()
    began_s = time.monotonic()
    with pytest.raises(OSError):
        connection.sock.sendall(b"POST /v2 HTTP/1.1\r\nHost: localhost\r\n")
        while time.monotonic() - began_s < PATIENCE_S:
            connection.sock.sendall(b"X: y\r\n")
            time.sleep(0.02)
    assert time.monotonic() - began_s < 5
    connection.close()
    monkeypatch.setattr(module, "CONNECTION_S", 30.0)
    assert served("GET", "/v2")[0] == 200


def test_a_fault_of_the_models_is_not_the_end_of_the_endpoint(served, models):
    models.infer = None
    with pytest.raises(OSError):
        served("POST", INFER, body([0.0] * 8, [1, 4, 2]))
    assert served("GET", "/v2")[0] == 200


def test_another_name_than_loopback_is_refused_on_tcp(models):
    endpoint = Endpoint("127.0.0.1:0", models)
    endpoint.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=PATIENCE_S)
        connection.request("GET", "/v2", headers={"Host": "evil.example"})
        response = connection.getresponse()
        assert (response.status, "evil.example" in response.read().decode()) == (403, True)
        connection.close()
    finally:
        endpoint.close()


@pytest.mark.parametrize(
    "listen",
    [
        "0.0.0.0:80",
        "192.168.1.4:80",
        "[::]:80",
        "example.org:80",
        "localhost",
        "8080",
        "",
        "unix:models.sock",
        *("unix:/" + "x" * 107, "127.0.0.1:80/x", "127.0.0.1:99999", "http://127.0.0.1:80"),
    ],
)
def test_addresses_that_others_could_reach_or_that_are_none_are_refused(listen):
    with pytest.raises(ConfigurationError, match="listen"):
        read_address(listen)


def test_a_socket_is_for_its_owner_and_group_and_is_gone_afterwards(models, tmp_path):
    path = tmp_path / "models.sock"
    endpoint = Endpoint(f"unix:{path}", models)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o660
    endpoint.start()
    endpoint.close()
    assert not path.exists()


def test_a_socket_that_a_killed_agent_left_is_replaced_and_a_live_one_is_not(models, tmp_path):
    path = tmp_path / "models.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(path))
    assert path.exists()
    endpoint = Endpoint(f"unix:{path}", models)
    endpoint.start()
    try:
        with pytest.raises(ConfigurationError, match="somebody listens"):
            Endpoint(f"unix:{path}", models)
        assert path.exists()
    finally:
        endpoint.close()


def test_a_file_in_the_place_of_the_socket_stays(models, tmp_path):
    path = Path(tmp_path / "models.sock")
    path.write_text("precious")
    with pytest.raises(ConfigurationError, match="no socket"):
        Endpoint(f"unix:{path}", models)
    assert path.read_text() == "precious"

"""A bucket without credentials is refused at once and in clear words; what a platform offers is let through.

Mutants tried, each made a test here fail: the role not asked for; the token left out; an empty answer taken for a role;
half a pair of variables taken for whole; the cause of obstore left as it is.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from contract.errors import ConfigurationError
from lake.credentials import METADATA_TIMEOUT_S, require_credentials
from lake.errors import StoreUnavailableError
from lake.store import Store, StoreSettings

URL = "s3://bucket/lake"
ROLES = "/latest/meta-data/iam/security-credentials/"
KEYS = {
    "AccessKeyId": "AROLE",
    "SecretAccessKey": "s",
    "Token": "t",
    "Expiration": "2099-01-01T00:00:00Z",
    "Code": "Success",
}


class Machine(http.server.ThreadingHTTPServer):
    """The metadata service of a machine, the credentials of a container, and a bucket.

    Attributes:
        role: of the machine; empty for none.
        has_tokens: whether it is version 2 of the service, which answers only to tokens.
        signed_with: the key ids of what was written into the bucket.
    """

    def __init__(self, role: str, *, has_tokens: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.role, self.has_tokens = role, has_tokens
        self.signed_with: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Machine

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/latest/api/token":
            self.answer("the-token" if self.server.has_tokens else "")
        else:
            self.server.signed_with.append(self.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
            self.answer(" ", ETag='"1"')

    def do_GET(self) -> None:
        known = not self.server.has_tokens or self.headers.get("X-aws-ec2-metadata-token") == "the-token"
        found = (
            {ROLES: self.server.role, f"{ROLES}{self.server.role}": json.dumps(KEYS)}
            if known and self.server.role
            else {}
        )
        self.answer((found | {"/container": json.dumps(KEYS)}).get(self.path, ""))

    def answer(self, text: str, **headers: str) -> None:
        self.send_response(200 if text else 404)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nobody listens."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("gateway-role") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigurationError) as error:
        require_credentials(StoreSettings.from_environment(URL, environ), environ)
    return str(error.value)


def accept(environ: dict[str, str]) -> None:
    require_credentials(StoreSettings.from_environment(URL, environ), environ)


def test_a_bucket_without_credentials_names_the_lake_and_what_to_set(machine: Machine) -> None:
    machine.role = ""
    said = refusal({"AWS_METADATA_ENDPOINT": machine.url})
    assert "no credentials are set" in said
    for word in (URL, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        assert word in said
    assert "\n" not in said


def test_a_metadata_service_that_does_not_answer_costs_a_second() -> None:
    with http.server.socketserver.TCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        began = time.monotonic()
        refusal({"AWS_METADATA_ENDPOINT": f"http://127.0.0.1:{silent.server_address[1]}"})
        assert time.monotonic() - began < METADATA_TIMEOUT_S + 3.0


def test_keys_are_enough_and_nobody_is_asked() -> None:
    accept({"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"})
    require_credentials(StoreSettings(url="file:///lake"), {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"})


@pytest.mark.parametrize("has_tokens", [True, False])
def test_the_role_of_a_machine_is_let_through(machine: Machine, has_tokens: bool) -> None:
    machine.has_tokens = has_tokens
    accept({"AWS_METADATA_ENDPOINT": machine.url})
    assert "no credentials" in refusal({"AWS_METADATA_ENDPOINT": machine.url, "AWS_EC2_METADATA_DISABLED": "true"})


@pytest.mark.parametrize(
    "names",
    [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"),
        ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
    ],
)
def test_what_a_platform_offers_is_let_through_when_it_is_whole(names: tuple[str, ...]) -> None:
    nobody = {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"}
    accept(nobody | dict.fromkeys(names, "x"))
    if len(names) > 1:
        refusal(nobody | {names[0]: "x"})


def test_half_of_a_pair_of_keys_is_refused_and_a_profile_gets_its_remedy() -> None:
    assert "half of the credentials" in refusal({"AWS_ACCESS_KEY_ID": "k"})
    said = refusal({"AWS_PROFILE": "plant", "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"})
    assert "AWS_PROFILE is not read" in said
    assert "export-credentials --profile 'plant'" in said


def test_the_store_signs_with_what_was_let_through(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """What `require_credentials` lets through is what obstore reads of the same environment."""
    token = tmp_path / "token"
    token.write_text("x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    settings = StoreSettings(url=URL, endpoint=machine.url, allow_http=True, timeout_s=5.0)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", machine.url)
    Store(settings).put("role", b"1")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{machine.url}/container")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
    Store(settings).put("container", b"1")
    assert machine.signed_with == ["AROLE", "AROLE"]


def test_a_role_that_is_gone_is_said_as_missing_credentials(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    machine.role = ""
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", machine.url)
    with pytest.raises(StoreUnavailableError, match=r"there are no credentials.*AWS_ACCESS_KEY_ID"):
        Store(StoreSettings(url=URL, endpoint=machine.url, allow_http=True, timeout_s=1.0)).put("x", b"1")

"""What the device answers to a request of Open Inference Protocol v2, and what it asks of its models for it. No
sockets (see `edge_agent.models.endpoint`)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from contract.inference import (
    InferenceLimits,
    ServerMetadata,
    Tensor,
    Unanswered,
    decode_request,
    encode,
    encode_error,
    metadata_of,
    response_of,
    window_of,
)
from contract.models import Manifest

DEVICE_LIMITS = InferenceLimits(body_bytes_max=4 * 1024 * 1024, cells_max=128 * 1024, batch_max=64)
"""A request of this size takes some 12 MB while it is read."""
INFER_S = 10.0
"""Longest wait for the model."""


class Served(Protocol):
    """The models of this device, as the endpoint asks for them. Called from several threads."""

    def models(self) -> Sequence[Manifest]:
        """Manifests of the models that answer now; at most one version of each."""

    def infer(self, model: str, version: int, windows: array[float], batch: int, timeout_s: float) -> Sequence[Tensor]:
        """Score windows on the model's worker.

        Args:
            model: one of `models()`, a moment ago.
            version: the same.
            windows: float32 (typecode `f`), batch * rows * fields values, row-major.
            batch: how many.
            timeout_s: longest time to wait, seconds.

        Returns:
            All outputs of the model (see `contract.inference.tensor_of`).

        Raises:
            Unanswered: 404 the version answers no more; 503 the worker has enough to do (at once, without waiting);
                504 it did not answer in time; 500 it failed.
        """


class Answer(NamedTuple):
    """Of one request."""

    status: int
    body: bytes


def answer(served: Served, method: str, target: str, body: bytes, limits: InferenceLimits = DEVICE_LIMITS) -> Answer:
    """Answer one request.

    Args:
        served: the models.
        method: GET or POST.
        target: path of the request.
        body: of a POST.
        limits: of the request.
    """
    try:
        return _answer(served, method, _parts(target), body, limits)
    except Unanswered as refusal:
        return Answer(refusal.status, encode_error(refusal))


def _parts(target: str) -> list[str]:
    try:
        path = urlsplit(target).path
    except ValueError as error:
        raise Unanswered(400, f"{target[:80]!r} is no path ({error}); ask for one such as /v2/models/NAME") from error
    return [unquote(part) for part in path.strip("/").split("/")]


def _answer(served: Served, method: str, parts: list[str], body: bytes, limits: InferenceLimits) -> Answer:
    match parts:
        case ["v2"]:
            content: Any = ServerMetadata(name="headwater-agent", version="2")
        case ["v2", "health", "live"]:
            content = {"live": True}
        case ["v2", "health", "ready"]:
            ready = bool(served.models())
            return Answer(200 if ready else 503, encode({"ready": ready}))
        case ["v2", "models", name, *rest]:
            version = rest[1] if rest[:1] == ["versions"] and len(rest) > 1 else None
            what = rest[2:] if version is not None else rest
            manifest = _find(served, name, version)
            if what == ["infer"]:
                _expect(method, "POST")
                return Answer(200, _infer(served, manifest, body, limits))
            if what == ["ready"]:
                content = {"name": name, "ready": True}
            elif not what:
                content = metadata_of(manifest, [manifest.version])
            else:
                raise _no_such_path(parts)
        case _:
            raise _no_such_path(parts)
    _expect(method, "GET")
    return Answer(200, encode(content))


def _infer(served: Served, manifest: Manifest, body: bytes, limits: InferenceLimits) -> bytes:
    request = decode_request(body, limits)
    window = window_of(request, manifest, limits)
    tensors = served.infer(manifest.model, manifest.version, window.values, window.shape[0], INFER_S)
    return encode(response_of(manifest, request, tensors))


def _find(served: Served, name: str, version: str | None) -> Manifest:
    found = {manifest.model: manifest for manifest in served.models()}
    manifest = found.get(name)
    if manifest is None:
        raise Unanswered(
            404, f"no model {name[:80]!r} answers here; choose of: {', '.join(sorted(found)) or 'none yet'}"
        )
    if version is not None and version != str(manifest.version):
        raise Unanswered(
            404,
            f"version {version[:20]!r} of {name} does not answer here; ask {manifest.version}, or name none",
        )
    return manifest


def _expect(method: str, wanted: str) -> None:
    if method != wanted:
        raise Unanswered(405, f"{method} is not for this path; send {wanted}")


def _no_such_path(parts: Sequence[str]) -> Unanswered:
    return Unanswered(404, f"there is no /{'/'.join(parts)[:120]}; see /v2 and /v2/models/NAME")

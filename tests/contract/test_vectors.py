"""The protocol's test vectors: what another implementation must reproduce, this one reproduces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract.batches import Envelope
from contract.codec import decode_body, encode_body, seal, unseal
from contract.errors import Rejected
from contract.limits import DEFAULT_LIMITS
from contract.names import is_name, shard_of
from contract.topics import parse_up, up
from tests.contract.make_vectors import VECTORS, plain, valid

PAYLOADS = sorted(VECTORS.glob("*.payload"), key=lambda path: path.name)
INVALID: dict[str, dict[str, str]] = json.loads((VECTORS / "invalid.json").read_text())
NAMES: dict[str, Any] = json.loads((VECTORS / "names.json").read_text())


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_a_valid_payload_decodes_to_its_envelope_and_values_to_the_bit(path: Path) -> None:
    described = json.loads(path.with_suffix(".json").read_text())
    envelope, body = unseal(path.read_bytes())
    assert envelope == msgspec.convert(described["envelope"], Envelope)
    batch = decode_body(body, envelope, DEFAULT_LIMITS)
    assert [[field.name, str(field.type)] for field in batch.schema] == described["fields"]
    assert {name: plain(batch.column(name)) for name in batch.schema.names} == described["columns"]


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_sealing_the_same_envelope_and_body_gives_the_same_bytes(path: Path) -> None:
    payload = path.read_bytes()
    assert seal(*unseal(payload)) == payload


def test_the_vectors_are_those_that_the_generator_describes() -> None:
    made = valid()
    assert {path.stem for path in PAYLOADS} == made.keys()
    for path in PAYLOADS:
        envelope, body = unseal(path.read_bytes())
        stored, written = (decode_body(b, envelope, DEFAULT_LIMITS) for b in (body, encode_body(made[path.stem][2])))
        assert {n: plain(stored.column(n)) for n in stored.schema.names} == {
            n: plain(written.column(n)) for n in written.schema.names
        }


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_payload_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(Rejected) as refusal:
        sealed = unseal(bytes.fromhex(INVALID[name]["payload"]))
        decode_body(sealed.body, sealed.envelope, DEFAULT_LIMITS)
    assert refusal.value.reason == INVALID[name]["reason"], str(refusal.value)


def test_every_language_computes_the_same_shards_names_and_topics() -> None:
    assert {device: shard_of(device) for device in NAMES["shards"]} == NAMES["shards"]
    assert {device: up(device, "vibration") for device in NAMES["topics"]} == NAMES["topics"]
    for device, topic in NAMES["topics"].items():
        assert parse_up(topic) == (shard_of(device), device, "vibration")
    assert all(is_name(name) for name in NAMES["good_names"])
    assert not any(is_name(name) for name in NAMES["bad_names"])

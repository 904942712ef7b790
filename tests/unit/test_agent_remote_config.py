from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from contract.messages import Desired, DesiredStream, Refusal
from edge_agent.remote_config import (
    Applied,
    Ignored,
    InForce,
    RemoteConfigFile,
    RemoteConfigUnavailableError,
    apply,
    in_force,
)
from edge_agent.sampling.settings import Interval, Stream
from edge_agent.settings import StreamSettings

STREAMS = {
    "vibration": StreamSettings(driver="host", sampling=Interval(rate_hz=10.0)),
    "audio": StreamSettings(driver="host", sampling=Stream()),
}


def document(revision: Any = 1, **streams: Any) -> bytes:
    return json.dumps({"v": 1, "revision": revision, "streams": streams}).encode()


def test_a_good_and_newer_document_is_applied_whole() -> None:
    verdict = apply(3, document(4, vibration={"rate_hz": 2, "max_batch_rows": 10, "enabled": False}), STREAMS)
    assert verdict == Applied(
        Desired(revision=4, streams={"vibration": DesiredStream(rate_hz=2.0, max_batch_rows=10, enabled=False)})
    )


@pytest.mark.parametrize("revision", [1, 3, 0, -5])
def test_what_is_not_newer_changes_nothing(revision: int) -> None:
    """A retained document comes again with every connection."""
    verdict = apply(3, document(revision, vibration={"rate_hz": 2}), STREAMS)
    assert verdict == Ignored() or (revision < 1 and isinstance(verdict, Refusal))
    assert apply(3, document(3, nonsense={"x": 1}), STREAMS) == Ignored()
    assert apply(3, b"", STREAMS) == Ignored()


@pytest.mark.parametrize(
    ("payload", "revision", "says"),
    [
        (b"{", None, "cannot be read"),
        (b"\xff", None, "cannot be read"),
        (b"[]", None, "cannot be read"),
        (b'{"v":2,"revision":4}', 4, "version 2"),
        (b'{"v":1,"revision":"4"}', None, "revision"),
        (b'{"v":1,"revision":4,"stream":{}}', 4, "stream"),
        (b'{"v":1,"revision":4,"streams":{"vibration":{"rate_hz":1,"rate_hz":2}}}', 4, "'rate_hz' stands twice"),
        (document(2**53), 2**53, "revision = 9007199254740992 is outside 1 .."),
        (document(4, nothing={}), 4, "no stream 'nothing' on this device; its streams are: audio, vibration"),
        (document(4, vibration={"rate": 5}), 4, "rate"),
        (document(4, vibration={"rate_hz": 1e9}), 4, "stream 'vibration': rate_hz = 1000000000 is outside"),
        (document(4, vibration={"rate_hz": 0}), 4, "to switch the stream off, enabled = false"),
        (document(4, audio={"rate_hz": 5}), 4, "stream 'audio': rate_hz = 5.0 does not apply"),
        (document(4, vibration={"max_batch_rows": 0}), 4, "max_batch_rows = 0 is outside 1 .. 65536"),
        (document(4, vibration={"max_batch_age_s": 1e5}), 4, "max_batch_age_s = 100000 is outside 0.05 .. 3600 s"),
        (document(4, **{"headwater.events": {"enabled": False}}), 4, "no stream 'headwater.events'"),
        (document(4, vibration={"rate_hz": 2}, audio={"max_batch_rows": -1}), 4, "stream 'audio'"),
    ],
)
def test_a_bad_document_is_refused_whole_with_stream_member_value_and_range(
    payload: bytes, revision: int | None, says: str
) -> None:
    """Mutants tried: the good streams of a bad document applied."""
    verdict = apply(3, payload, STREAMS)
    assert isinstance(verdict, Refusal)
    assert verdict.revision == revision
    assert says in verdict.reason


def test_a_refusal_of_anything_stays_short_enough_to_be_reported() -> None:
    verdict = apply(0, document(1, **{f"{i}" * 200: {} for i in range(100)}), STREAMS)
    assert isinstance(verdict, Refusal)
    assert len(verdict.reason) <= 500


def test_what_a_document_leaves_out_stays_as_the_devices_own_file_says() -> None:
    settings = STREAMS["vibration"]
    assert in_force(settings, None) == InForce(True, 10.0, 500, 5.0)
    assert in_force(settings, DesiredStream(rate_hz=1.0)) == InForce(True, 1.0, 500, 5.0)
    assert in_force(settings, DesiredStream(enabled=False, max_batch_rows=1, max_batch_age_s=1.0)) == InForce(
        False, 10.0, 1, 1.0
    )
    assert in_force(STREAMS["audio"], None).rate_hz is None


def test_the_document_in_force_is_found_again(tmp_path: Path) -> None:
    file = RemoteConfigFile(tmp_path / "buffer.desired.json")
    assert file.load() is None
    for revision in (1, 2):
        desired = Desired(revision=revision, streams={"vibration": DesiredStream(rate_hz=1.0)})
        file.save(desired)
        assert RemoteConfigFile(tmp_path / "buffer.desired.json").load() == desired
    assert [path.name for path in tmp_path.iterdir()] == ["buffer.desired.json"]


def test_a_power_cut_while_saving_leaves_the_old_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants tried: written in place."""
    file = RemoteConfigFile(tmp_path / "f.json")
    file.save(Desired(revision=1))

    def cut(descriptor: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(RemoteConfigUnavailableError, match="cannot be written"):
        file.save(Desired(revision=2))
    monkeypatch.undo()
    assert file.load() == Desired(revision=1)


def test_a_damaged_document_is_told_and_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b'{"v":1,"revi')
    with pytest.raises(RemoteConfigUnavailableError, match="damaged"):
        RemoteConfigFile(path).load()
    RemoteConfigFile(path).save(Desired(revision=5))
    assert RemoteConfigFile(path).load() == Desired(revision=5)

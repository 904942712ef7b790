"""What a device keeps of its releases survives a power cut between any two acts on the disk.

`CutDisk` counts the acts (write, sync, rename, unlink …) and stops at one of them. What is then on the disk is tried
in two ways: everything that was asked for arrived, or nothing that was not synced did. Mutants tried: the
folder not synced after the rename of a record; the record written in place.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from contract.errors import ConfigurationError
from contract.models import Artifact, Assignment, Dataset, DeviceState, Manifest, Probe, Window
from edge_agent.models import lifecycle, store
from edge_agent.models.disk import LocalDisk
from edge_agent.models.lifecycle import Done, Job, Loading, Ordered, Scored, Step, Stopping, Verified
from edge_agent.models.orders import Seen
from edge_agent.models.record import ModelRecord, Release, decode_record, encode_record
from edge_agent.models.store import NoRoomError, ReleaseStore, StoreUnavailableError

BIG = 1 << 30


class PowerCut(BaseException):
    """Not an Exception, so nobody can go on after it."""


class CutDisk(LocalDisk):
    """A disk whose power fails before the act number `at`.

    `lost` undoes, when the power fails, what no sync had made durable: renames into a folder, and contents of files.
    """

    def __init__(self, at: int, *, lost: bool) -> None:
        self.at, self.lost, self.acts = at, lost, 0
        self._undo: dict[Path, list[Callable[[], None]]] = {}

    def _act(self) -> None:
        if self.acts == self.at:
            if self.lost:
                for undos in self._undo.values():
                    for undo in reversed(undos):
                        undo()
            raise PowerCut
        self.acts += 1

    def write(self, path: Path, data: bytes) -> None:
        self._act()
        path.write_bytes(data[: len(data) // 2])
        self._act()
        super().write(path, data)

    def sync_file(self, path: Path) -> None:
        self._act()
        super().sync_file(path)

    def rename(self, source: Path, target: Path) -> None:
        self._act()
        before = target.read_bytes() if target.exists() else None
        data = source.read_bytes()

        def undo() -> None:
            source.write_bytes(data)
            target.unlink(missing_ok=True)
            if before is not None:
                target.write_bytes(before)

        super().rename(source, target)
        self._undo.setdefault(target.parent, []).append(undo)

    def sync_folder(self, folder: Path) -> None:
        self._act()
        super().sync_folder(folder)
        self._undo.pop(folder, None)

    def unlink(self, path: Path) -> None:
        self._act()
        super().unlink(path)


def opened(folder: Path, disk: LocalDisk | None = None, **options: object) -> tuple[ReleaseStore, list[str]]:
    troubles: list[str] = []
    settings = {"factory": None, "bytes_max": BIG, "trouble": troubles.append} | options
    return ReleaseStore(folder, disk=disk, **settings), troubles


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


MODELS = {version: b"model %d" % version * 50 for version in (1, 2, 3)}
MANIFESTS = {version: b'{"manifest": %d}' % version for version in (1, 2, 3)}


MANIFEST = Manifest(
    model="m",
    version=1,
    artifact=Artifact(sha256="a" * 64, size=1),
    task="anomaly",
    stream="s",
    fields=("x",),
    dtypes=("double",),
    window=Window(rows=8, stride=4, gap_s=1.0),
    sample_rate_hz=None,
    features=(),
    family="test",
    metrics=(),
    dataset=Dataset(streams={}, sha256="0" * 64, windows=1),
    recipe="",
    code="test",
    seed=0,
    packages={},
    created_at_us=0,
)


def release(version: int) -> Release:
    return Release(version=version, sha256=sha(MODELS[version]), manifest=sha(MANIFESTS[version]))


def assignment(version: int) -> Assignment:
    sha256 = sha(MODELS[version])
    return Assignment(
        device="d", model="m", version=version, sha256=sha256, sequence=version, not_after_us=10**18, rollout="r"
    )


def live(kept: ReleaseStore, version: int, reached: list[ModelRecord]) -> None:
    """Take a release through its whole life, as the service does: record first, then what follows from it."""

    def happen(event: object) -> Step:
        step = lifecycle.step(kept.records().get("m", ModelRecord(model="m")), event, 1)
        if step.durable:
            kept.save(step.record)
            reached.append(step.record)
        return step

    happen(Ordered(assignment(version), Seen(sequence=version, key="k"), {}))
    kept.put(MANIFESTS[version])
    happen(Verified(version, release(version)))
    happen(Done(version, Job.CHECK))
    kept.partial(sha(MODELS[version])).write_bytes(MODELS[version])
    assert kept.adopt(sha(MODELS[version]))
    happen(Done(version, Job.DOWNLOAD))
    happen(Done(version, Job.PROBE))
    happen(Loading(version, beside=version > 1))
    scored = Scored(version, shadow=20, trial=0, bad=0, compared=20, disagreements=0)
    step = happen(scored) if version > 1 else None
    for _ in range(2):
        record = kept.records()["m"]
        step = lifecycle.step(record, replace_trial(scored), 1)
        if step.durable:
            kept.save(step.record)
            reached.append(step.record)
    assert kept.records()["m"].order.state is DeviceState.COMMITTED
    kept.make_room(1, ())


def replace_trial(scored: Scored) -> Scored:
    return Scored(scored.sequence, 20, 20, 0, 20, 0)


@pytest.mark.parametrize("lost", [False, True])
def test_a_power_cut_between_any_two_acts_leaves_a_legal_record_and_a_good_model(tmp_path: Path, lost: bool) -> None:
    first = tmp_path / "first"
    kept, _ = opened(first)
    live(kept, 1, [])
    kept.close()
    at = 0
    while True:
        folder = tmp_path / f"cut-{at}"
        shutil.copytree(first, folder)
        before = decode_record((folder / "records" / "m.json").read_bytes())
        disk, reached = CutDisk(at, lost=lost), [before]
        cut_store: ReleaseStore | None = None
        try:
            cut_store, _ = opened(folder, disk)
            live(cut_store, 2, reached)
            cut = False
        except PowerCut:
            cut = True
        if cut_store is not None:
            cut_store.close()
        again, troubles = opened(folder)
        record = again.records()["m"]
        # The record is the last that was promised, or the one that was being written.
        assert record == reached[-1] or (cut and _follows(record, reached[-1])), (at, record)
        assert troubles == []
        assert record.active is not None
        assert again.read(record.active.sha256) == MODELS[record.active.version]
        assert again.read(record.active.manifest) == MANIFESTS[record.active.version]
        states_that_need_files = (DeviceState.VERIFIED, DeviceState.PROBED, DeviceState.SHADOW, DeviceState.TRIAL)
        if record.order.state in states_that_need_files:
            assert again.read(record.candidate.sha256) == MODELS[2]
        # And whatever was going on can be gone through again, up to the next release.
        live(again, 3, [])
        assert again.records()["m"].active.version == 3
        again.close()
        shutil.rmtree(folder)
        if not cut:
            break
        at += 1
    assert at > 25


def _follows(record: ModelRecord, promised: ModelRecord) -> bool:
    """Whether one event leads from the one to the other."""
    events = [
        Ordered(assignment(2), Seen(sequence=2, key="k"), {}),
        Verified(2, release(2)),
        *(Done(2, job) for job in Job),
        Loading(2, beside=True),
        Scored(2, 20, 0, 0, 20, 0),
        Scored(2, 20, 20, 0, 20, 0),
    ]
    return record in [lifecycle.step(promised, event, 1).record for event in events]


def test_the_count_of_starts_is_on_disk_before_the_model_is_loaded(tmp_path: Path) -> None:
    record = ModelRecord(model="m", active=release(1))
    order = lifecycle.step(record, Ordered(assignment(2), Seen(sequence=2, key="k"), {}), 1).record
    assert order.order is not None
    candidate = replace(order, candidate=release(2), order=replace(order.order, state=DeviceState.PROBED))
    for starts in (1, 2):
        step = lifecycle.step(candidate, Loading(2, beside=True), 1)
        assert (step.durable, step.record.starts) == (True, starts)
        candidate = decode_record(encode_record(step.record))
    denied = lifecycle.step(candidate, Loading(2, beside=True), 1).record
    assert denied.order.state is DeviceState.FAILED
    assert denied.active == release(1)
    assert "ended 2 times" in denied.denial(release(2).sha256)
    again = lifecycle.step(denied, Ordered(replace(assignment(2), sequence=9), Seen(sequence=9, key="k"), {}), 1)
    assert again.record.order.state is DeviceState.REJECTED
    assert "denies" in again.record.order.reason


def test_an_orderly_stop_is_no_crash(tmp_path: Path) -> None:
    loaded = ModelRecord(model="m", active=release(1), active_starts=3, starts=1)
    stopped = lifecycle.step(loaded, Stopping(active=True, candidate=True), 1)
    assert (stopped.durable, stopped.record.starts, stopped.record.active_starts) == (True, 0, 0)
    unloaded = lifecycle.step(loaded, Stopping(active=False, candidate=False), 1)
    assert (unloaded.record.starts, unloaded.record.active_starts) == (1, 3)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"00000000\n{}"])
def test_a_damaged_record_is_told_and_set_aside_and_the_agent_goes_on(tmp_path: Path, damage: bytes) -> None:
    kept, _ = opened(tmp_path)
    live(kept, 1, [])
    kept.close()
    (tmp_path / "records" / "m.json").write_bytes(damage)
    again, troubles = opened(tmp_path)
    assert again.records() == {}
    assert len(troubles) == 1
    assert "m.json is damaged" in troubles[0]
    live(again, 2, [])


def test_damaged_content_counts_as_absent_and_is_told(tmp_path: Path) -> None:
    kept, troubles = opened(tmp_path)
    digest = kept.put(b"good")
    assert kept.read(digest) == b"good"
    (tmp_path / "content" / digest).write_bytes(b"goof")
    assert kept.read(digest) is None
    assert "does not match its hash" in troubles[0]
    assert not kept.holds(digest)
    assert kept.put(b"good") == digest
    assert kept.read(digest) == b"good"


def test_a_download_of_other_bytes_never_becomes_content(tmp_path: Path) -> None:
    kept, _ = opened(tmp_path)
    kept.partial(sha(b"right")).write_bytes(b"wrong")
    assert not kept.adopt(sha(b"right"))
    assert not kept.holds(sha(b"right"))
    assert not kept.partial(sha(b"right")).exists()


def test_the_cap_evicts_what_nobody_refers_to_and_nothing_else(tmp_path: Path) -> None:
    kept, _ = opened(tmp_path, bytes_max=1 << 20)
    live(kept, 1, [])
    loose = [kept.put(bytes([n]) * 300_000) for n in range(3)]
    kept.make_room(500_000, [loose[0]])
    assert kept.holds(loose[0])
    assert not kept.holds(loose[1])
    assert kept.read(release(1).sha256) is not None
    with pytest.raises(NoRoomError, match="bytes_max = 1048576"):
        kept.make_room(900_000, [loose[0]])


def test_a_disk_that_is_nearly_full_or_silent_takes_no_release_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store, "FREE_BYTES_MIN", 1 << 60)
        with pytest.raises(StoreUnavailableError, match="free some space"):
            kept.make_room(1, ())
    loose = kept.put(b"loose")

    def failing(path: Path) -> None:
        raise OSError(errno.EIO, "a failing card")

    monkeypatch.setattr(shutil, "disk_usage", failing)
    with pytest.raises(StoreUnavailableError, match="a failing card"):
        kept.make_room(1, ())
    assert kept.holds(loose)  # nothing was thrown away for it


def test_a_folder_that_cannot_be_read_counts_as_empty_and_is_told_once(tmp_path: Path) -> None:
    kept, troubles = opened(tmp_path)
    kept.put(b"12345")
    away = tmp_path / "away"
    (tmp_path / "content").rename(away)
    assert [kept.used_bytes() for _ in range(3)] == [0, 0, 0]
    assert len(troubles) == 1
    assert "folder content cannot be read" in troubles[0]
    away.rename(tmp_path / "content")
    assert kept.used_bytes() == 5


def test_another_models_download_leaves_the_probe_of_a_candidate_alone(tmp_path: Path) -> None:
    kept, _ = opened(tmp_path, bytes_max=1 << 20)
    windows = kept.put(b"w" * 400_000)
    probe = Probe(artifact=Artifact(sha256=windows, size=400_000), score_tolerance=0.0)
    manifest = kept.put(msgspec.json.encode(replace(MANIFEST, probe=probe)))
    candidate = Release(version=1, sha256=MANIFEST.artifact.sha256, manifest=manifest)
    kept.save(ModelRecord(model="m", candidate=candidate))
    with pytest.raises(NoRoomError):
        kept.make_room(800_000, ())
    assert kept.holds(windows)
    kept.save(ModelRecord(model="m"))
    kept.make_room(800_000, ())
    assert not kept.holds(windows)


def test_what_killed_children_left_beside_the_metadata_is_swept_at_the_start(tmp_path: Path) -> None:
    metadata = tmp_path / "metadata"
    (metadata / "target-abc").mkdir(parents=True)
    (metadata / "target-abc" / "manifest.json").write_text("{")
    (metadata / "root_history").mkdir()
    for name in (".timestamp.json.1a2b.part", "root_history/.2.root.json.3c.part", "timestamp.json"):
        (metadata / name).write_text("{}")
    opened(tmp_path)
    assert sorted(path.name for path in metadata.rglob("*")) == ["root_history", "timestamp.json"]


def test_two_agents_cannot_share_a_folder(tmp_path: Path) -> None:
    kept, _ = opened(tmp_path)
    with pytest.raises(ConfigurationError, match="another agent"):
        opened(tmp_path)
    kept.close()


def test_a_record_of_an_agent_that_could_silence_a_model_is_read(tmp_path: Path) -> None:
    old = msgspec.json.encode({"v": 1, "model": "m", "removed": True, "active_starts": 2})
    assert decode_record(b"%08x\n" % zlib.crc32(old) + old) == ModelRecord(model="m", active_starts=2)


def test_a_record_survives_its_own_encoding() -> None:
    made = ModelRecord(model="m", active=release(1), previous=release(2), seen=Seen(sequence=4, key="k"), starts=1)
    assert decode_record(encode_record(made)) == made
    assert msgspec.json.decode(encode_record(made).partition(b"\n")[2])["seen"]["sequence"] == 4

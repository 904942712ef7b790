"""What takes time with a release, and is done beside everything else: verify, check, download, probe; each an event."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from contract.errors import HeadwaterError, TemporaryError
from contract.models import DeviceState, Manifest
from edge_agent.models import parent
from edge_agent.models.child import Opened, OpenRequest, ProbeRequest
from edge_agent.models.download import Cancel, Timeouts, WrongContentError, download
from edge_agent.models.lifecycle import Done, Ended, Event, Job, Later, Verified
from edge_agent.models.orders import PASSING, Seen, TrustPlace
from edge_agent.models.parent import CancelledError, ChildFailedError
from edge_agent.models.precheck import Surroundings, precheck
from edge_agent.models.record import ModelRecord, Release
from edge_agent.models.settings import ModelsSettings
from edge_agent.models.store import ReleaseStore, artifacts_of, decode_manifest

VERIFY_DEADLINE_S = 180.0


class Tasks:
    """Does jobs; every method may take long, ends soon after `cancel`, and raises nothing but `CancelledError`.

    Args:
        device: this device's name.
        settings: where releases come from.
        store: where they go.
        synced: whether the wall clock is known to be right.
        surroundings: what the device has for a manifest's stream.
    """

    def __init__(
        self,
        *,
        device: str,
        settings: ModelsSettings,
        store: ReleaseStore,
        synced: Callable[[], bool],
        surroundings: Callable[[Manifest], Surroundings],
    ) -> None:
        self._device, self._settings, self._store = device, settings, store
        self._synced, self._surroundings = synced, surroundings
        self._place = TrustPlace(
            root=settings.root,
            metadata_dir=str(store.metadata),
            url=settings.url,
            timeout_s=settings.connect_timeout_s,
            deadline_s=max(settings.connect_timeout_s, settings.read_timeout_s),
        )
        self._timeouts = Timeouts(settings.connect_timeout_s, settings.read_timeout_s)

    def open(
        self, envelopes: tuple[dict[str, object], ...], seen: dict[str, Seen], cancel: Cancel
    ) -> tuple[Opened, ...] | str:
        """What became of orders that arrived; or why nothing could be said now."""
        try:
            return parent.open_orders(self._request(envelopes, seen), cancel)
        except ChildFailedError as error:
            return str(error)

    def do(self, job: Job, record: ModelRecord, cancel: Cancel) -> Event:
        """Do a record's job."""
        assert record.assignment is not None
        sequence = record.assignment.sequence
        work = {Job.VERIFY: self._verify, Job.CHECK: self._check, Job.DOWNLOAD: self._download, Job.PROBE: self._probe}
        try:
            return work[job](record, sequence, cancel)
        except CancelledError:
            raise
        except (TemporaryError, OSError) as error:
            return Later(sequence, str(error))
        except HeadwaterError as error:
            return Ended(sequence, DeviceState.REJECTED, str(error))

    def _request(self, envelopes: tuple[dict[str, object], ...], seen: dict[str, Seen]) -> OpenRequest:
        return OpenRequest(
            envelopes=envelopes,
            place=self._place,
            device=self._device,
            seen=seen,
            synchronised=self._synced(),
            deadline_s=VERIFY_DEADLINE_S,
        )

    def _verify(self, record: ModelRecord, sequence: int, cancel: Cancel) -> Event:
        assert record.envelope is not None and record.assignment is not None
        # Without what was seen of this model: that is this very order.
        try:
            (opened,) = parent.verify_orders(self._request((record.envelope,), {}), cancel)
        except ChildFailedError as error:
            return Later(sequence, f"it could not be verified: {error}")
        if opened.reason:
            why = f"{opened.reason}: {opened.message}"
            if not opened.final:
                return Later(sequence, why)
            return Ended(sequence, DeviceState.REJECTED, why, passing=opened.reason in PASSING)
        manifest = opened.manifest
        if opened.assignment != record.assignment or (manifest is None) != (record.assignment.version == 0):
            return Ended(sequence, DeviceState.REJECTED, "the order as it was kept is another one; start it again")
        if manifest is None:
            return Verified(sequence, None)
        data = msgspec.json.encode(manifest)
        self._store.make_room(len(data), ())
        kept = self._store.put(data)
        return Verified(sequence, Release(version=manifest.version, sha256=manifest.artifact.sha256, manifest=kept))

    def _check(self, record: ModelRecord, sequence: int, cancel: Cancel) -> Event:
        manifest = self._manifest(record)
        if manifest is None:
            return _lost(sequence)
        finding = precheck(manifest, self._surroundings(manifest))
        if finding is not None:
            return Ended(sequence, DeviceState.REJECTED, finding.why) if finding.final else Later(sequence, finding.why)
        needed = [artifact for artifact in artifacts_of(manifest) if not self._store.holds(artifact.sha256)]
        self._store.make_room(sum(each.size for each in needed), [each.sha256 for each in artifacts_of(manifest)])
        return Done(sequence, Job.CHECK)

    def _download(self, record: ModelRecord, sequence: int, cancel: Cancel) -> Event:
        manifest, store = self._manifest(record), self._store
        if manifest is None:
            return _lost(sequence)
        keep = [each.sha256 for each in artifacts_of(manifest)]
        for artifact in artifacts_of(manifest):
            if store.holds(artifact.sha256):
                continue
            store.make_room(0, keep)
            url = f"{self._settings.url}artifacts/{artifact.sha256}"
            try:
                download(url, artifact, store.partial(artifact.sha256), self._timeouts, cancel)
            except WrongContentError as error:
                return Ended(sequence, DeviceState.REJECTED, f"bad_hash: {error}")
            if not store.adopt(artifact.sha256):
                return Later(sequence, f"{artifact.sha256} was damaged on the disk; it is fetched again")
        return Done(sequence, Job.DOWNLOAD)

    def _probe(self, record: ModelRecord, sequence: int, cancel: Cancel) -> Event:
        manifest = self._manifest(record)
        if manifest is None:
            return _lost(sequence)
        known = str(self._store.path_of(manifest.probe.artifact.sha256)) if manifest.probe is not None else ""
        model = self._store.path_of(manifest.artifact.sha256)
        for path in (model, *((Path(known),) if known else ())):
            if not os.access(path, os.R_OK):
                return Ended(sequence, DeviceState.FAILED, f"{path.name} is not in the store any more; order it again")
        request = ProbeRequest(
            model=str(model), manifest=manifest, known=known, deadline_s=self._settings.probe_timeout_s
        )
        why = parent.probe_model(request, cancel)
        return Ended(sequence, DeviceState.FAILED, f"probe: {why}") if why else Done(sequence, Job.PROBE)

    def _manifest(self, record: ModelRecord) -> Manifest | None:
        if record.candidate is None:
            return None
        data = self._store.read(record.candidate.manifest)
        return None if data is None else decode_manifest(data)


def _lost(sequence: int) -> Event:
    return Ended(sequence, DeviceState.FAILED, "its manifest is not in the store any more; order it again")

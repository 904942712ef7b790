"""The TUF repository in the lake's folder `models/`: read by devices over HTTP, written by people and gateways.

What may be written at the same time, by whom, and what a reader sees:

* numbered files are written once (`put_if_absent`). `N.targets.json` is a chain: each is made from N-1 and verified, so
  two people who approve at once both have their release in it.
* `timestamp.json` alone decides what is published. It is replaced only by who saw its present content
  (`Store.replace`): of two signers one begins again with what the other wrote.
* the order of writing is targets, snapshot, timestamp; a reader finds everything that its timestamp leads to, and a
  process killed in between leaves numbered files that nobody refers to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.metadata import (
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from contract.errors import ConfigurationError
from lake.errors import CommitConflictError, CorruptLakeError, ObjectMissingError
from lake.store import Store
from lake.trust.files import (
    METADATA,
    TIMESTAMP_PATH,
    VERSIONS_MAX,
    NotInitialisedError,
    metadata_path,
    read_roots,
    read_state,
    root_path,
    target_object,
)
from lake.trust.metadata import (
    TARGETS_FILE,
    Document,
    Expiries,
    dated,
    first_root,
    follows,
    is_due,
    is_vouched,
    left_s,
    signed,
    snapshot_of,
    timestamp_of,
    with_keys,
    with_targets,
)

ATTEMPTS_MAX = 50
"""Times that somebody else may come first, before a caller is told to come back."""
FAR, AFTER_FAR = 100_000_000, 10_000_000
"""No honest number of snapshot or timestamp is so high. Whoever stole the online key may have counted further than
hosts serve; once that key is taken back, numbers go on from `AFTER_FAR`: devices forget the high ones with the key
(TUF specification, 5.3.11: recovery from fast-forward attacks)."""


class Published(NamedTuple):
    """What the repository says now."""

    root: Root
    targets: Targets
    """The newest signed ones; a gateway publishes them when they are newer than `snapshot` says."""
    snapshot: Snapshot
    timestamp: Timestamp

    @property
    def targets_published(self) -> int:
        """Version of the targets that devices see."""
        return int(self.snapshot.meta[TARGETS_FILE].version)

    @property
    def behind(self) -> bool:
        """Whether what was signed waits for the online key."""
        return self.targets_published < self.targets.version

    def left_s(self, now_us: int) -> dict[str, float]:
        """Seconds to expiry, by role."""
        return {part.type: left_s(part, now_us) for part in self}


class TrustRepository:
    """One lake's repository. Safe to use from several processes and threads at once.

    Args:
        store: where the lake is.
        anchor: the root metadata that the caller trusts already, from beside its keys. Without it, version 1 in the
            lake is trusted: enough to look, not enough to sign with offline keys, as who can write to the bucket could
            have put another one there.
        expiries: how long new signatures hold.
        now_us: wall clock, microseconds since 1970-01-01 UTC.
    """

    def __init__(
        self,
        store: Store,
        *,
        anchor: bytes | None = None,
        expiries: Expiries | None = None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._store, self._anchor = store, anchor
        self._expiries = Expiries() if expiries is None else expiries
        self._now_us = now_us

    def initialise(
        self, roots: Collection[CryptoSigner], targets: CryptoSigner, online: CryptoSigner, *, threshold: int = 1
    ) -> bytes:
        """Make the repository, or finish what was begun with the same keys.

        Args:
            roots: the root keys.
            targets: the key that approves.
            online: the key of gateways.
            threshold: how many root keys have to sign a change of keys.

        Returns:
            The newest root: the trust anchor for devices.

        Raises:
            ConfigurationError: the lake has a repository with other keys, or the threshold cannot be met.
            StoreUnavailableError: the store did not answer.
        """
        if not 1 <= threshold <= len(roots):
            raise ConfigurationError(f"threshold {threshold} is not one of 1 to {len(roots)}, the number of root keys")
        now = self._now_us()
        root = signed(dated(first_root(roots, targets, online, threshold), now, self._expiries.root_days), roots)
        if not self._store.put_if_absent(root_path(1), root.data):
            root = self._same_keys(root.signed)
        try:
            self._store.size(TIMESTAMP_PATH)
            return root.data
        except ObjectMissingError:
            pass  # it is written last: the rest may be there or not
        first = signed(dated(Targets(version=1), now, self._expiries.targets_days), [targets])
        if not self._store.put_if_absent(metadata_path(Targets.type, 1), first.data):
            first = first._replace(data=self._store.get(metadata_path(Targets.type, 1)))
        snapshot = self._write_snapshot(first, 1, [online])
        stamp = signed(dated(timestamp_of(snapshot, 1), now, self._expiries.timestamp_days), [online])
        self._store.put_if_absent(TIMESTAMP_PATH, stamp.data)
        return root.data

    def published(self) -> Published:
        """What is trusted now.

        Raises:
            NotInitialisedError: there is no repository.
            CorruptLakeError: its metadata is not signed as it must be.
            StoreUnavailableError: the store did not answer.
        """
        state = read_state(self._store, self._anchor)
        return Published(state.root, state.targets.signed, state.snapshot.signed, state.timestamp.signed)

    def is_signed(self, path: str, sha256: str | None = None) -> bool:
        """Whether a target is among the newest signed ones; also no where there is no repository.

        Args:
            path: the target.
            sha256: of the bytes that are meant; None for any.
        """
        try:
            found = self.published().targets.targets.get(path)
        except NotInitialisedError:
            return False
        return found is not None and sha256 in (None, found.hashes.get("sha256"))

    def is_behind(self) -> bool:
        """Whether what was signed waits for a gateway to publish it."""
        try:
            return self.published().behind
        except NotInitialisedError:
            return False

    def put_target(self, path: str, data: bytes) -> TargetFile:
        """Write a target's bytes where clients look for them. It is not approved by that.

        Args:
            path: the target, such as `gestures/3.json`.
            data: its bytes.
        """
        target = TargetFile.from_data(path, data, ["sha256"])
        self._store.put_if_absent(target_object(target), data)
        return target

    def sign_targets(
        self,
        keys: Collection[CryptoSigner],
        *,
        add: Mapping[str, bytes] | None = None,
        remove: Collection[str] = (),
        keep: Mapping[str, str] | None = None,
        force: bool = False,
    ) -> int:
        """Approve and take back targets, in one version. Nothing is written where nothing changes.

        Args:
            keys: the key of the targets role; both, when the key changes.
            add: path → bytes, stored before by `put_target`.
            remove: paths.
            keep: path → SHA-256 of its bytes; where given, every other target is removed, and those of other bytes.
            force: sign in any case, for a new expiry.

        Returns:
            The version that says so. It is in force once `publish` was called, by anybody.

        Raises:
            ConfigurationError: none of the keys may sign targets, or the trust anchor is not at hand.
            CorruptLakeError: the targets of now are not signed by their key.
            StoreUnavailableError: the store did not answer; call again.
        """
        added = {path: TargetFile.from_data(path, data, ["sha256"]) for path, data in (add or {}).items()}
        if self._anchor is None:
            raise ConfigurationError(
                "the trust anchor root.json is not beside the keys, and without it an approval could serve a stranger; "
                "copy it there from where `headwater keys init` wrote it"
            )
        for _ in range(ATTEMPTS_MAX):
            state = read_state(self._store, self._anchor)
            self._check(keys, state.root, Targets.type)
            old: Targets = state.targets.signed
            gone = set(remove)
            if keep is not None:
                # By their bytes: whoever stole the key may have signed others of his own under a name that is known.
                gone |= {path for path, target in old.targets.items() if keep.get(path) != target.hashes.get("sha256")}
            said = all(old.targets.get(path) == target for path, target in added.items()) and not gone & set(
                old.targets
            )
            holds = is_vouched(state.targets.data, state.root) and not is_due(
                old, self._now_us(), self._expiries.targets_days
            )
            if said and holds and len(keys) == 1 and not force:
                return int(old.version)
            number = state.free
            content = with_targets(old, number, added, gone)
            new = signed(dated(content, self._now_us(), self._expiries.targets_days), keys)
            if self._store.put_if_absent(metadata_path(Targets.type, number), new.data):
                return number
        raise CommitConflictError(f"targets moved {ATTEMPTS_MAX} times while they were signed; try again")

    def publish(self, keys: Collection[CryptoSigner], *, force: bool = False) -> bool:
        """Sign snapshot and timestamp where the newest targets are not in them, or half of their time is over.

        Args:
            keys: the online key; the old and the new one, while they change.
            force: sign in any case.

        Returns:
            Whether anything was written.

        Raises:
            ConfigurationError: none of the keys is the online key that the newest root names.
            StoreUnavailableError: the store did not answer; call again.
        """
        for _ in range(ATTEMPTS_MAX):
            state = read_state(self._store, self._anchor)
            self._check(keys, state.root, Timestamp.type)
            now, expiries = self._now_us(), self._expiries
            snapshot, stamp = state.snapshot, state.timestamp
            if (
                force
                or snapshot.signed.meta[TARGETS_FILE].version != state.targets.signed.version
                or is_due(snapshot.signed, now, expiries.snapshot_days)
                or not is_vouched(snapshot.data, state.root)
            ):
                snapshot = self._write_snapshot(state.targets, _number_after(snapshot, state.root), keys)
            elif is_vouched(stamp.data, state.root) and not is_due(stamp.signed, now, expiries.timestamp_days):
                return False
            number = _number_after(stamp, state.root)
            content = dated(timestamp_of(snapshot, number), now, expiries.timestamp_days)
            new = signed(content, keys)
            if self._store.replace(TIMESTAMP_PATH, new.data, state.tagged.tag):
                return True
        raise CommitConflictError(f"timestamp.json moved {ATTEMPTS_MAX} times while it was signed; try again")

    def change_root(
        self,
        roots: Collection[CryptoSigner],
        roles: Mapping[str, Collection[Key]],
        *,
        also: Collection[CryptoSigner] = (),
        force: bool = False,
    ) -> bytes:
        """Write the next root (see `lake.trust.rotation` for what has to come before and after).

        Args:
            roots: root keys of now, as many as the threshold says.
            roles: TUF role → all of its keys from now on; their public halves do.
            also: further keys that sign: those of the new root, where they change.
            force: write one even where nothing changes.

        Returns:
            The root metadata that is in force now.

        Raises:
            ConfigurationError: too few of the keys are root keys.
            StoreUnavailableError: the store did not answer; call again.
        """
        for _ in range(ATTEMPTS_MAX):
            newest = read_roots(self._store, self._anchor)[-1]
            root: Root = newest.signed
            wanted = {role: {key.keyid for key in keys} for role, keys in roles.items()}
            if not force and all(set(root.roles[role].keyids) == keyids for role, keyids in wanted.items()):
                return newest.data
            self._check(roots, root, Root.type, root.roles[Root.type].threshold)
            content = dated(with_keys(root, roles), self._now_us(), self._expiries.root_days)
            new = signed(content, [*roots, *also])
            if follows(root, new.data) is None:
                raise ConfigurationError(
                    f"root version {content.version} would not be signed by enough keys (threshold "
                    f"{root.roles[Root.type].threshold}); bring more root keys"
                )
            if self._store.put_if_absent(root_path(content.version), new.data):
                return new.data
        raise CommitConflictError(f"the root moved {ATTEMPTS_MAX} times while it was signed; try again")

    def _check(self, keys: Collection[CryptoSigner], root: Root, role: str, least: int = 1) -> None:
        have = {key.public_key.keyid for key in keys} & set(root.roles[role].keyids)
        if len(have) < least:
            mine = ", ".join(key.public_key.keyid[:12] for key in keys) or "none"
            named = ", ".join(keyid[:12] for keyid in root.roles[role].keyids)
            raise ConfigurationError(
                f"{role} metadata needs {least} of the keys {named} that root version {root.version} names, "
                f"and here is {mine}; bring the right key, or put this one into force with: headwater keys rotate"
            )

    def _write_snapshot(self, targets: Document, number: int, keys: Collection[CryptoSigner]) -> Document:
        for free in range(number, number + VERSIONS_MAX):
            content = dated(snapshot_of(targets, free), self._now_us(), self._expiries.snapshot_days)
            snapshot = signed(content, keys)
            if self._store.put_if_absent(metadata_path(Snapshot.type, free), snapshot.data):
                return snapshot
        raise CorruptLakeError(f"{VERSIONS_MAX} snapshots are in {METADATA} that nobody refers to; remove them")

    def _same_keys(self, wanted: Root) -> Document:
        """The newest root, where its keys are those that are wanted."""
        there = read_roots(self._store, self._anchor)[-1]
        roles = {role: set(named.keyids) for role, named in there.signed.roles.items()}
        if roles != {role: set(named.keyids) for role, named in wanted.roles.items()}:
            raise ConfigurationError(
                f"lake {self._store.url} has a repository with other keys already; use those, change them with "
                "`headwater keys rotate`, or move the folder models/ away"
            )
        return there


def _number_after(document: Document, root: Root) -> int:
    """Number of the snapshot or timestamp that takes the place of one."""
    number: int = document.signed.version
    return number + 1 if number < FAR or is_vouched(document.data, root) else AFTER_FAR

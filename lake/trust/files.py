"""The files of the repository below `models/`, read and verified as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp

from contract.errors import ConfigurationError
from lake.errors import CorruptLakeError, ObjectMissingError
from lake.store import Store, Tagged
from lake.trust.metadata import TARGETS_FILE, Document, UnverifiedError, follows, parsed, self_signed

FOLDER = "models"
METADATA = f"{FOLDER}/metadata"
TIMESTAMP_PATH = f"{METADATA}/timestamp.json"
VERSIONS_MAX = 10_000
"""Numbered files looked for beyond those that are referred to."""


class NotInitialisedError(ConfigurationError):
    """The lake has no trust repository yet."""


class State(NamedTuple):
    """All metadata that holds together, as it was read."""

    tagged: Tagged
    """timestamp.json, to be replaced."""
    roots: list[Document]
    """From the anchor to the newest."""
    timestamp: Document
    snapshot: Document
    targets: Document
    """The newest signed ones, published or not."""
    free: int
    """Number for the next targets."""

    @property
    def root(self) -> Root:
        """The newest one."""
        newest: Root = self.roots[-1].signed
        return newest


def read_state(store: Store, anchor: bytes | None) -> State:
    """What the repository says, verified from the anchor on.

    Args:
        store: where the lake is.
        anchor: a root that is trusted already; None trusts version 1 in the lake.

    Raises:
        NotInitialisedError: there is no repository.
        CorruptLakeError: its metadata is not signed as it must be.
        StoreUnavailableError: the store did not answer.
    """
    # The timestamp first: whatever changes while the rest is read makes its replacement fail.
    roots: list[Document] = []
    try:
        tagged = store.get_tagged(TIMESTAMP_PATH)
        roots = read_roots(store, anchor)
        known: list[Root] = [document.signed for document in reversed(roots)]
        stamp = parsed(Timestamp, tagged.data, known)
        number = stamp.signed.snapshot_meta.version
        snapshot = _numbered(parsed(Snapshot, store.get(metadata_path(Snapshot.type, number)), known), number)
        targets, free = _newest_targets(store, snapshot.signed.meta[TARGETS_FILE].version, known)
    except ObjectMissingError as error:
        if roots:
            raise CorruptLakeError(f"{error}, though {TIMESTAMP_PATH} leads there; restore it") from error
        raise NotInitialisedError(
            f"lake {store.url} has no keys for models yet; make them with: headwater keys init"
        ) from error
    except UnverifiedError as error:
        raise CorruptLakeError(
            f"metadata below {METADATA} in {store.url} is not to be trusted: {error}; if root.json is that of "
            "another lake, name the folder of this lake's keys, else restore the metadata from a backup"
        ) from error
    return State(tagged, roots, stamp, snapshot, targets, free)


def read_roots(store: Store, anchor: bytes | None) -> list[Document]:
    """The chain of roots, from the anchor to the newest, each vouched for by the one before it.

    Raises:
        ObjectMissingError: there is none.
        UnverifiedError: the first does not sign itself.
        CorruptLakeError: the chain is broken.
    """
    data = store.get(root_path(1)) if anchor is None else anchor
    found = [self_signed(data)]
    since = found[0].signed.version
    for number in range(since + 1, since + VERSIONS_MAX):
        try:
            newer = follows(found[-1].signed, store.get(root_path(number)))
        except ObjectMissingError:
            break
        if newer is None:
            raise CorruptLakeError(
                f"{root_path(number)} in {store.url} is not signed by the root before it; remove or restore it"
            )
        found.append(newer)
    return found


def root_path(version: int) -> str:
    """Where a root is."""
    return metadata_path(Root.type, version)


def metadata_path(role: str, version: int) -> str:
    """Where a numbered metadata file is."""
    return f"{METADATA}/{version}.{role}.json"


def target_object(target: TargetFile) -> str:
    """Where a target's bytes are (consistent snapshots: the hash is in the name)."""
    folder, _, name = target.path.rpartition("/")
    return f"{FOLDER}/targets/{folder}/{target.hashes['sha256']}.{name}"


def _newest_targets(store: Store, number: int, known: Sequence[Root]) -> tuple[Document, int]:
    """The last of the chain, and the first number that nobody wrote; what no key signed for its number is stepped over.

    Beyond what is published, only keys of the newest root count: one that was taken back must not add anything.
    """
    newest = _numbered(parsed(Targets, store.get(metadata_path(Targets.type, number)), known), number)
    for later in range(number + 1, number + VERSIONS_MAX):
        try:
            newest = _numbered(parsed(Targets, store.get(metadata_path(Targets.type, later)), known[:1]), later)
        except ObjectMissingError:
            return newest, later
        except UnverifiedError:
            continue
    raise CorruptLakeError(
        f"{VERSIONS_MAX} files of targets are in {METADATA} of {store.url} beyond what is published; remove those that "
        "nobody made on purpose"
    )


def _numbered(document: Document, number: int) -> Document:
    """An older file under a newer number would take back what came since."""
    if document.signed.version != number:
        raise UnverifiedError(f"{document.signed.type} version {document.signed.version} stands under number {number}")
    return document

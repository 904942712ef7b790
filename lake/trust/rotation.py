"""Changing keys. Each function can be repeated after any interruption, and readers see valid signatures throughout
wherever the old key is at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

from contract.errors import TemporaryError
from lake.trust.repository import TrustRepository


def rotate_online(
    repository: TrustRepository, roots: Collection[CryptoSigner], old: CryptoSigner | None, new: CryptoSigner
) -> None:
    """Put another online key into force. Can be repeated after any interruption.

    With the old key at hand, readers see valid signatures throughout: first both keys sign, then the root changes.
    Without it, who reads between the two writes finds a signature of no use, and reads again.

    Raises:
        ConfigurationError: the root keys are not those of the present root.
        StoreUnavailableError: the store did not answer; call again.
    """
    keys = [new] if old is None else [old, new]
    if old is not None and old.public_key.keyid in repository.published().root.roles[Timestamp.type].keyids:
        repository.publish(keys, force=True)
    repository.change_root(roots, {Snapshot.type: [new.public_key], Timestamp.type: [new.public_key]})
    # Once more: a gateway that had not heard of it may have signed with the old key alone in between.
    repository.publish(keys, force=True)


def rotate_targets(
    repository: TrustRepository,
    roots: Collection[CryptoSigner],
    old: CryptoSigner | None,
    new: CryptoSigner,
    online: CryptoSigner | None,
    keep: Mapping[str, str] | None,
) -> None:
    """Put another key for approvals into force. Can be repeated after any interruption.

    Args:
        repository: whose keys.
        roots: the root keys.
        old: the key of now, where it is not lost.
        new: the key to come.
        online: the online key, where it is at hand; otherwise a gateway publishes.
        keep: the targets that stay approved, path → SHA-256 of its bytes; None for all. After a theft, those that
            people did approve.

    Raises:
        TemporaryError: a gateway has to publish first; call again.
        ConfigurationError: the root keys are not those of the present root.
        StoreUnavailableError: the store did not answer; call again.
    """
    keys = [new] if old is None else [old, new]
    if old is not None and old.public_key.keyid in repository.published().root.roles[Targets.type].keyids:
        repository.sign_targets(keys, keep=keep)
        _publish_or_wait(repository, online)
    repository.change_root(roots, {Targets.type: [new.public_key]})
    repository.sign_targets([new], keep=keep)
    if online is not None:
        repository.publish([online])


def rotate_root(
    repository: TrustRepository, roots: Collection[CryptoSigner], old: CryptoSigner, new: CryptoSigner
) -> bytes:
    """Put another root key in the place of one. The others stay, also those that are in other hands.

    Args:
        repository: whose keys.
        roots: root keys of now that are at hand, as many as the threshold says; they and the new one sign.
        old: the key that goes.
        new: the key that comes.

    Returns:
        The new root metadata, for devices that are set up from now on.

    Raises:
        ConfigurationError: the old keys are not those of the present root, or too few.
        StoreUnavailableError: the store did not answer; call again.
    """
    root = repository.published().root
    going = {old.public_key.keyid, new.public_key.keyid}
    staying = [root.keys[keyid] for keyid in root.roles[Root.type].keyids if keyid not in going]
    return repository.change_root(roots, {Root.type: [new.public_key, *staying]}, also=[new])


def renew_root(repository: TrustRepository, roots: Collection[CryptoSigner]) -> bytes:
    """Sign the root again, with a new expiry and the same keys.

    Raises:
        ConfigurationError: the keys are not those of the present root.
        StoreUnavailableError: the store did not answer; call again.
    """
    return repository.change_root(roots, {}, force=True)


def _publish_or_wait(repository: TrustRepository, online: CryptoSigner | None) -> None:
    if online is not None:
        repository.publish([online])
    elif repository.published().behind:
        raise TemporaryError(
            "targets are signed by both keys, and a gateway has to publish them before the old key is taken back; "
            "see that one runs with [models] online_key, then run this again"
        )

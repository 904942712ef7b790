"""Approving and retiring releases: the signature, its publication, then the row that records it.

The signature is what devices believe, and a row APPROVED says that they can see it: a rollout that is started then
finds no device that has yet to hear of it. Where a process dies in between, doing it again finds the signature and goes
on.
"""

from __future__ import annotations

import hashlib
import threading
import time
from typing import NamedTuple

import msgspec
from securesystemslib.signer import CryptoSigner

from contract.errors import ConfigurationError, TemporaryError
from contract.models import Manifest, check_manifest, target_path
from lake.errors import CorruptLakeError, ObjectMissingError
from lake.releases import TEXT_MAX, Release, ReleaseEventKind, ReleaseRefused, Releases, ReleaseState, require_state
from lake.rollouts import PATH as ROLLOUTS_PATH
from lake.rollouts import SCHEMA as ROLLOUTS_SCHEMA
from lake.rollouts import RolloutTable
from lake.tables import ControlTable
from lake.trust.repository import TrustRepository

PUBLICATION_WAIT_S = 30.0
"""Twice of what a gateway takes by default."""
_LOOK_INTERVAL_S = 0.5


class Approver(NamedTuple):
    """Who decides, and with which keys."""

    trust: TrustRepository
    targets: CryptoSigner | None
    """None where only what needs no signature is asked for."""
    online: CryptoSigner | None
    """None where a gateway publishes."""
    who: str


class Decision(NamedTuple):
    """What came of it."""

    release: Release
    published: bool
    """False where a gateway with the online key has yet to publish it."""


def approve(
    releases: Releases, model: str, version: int, approver: Approver, why: str, *, wait_s: float = PUBLICATION_WAIT_S
) -> Decision:
    """Sign a release into the targets that devices believe, after a look at everything that it names.

    Args:
        releases: the register.
        model: of the release.
        version: of the release.
        approver: who, and the keys.
        why: for the record; never empty.
        wait_s: without the online key, how long a gateway is given to publish it.

    Raises:
        ReleaseRefused: there is no such release, it is retired, or what it names is missing or wrong.
        TemporaryError: it is signed, but no gateway has published it; approve again to have it recorded.
        ConfigurationError: the key is not that of the targets, or nobody answers for it.
        StoreUnavailableError: the store did not answer; call again.
    """
    release = releases.look().get(model, version)
    _check_person(approver.who, why)
    if release.state is not ReleaseState.APPROVED:
        require_state(release, ReleaseEventKind.APPROVED)
    _check(releases, release)
    data = release.manifest_json.encode()
    path = target_path(model, version)
    approver.trust.put_target(path, data)
    keys = _keys(approver, "approving")
    number = approver.trust.sign_targets(keys, add={path: data})
    _await_publication(approver, number, f"release {release.name}", wait_s)
    try:
        release = releases.record(ReleaseEventKind.APPROVED, model, version, who=approver.who, why=why)
    except ReleaseRefused:
        # Somebody retired it meanwhile, and may have taken it out before it was put in.
        approver.trust.sign_targets(keys, remove=[path])
        _published(approver)
        raise
    return Decision(release, published=True)


def retire(releases: Releases, model: str, version: int, approver: Approver, why: str) -> Decision:
    """Take a release out of the targets, so that no device begins it any more. A draft needs no key.

    Devices that run it go on until a rollout replaces it.

    Raises:
        ReleaseRefused: there is no such release, or a rollout that is under way names it.
        ConfigurationError: the key is not that of the targets, or nobody answers for it.
        StoreUnavailableError: the store did not answer; call again.
    """
    release = releases.look().get(model, version)
    _check_person(approver.who, why)
    _check_unused(releases, release)
    path = target_path(model, version)
    if approver.trust.is_signed(path):
        approver.trust.sign_targets(_keys(approver, "retiring"), remove=[path])
    release = releases.record(ReleaseEventKind.RETIRED, model, version, who=approver.who, why=why)
    return Decision(release, _published(approver))


def _check_person(who: str, why: str) -> None:
    """What lets devices run a model, or forbids it, has somebody who answers for it, and a reason that can be read."""
    if not who.strip() or len(who) > TEXT_MAX:
        raise ConfigurationError(f"who = {who[:80]!r} names nobody; say who does this (--by)")
    if not why.strip() or len(why) > TEXT_MAX:
        raise ConfigurationError(
            f"why = {why[:80]!r} is no reason; say why (--why) in 1 to {TEXT_MAX:,} characters: it stands in "
            "control/releases"
        )


def _check_unused(releases: Releases, release: Release) -> None:
    """Devices would refuse the orders of a rollout whose release is retired meanwhile, forward or back."""
    table = RolloutTable(lambda: ControlTable(releases.store, ROLLOUTS_PATH, ROLLOUTS_SCHEMA))
    rollout = table.look().active(release.model)
    if rollout is not None and release.version in (rollout.spec.version, rollout.spec.previous):
        use = "brings it to devices" if release.version == rollout.spec.version else "may take devices back to it"
        raise ReleaseRefused(
            f"release {release.name} cannot be retired: rollout {rollout.name!r} is {rollout.state}, and {use}; wait "
            "until it has ended, or abort it first"
        )


def _keys(approver: Approver, what: str) -> list[CryptoSigner]:
    if approver.targets is None:
        raise ConfigurationError(
            f"{what} a release needs the targets key, and targets.pem is not in the key folder; name the folder "
            "that has it with --keys"
        )
    return [approver.targets]


def _await_publication(approver: Approver, number: int, what: str, wait_s: float) -> None:
    if approver.online is not None:
        approver.trust.publish([approver.online])
        return
    waiting = threading.Event()
    ends_s = time.monotonic() + wait_s
    while approver.trust.published().targets_published < number:
        if time.monotonic() > ends_s:
            raise TemporaryError(
                f"{what} is signed, but no gateway published it within {wait_s:g} s; let one run with [models] "
                "online_key, then approve again"
            )
        waiting.wait(_LOOK_INTERVAL_S)


def _published(approver: Approver) -> bool:
    if approver.online is not None:
        approver.trust.publish([approver.online])
        return True
    return not approver.trust.is_behind()


def _check(releases: Releases, release: Release) -> None:
    """Everything a device would refuse is refused before it is signed."""
    data = release.manifest_json.encode()
    try:
        if hashlib.sha256(data).hexdigest() != release.manifest_sha256:
            raise CorruptLakeError(f"the manifest of {release.name} in control/releases is not that of its hash")
        manifest = msgspec.json.decode(data, type=Manifest)
        check_manifest(manifest)
        if (manifest.model, manifest.version) != (release.model, release.version):
            raise CorruptLakeError(f"its manifest is one of {manifest.model}@{manifest.version}")
        for artifact in release.artifacts:
            if len(releases.artifact(artifact.sha256)) != artifact.size:
                raise CorruptLakeError(f"artifact {artifact.sha256[:12]} has not {artifact.size} bytes")
    except (ConfigurationError, CorruptLakeError, ObjectMissingError, msgspec.MsgspecError) as error:
        raise ReleaseRefused(
            f"release {release.name} cannot be approved: {error}; retire it, and train and release once more"
        ) from error

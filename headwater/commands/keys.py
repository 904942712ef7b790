"""`headwater keys …`: the keys that releases are trusted by, and the trust repository in the lake."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.commands.options import Data, Json, Keys, Lake

if TYPE_CHECKING:
    from lake.store import Store
    from lake.trust.keys import KeyFolder
    from lake.trust.repository import TrustRepository

app = typer.Typer(name="keys", help="The keys that releases are trusted by.", no_args_is_help=True)


class Role(StrEnum):
    """A key that can be changed."""

    ROOT = "root"
    TARGETS = "targets"
    ONLINE = "online"


@app.command()
def init(
    lake: Lake = None,
    data: Data = None,
    keys: Keys = None,
    root_keys: Annotated[int, typer.Option("--root-keys", metavar="N", help="How many root keys to make.")] = 1,
    threshold: Annotated[
        int, typer.Option("--root-threshold", metavar="M", help="How many of them a change of keys needs.")
    ] = 1,
    json: Json = False,
) -> None:
    """Make root, targets and online key and the lake's trust repository. Running it again makes nothing anew.

    Keys are encrypted when $HEADWATER_KEY_PASSPHRASE is set, but for the online key, with which gateways start
    unattended. Devices get root.json, gateways online.pem and root.json; root and targets keys belong on no server.
    """
    with _opened(lake, data, keys) as (folder, store):
        from headwater.key_folder import make_keys

        _tell(folder, make_keys(folder, store, root_keys=root_keys, threshold=threshold), json)


@app.command()
def show(lake: Lake = None, data: Data = None, keys: Keys = None, json: Json = False) -> None:
    """Which keys are in force, which of them are here, and when signatures expire."""
    with _opened(lake, data, keys) as (folder, store):
        from lake.trust.repository import TrustRepository

        _tell(folder, TrustRepository(store, anchor=folder.anchor()), json)


@app.command()
def rotate(
    role: Annotated[Role, typer.Argument(metavar="root|targets|online", help="Which key to replace.")],
    lake: Lake = None,
    data: Data = None,
    keys: Keys = None,
    stolen: Annotated[
        bool,
        typer.Option(
            "--stolen",
            help="The old key is lost or known to others: it signs nothing more; of the releases signed with a stolen "
            "targets key, those stay that control/releases has as approved.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Replace a key: make a new one and put it into force, signed by the root keys. Can be repeated after any failure.

    The old key stays in the folder as ROLE.retired.pem until you delete it. After `online`, copy online.pem to every
    gateway; orders by the old key are refused from then on.
    """
    with _opened(lake, data, keys) as (folder, store):
        from lake.trust import rotation
        from lake.trust.repository import TrustRepository

        repository = _anchored(folder, store)
        roots = folder.read_roots()
        new = folder.make(f"{role}.next")
        old = None if stolen else folder.read_if_any(role)
        if role is Role.ONLINE:
            rotation.rotate_online(repository, roots, old, new)
        elif role is Role.TARGETS:
            keep = _approved(store) if stolen else None
            rotation.rotate_targets(repository, roots, old, new, folder.read_if_any("online"), keep)
        else:
            folder.write_anchor(rotation.rotate_root(repository, roots, roots[0], new))
        folder.adopt(role)
        _tell(folder, TrustRepository(store, anchor=folder.anchor()), json)


@app.command()
def renew(lake: Lake = None, data: Data = None, keys: Keys = None, json: Json = False) -> None:
    """Sign root and targets again with the same keys, for a new year; those whose key is here."""
    with _opened(lake, data, keys) as (folder, store):
        from lake.trust import rotation

        repository = _anchored(folder, store)
        if not (folder.has("root") or folder.has("targets")):
            raise ConfigurationError(f"{folder.path} has no root.pem or targets.pem; name their folder with --keys")
        if folder.has("root"):
            rotation.renew_root(repository, folder.read_roots())
        targets, online = folder.read_if_any("targets"), folder.read_if_any("online")
        if targets is not None:
            repository.sign_targets([targets], force=True)
        if online is not None:
            repository.publish([online])
        _tell(folder, repository, json)


@contextmanager
def _opened(lake: str | None, data: str | None, keys: str | None) -> Iterator[tuple[KeyFolder, Store]]:
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater keys"):
        from headwater.key_folder import find_keys
        from headwater.lake_access import opened_store

    with opened_store(lake, data, os.environ) as store:
        yield find_keys(keys, data, lake, os.environ), store


def _anchored(folder: KeyFolder, store: Store) -> TrustRepository:
    """The lake's repository, as the trust anchor beside the keys vouches for it."""
    from lake.trust.repository import TrustRepository

    anchor = folder.anchor()
    repository = TrustRepository(store, anchor=anchor)
    # Before anything is made: a lake that has no keys yet needs other help than a folder that lacks its anchor.
    repository.published()
    if anchor is None:
        raise ConfigurationError(
            f"{folder.anchor_path} is not there, and without the trust anchor a stranger's repository could be signed; "
            "copy it there from where `headwater keys init` wrote it"
        )
    return repository


def _approved(store: Store) -> dict[str, str]:
    """Target → SHA-256 of its manifest."""
    from contract.models import target_path
    from lake.releases import Releases, ReleaseState

    releases = Releases(store).look().releases.values()
    approved = (release for release in releases if release.state is ReleaseState.APPROVED)
    return {target_path(release.model, release.version): release.manifest_sha256 for release in approved}


def _tell(folder: KeyFolder, repository: TrustRepository, json: bool) -> None:
    answer = _described(folder, repository)
    if json:
        output.say_json(answer)
        return
    output.say_pairs({"keys": answer["keys"], "trust anchor": answer["anchor"], "root version": answer["root_version"]})
    members = ("role", "key", "here", "threshold", "expires")
    output.say_table(members, [[role[member] for member in members] for role in answer["roles"]])
    if answer["behind"]:
        output.say("Approvals wait for a gateway with the online key to publish them.")


def _described(folder: KeyFolder, repository: TrustRepository) -> dict[str, Any]:
    published = repository.published()
    here = set()
    for name in ("root", "targets", "online"):
        signers = folder.read_roots() if name == "root" and folder.has(name) else [folder.read_if_any(name)]
        here |= {signer.public_key.keyid for signer in signers if signer is not None}
    roles = []
    for part in published:
        named = published.root.roles[part.type]
        roles += [
            {
                "role": part.type,
                "key": keyid,
                "here": keyid in here,
                "threshold": named.threshold,
                "version": part.version,
                "expires": part.expires.isoformat(),
            }
            for keyid in named.keyids
        ]
    return {
        "keys": str(folder.path),
        "anchor": str(folder.anchor_path) if folder.anchor_path.exists() else None,
        "root_version": published.root.version,
        "behind": published.behind,
        "roles": roles,
    }

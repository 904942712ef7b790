"""`headwater release …`: what was trained, what may run on devices, and where it came from."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.commands.options import By, Data, Json, Keys, Lake, Why

if TYPE_CHECKING:
    from lake.approval import Approver, Decision
    from lake.releases import Releases

app = typer.Typer(name="release", help="Releases of models: look, compare, approve, retire.", no_args_is_help=True)

Named = Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="The release.")]


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Only this model.")] = None,
    stream: Annotated[
        str | None, typer.Option("--stream", metavar="STREAM", help="Only those trained on rows of this stream.")
    ] = None,
    committed: Annotated[
        int | None,
        typer.Option("--since", metavar="VERSION", help="With --stream: that read it at this Delta version or later."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="With --stream: whose table had rows of this device."),
    ] = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """The releases, newest first. With --stream: which releases came of these rows."""
    if stream is None and (committed is not None or device is not None):
        raise ConfigurationError("--since and --device narrow --stream; give --stream too")
    with _opened(lake, data) as releases:
        from headwater.release_view import line
        from lake.lineage import releases_from
        from lake.query import Lake as OpenLake
        from lake.releases import UnknownReleaseError

        book = releases.look()
        found = list(book.releases.values())
        if stream is not None:
            opened = OpenLake(releases.store) if device is not None else None
            try:
                found = releases_from(book, stream, committed=committed, device=device, lake=opened)
            finally:
                if opened is not None:
                    opened.close()
        if model is not None and not book.of_model(model):
            raise UnknownReleaseError(
                f"there is no release of a model {model[:80]!r}; `headwater release list` shows what there is"
            )
        found = [release for release in found if model in (None, release.model)]
        found.sort(key=lambda release: (release.model, -release.version))
        lines = [line(release) for release in found]
    if json:
        for answer in lines:
            output.say_json(answer)
        return
    columns = ("model", "version", "state", "family", "metrics", "created", "by", "why")
    output.say_table(columns, [[_short(answer[name]) for name in columns] for answer in lines], separators=False)


@app.command()
def show(
    release: Annotated[str, typer.Argument(metavar="MODEL[@VERSION]", help="The release; else the newest approved.")],
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """All about a release: what it is, what it came from, who decided what, and whether devices may believe it."""
    with _opened(lake, data) as releases:
        from contract.models import target_path
        from headwater.release_view import parse_release, whole
        from lake.lineage import lineage_of
        from lake.trust.repository import TrustRepository

        book = releases.look()
        found = book.get(*parse_release(release))
        path = target_path(found.model, found.version)
        signed = TrustRepository(releases.store).is_signed(path, found.manifest_sha256)
        answer = whole(found, lineage_of(book, found), signed=signed)
    if json:
        output.say_json(answer)
        return
    manifest = answer.pop("manifest")
    history = answer.pop("history")
    output.say_pairs(answer | {name: value for name, value in manifest.items() if name not in (*answer, "recipe")})
    output.say_table(("at", "event", "by", "why"), [list(event.values()) for event in history])
    output.say(manifest["recipe"])


@app.command()
def diff(
    old: Annotated[str, typer.Argument(metavar="MODEL@OLD", help="The release to compare with.")],
    new: Annotated[str, typer.Argument(metavar="MODEL@NEW", help="The other.")],
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """What changed between two releases: metrics, fields, window, data, packages, recipe."""
    with _opened(lake, data) as releases:
        from headwater.release_view import difference, parse_release

        book = releases.look()
        answer = difference(book.get(*parse_release(old)).manifest, book.get(*parse_release(new)).manifest)
    if json:
        output.say_json(answer)
        return
    rows: list[list[Any]] = []
    for part in ("metrics", "data", "changed", "packages"):
        rows += [[part, name, _short(then), _short(now)] for name, (then, now) in answer[part].items()]
    for change, names in answer["features"].items():
        if names:
            rows.append(["features", change, "", _short(names)])
    output.say_table(("part", "name", old, new), rows, separators=False)
    for text in answer["recipe"]:
        output.say(text)


@app.command()
def approve(
    release: Named,
    why: Why = "",
    by: By = None,
    keys: Keys = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Let devices believe a release: check everything it names, sign it with the targets key, record who and why.

    With online.pem beside it, it is in force at once; otherwise a gateway has to publish it, which is waited for.
    """
    from lake.approval import approve as decide

    with _opened(lake, data) as releases:
        from headwater.release_view import parse_release

        model, version = _exact(parse_release(release))
        _say(decide(releases, model, version, _approver(releases, keys, data, lake, by), why), json)


@app.command()
def retire(
    release: Named,
    why: Why = "",
    by: By = None,
    keys: Keys = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Let no device begin a release any more. Devices that run it do so until a rollout replaces it."""
    from lake.approval import retire as decide

    with _opened(lake, data) as releases:
        from headwater.release_view import parse_release

        model, version = _exact(parse_release(release))
        _say(decide(releases, model, version, _approver(releases, keys, data, lake, by), why), json)


@contextmanager
def _opened(lake: str | None, data: str | None) -> Iterator[Releases]:
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater release"):
        from headwater.lake_access import opened_store
        from lake.releases import Releases

    with opened_store(lake, data, os.environ) as store:
        yield Releases(store)


def _approver(releases: Releases, keys: str | None, data: str | None, lake: str | None, by: str | None) -> Approver:
    from headwater.key_folder import find_keys
    from lake.approval import Approver
    from lake.trust.repository import TrustRepository

    folder = find_keys(keys, data, lake, os.environ)
    return Approver(
        trust=TrustRepository(releases.store, anchor=folder.anchor()),
        targets=folder.read_if_any("targets"),
        online=folder.read_if_any("online"),
        who=by or getpass.getuser(),
    )


def _exact(release: tuple[str, int | None]) -> tuple[str, int]:
    model, version = release
    if version is None:
        raise ConfigurationError(f"{model!r} names no version; write {model}@VERSION (see: headwater release list)")
    return model, version


def _say(decision: Decision, json: bool) -> None:
    release = decision.release
    if json:
        output.say_json(
            {
                "model": release.model,
                "version": release.version,
                "state": str(release.state),
                "published": decision.published,
            }
        )
        return
    output.say(f"{release.name} is {release.state}.")
    if not decision.published:
        output.say("It is in force as soon as a gateway with the online key has published it.")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {output.shown(item)}" for name, item in value.items())
    return output.shown(value) if isinstance(value, float | list) else value

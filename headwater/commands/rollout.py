"""`headwater rollout …`: releases go to devices in stages. Acts by rows in the lake; no gateway needs to be asked."""

from __future__ import annotations

import getpass
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.commands.options import By, Data, Json, Lake, Why
from headwater.exits import Exit

if TYPE_CHECKING:
    from gateway.rollouts.actions import Action, Person
    from lake.rollouts import RolloutTable
    from lake.store import Store

app = typer.Typer(name="rollout", help="Releases go to devices in stages, watched, and back.", no_args_is_help=True)

Named = Annotated[str, typer.Argument(metavar="ROLLOUT", help="The rollout, as `rollout status` names it.")]
Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="A gateway, which knows the devices; else that of the stack in --data."),
]
Supersede = Annotated[bool, typer.Option("--supersede", help="Abort the rollout of this model that is under way.")]


@app.command()
def start(
    release: Annotated[
        str,
        typer.Argument(
            metavar="MODEL[@VERSION]|DRAFT", help="An approved release, else the newest; or a draft's name."
        ),
    ],
    stages: Annotated[
        str | None, typer.Option("--stages", metavar="LIST", help="Such as tag:canary,10%,50%,100%; else 10%,50%,100%.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="LIST", help="Only tag:NAME or device:NAME, …; else all devices.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", metavar="0..1", help="Of each stage, how many must commit; else 0.9.")
    ] = None,
    bake: Annotated[
        float | None, typer.Option("--bake", metavar="S", help="Seconds to watch each stage then; else 300.")
    ] = None,
    max_wait: Annotated[
        float | None, typer.Option("--max-wait", metavar="S", help="Seconds for each stage, at most; else 3600.")
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option("--guard", metavar="LIST", help="Such as error_share_max=0.01,latency_ms_p99_max=20."),
    ] = None,
    previous: Annotated[
        int | None,
        typer.Option(
            "--previous", metavar="VERSION", help="What a rollback assigns, 0 for none; else what was before."
        ),
    ] = None,
    approval: Annotated[bool, typer.Option("--approval", help="Begin only when somebody approves.")] = False,
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="FILE", help="Everything in a TOML file; options go before it.")
    ] = None,
    draft: Annotated[bool, typer.Option("--draft", help="Only create it; start it later by its name.")] = False,
    supersede: Supersede = False,
    why: Why = "",
    by: By = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Start a rollout of a release, or one that was drafted."""
    with _opened(lake, data) as (store, table):
        from gateway.rollouts.actions import Action, create, name_of
        from gateway.rollouts.ordering import specified
        from lake.releases import Releases

        if spec is None and "@" not in release and release in table.look().rollouts:
            given = (stages, to, share, bake, max_wait, guard, previous)
            if any(each is not None for each in given) or approval or draft:
                raise ConfigurationError(
                    f"{release} was drafted with its stages and limits, and starts as it is; leave the options out, or "
                    "start a rollout of the release"
                )
            _act(store, table, Action.START, release, by, why, json, supersede=supersede)
            return
        each = {"committed_share_min": share, "bake_s": bake, "max_wait_s": max_wait}
        options = {
            "stages": _listed(stages),
            "target": _listed(to),
            "previous": previous,
            "approval": approval or None,
        }
        raw = _written(spec, release, options, each, _guard(guard))
        order = specified(raw, Releases(store).look(), f"{spec}: " if spec else "")
        name = name_of(order, secrets.token_hex(3))
        book = table.act(create(name, order, _person(by, why), draft=draft, supersede=supersede))
        _say(book.get(name), json)


@app.command()
def status(
    rollout: Annotated[str | None, typer.Argument(metavar="ROLLOUT", help="Only this one; else all.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Until it has ended; exit status 1 if that is not success.")
    ] = False,
    url: Url = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """How rollouts are doing, newest first. A gateway also tells how the devices are; the lake alone does not."""
    if watch and rollout is None:
        raise ConfigurationError("--watch shows one rollout; name it, as `headwater rollout status` lists it")
    with _looking(url, lake, data) as look:
        from headwater.rollout_watch import say_rollouts
        from headwater.rollout_watch import watch as watch_until

        if watch and rollout is not None:
            if not watch_until(lambda: look(rollout)[0], json=json):
                raise typer.Exit(Exit.FAILED)
            return
        found = look(rollout)
        if not json:
            say_rollouts(found)
            return
        for each in found:
            output.say_json(each)


@app.command()
def pause(
    rollout: Named, why: Why = "", by: By = None, lake: Lake = None, data: Data = None, json: Json = False
) -> None:
    """Hand out no more orders for now. Devices that have one go on with it."""
    _do("pause", rollout, why, by, lake, data, json)


@app.command()
def resume(
    rollout: Named, why: Why = "", by: By = None, lake: Lake = None, data: Data = None, json: Json = False
) -> None:
    """Go on after a pause. The time of the pause counts for nothing."""
    _do("resume", rollout, why, by, lake, data, json)


@app.command()
def approve(
    rollout: Named, why: Why = "", by: By = None, lake: Lake = None, data: Data = None, json: Json = False
) -> None:
    """Let the stage begin that waits for it."""
    _do("approve", rollout, why, by, lake, data, json)


@app.command()
def abort(
    rollout: Named,
    rollback: Annotated[bool, typer.Option("--rollback", help="Also take the devices back.")] = False,
    why: Why = "",
    by: By = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """End it where it is. Devices that have the release keep it, unless --rollback is given."""
    _do("abort", rollout, why, by, lake, data, json, rollback=rollback)


@app.command()
def rollback(
    rollout: Named, why: Why = "", by: By = None, lake: Lake = None, data: Data = None, json: Json = False
) -> None:
    """Order every device that it reached to run what was there before. Also after it has succeeded."""
    _do("rollback", rollout, why, by, lake, data, json)


@app.command()
def history(
    rollout: Annotated[str | None, typer.Argument(metavar="ROLLOUT", help="Only this one; else all.")] = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Who did what to rollouts, when and why, oldest first."""
    with _opened(lake, data) as (_, table):
        from gateway.rollouts.telling import event_json

        if rollout is not None:
            table.look().get(rollout)
        found = [event_json(event) for event in table.history() if rollout in (None, event.rollout)]
    if json:
        for each in found:
            output.say_json(each)
        return
    columns = ("at", "rollout", "event", "who", "why")
    output.say_table(columns, [[each[name] for name in columns] for each in found], separators=False)


@contextmanager
def _opened(lake: str | None, data: str | None) -> Iterator[tuple[Store, RolloutTable]]:
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater rollout"):
        from headwater.lake_access import opened_store
        from lake.rollouts import PATH, SCHEMA, RolloutTable
        from lake.tables import ControlTable

    with opened_store(lake, data, os.environ) as store:
        table = ControlTable(store, PATH, SCHEMA)
        yield store, RolloutTable(lambda: table)


@contextmanager
def _looking(url: str | None, lake: str | None, data: str | None) -> Iterator[Any]:
    """What answers how one rollout is, or all: from a gateway where there is one, else from the lake."""
    with extras.imports("gateway", "headwater rollout"):
        from contract.errors import TemporaryError
        from gateway.rollouts.telling import detail_json, rollout_json
        from headwater.rollout_watch import asked, find_gateway, rollout_of, rollouts_of

    gateway = find_gateway(url, lake, data)
    if gateway is not None and url is None:
        try:
            asked(gateway, "/readyz")
        except (TemporaryError, ConfigurationError):
            gateway = None  # the stack is stopped: what it did is in the lake
    if gateway is not None:
        yield lambda name: rollouts_of(gateway) if name is None else [rollout_of(gateway, name)]
        return
    with _opened(lake, data) as (_, table):

        def look(name: str | None) -> list[dict[str, Any]]:
            book = table.look()
            if name is not None:
                return [detail_json(book.get(name))]
            return [rollout_json(each) for each in reversed(book.rollouts.values())]

        yield look


def _do(
    word: str,
    rollout: str,
    why: str,
    by: str | None,
    lake: str | None,
    data: str | None,
    json: bool,
    *,
    rollback: bool = False,
) -> None:
    with _opened(lake, data) as (store, table):
        from gateway.rollouts.actions import Action

        _act(store, table, Action(word), rollout, by, why, json, rollback=rollback)


def _act(
    store: Store,
    table: RolloutTable,
    action: Action,
    rollout: str,
    by: str | None,
    why: str,
    json: bool,
    *,
    rollback: bool = False,
    supersede: bool = False,
) -> None:
    from gateway.rollouts.actions import act
    from lake.releases import Releases

    releases = Releases(store).look()
    decide = act(action, rollout, _person(by, why), rollback=rollback, supersede=supersede, releases=releases)
    _say(table.act(decide).get(rollout), json)


def _person(by: str | None, why: str) -> Person:
    from gateway.rollouts.actions import Person

    return Person(by or getpass.getuser(), why, time.time_ns() // 1000)


def _say(rollout: Any, json: bool) -> None:
    from gateway.rollouts.telling import detail_json, rollout_json

    if json:
        output.say_json(detail_json(rollout))
        return
    found = rollout_json(rollout)
    output.say(f"{found['rollout']} is {found['state']}, stage {found['stage']} of {len(found['stages'])}")


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _guard(text: str | None) -> dict[str, float]:
    found = {}
    for part in _listed(text) or []:
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = int(number) if number.strip().isdigit() else float(number)
        except ValueError:
            raise ConfigurationError(f"--guard {part!r} is no limit; write error_share_max=0.01") from None
    return found


def _written(
    spec: Path | None, release: str, options: dict[str, Any], each: dict[str, float | None], guard: dict[str, float]
) -> dict[str, Any]:
    """The file's content with the options over it."""
    from contract.settings import read_toml
    from headwater.release_view import parse_release

    raw = {} if spec is None else read_toml(spec, "a rollout's specification")
    raw["model"], version = parse_release(release)
    if version is not None:
        raw["version"] = version
    raw |= {name: value for name, value in options.items() if value is not None}
    stage = dict(raw.get("stage", {})) | {name: value for name, value in each.items() if value is not None}
    if guard:
        stage["guard"] = dict(stage.get("guard", {})) | guard
    return raw | {"stage": stage}

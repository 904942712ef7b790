"""`headwater train watch`: waits for triggers and works them off, one after the other."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from contract.errors import TemporaryError
from headwater import output

if TYPE_CHECKING:
    from lake.monitoring.triggers import TriggerTable
    from lake.releases import Release
    from lake.store import Store
    from trainer.retrain import Contexts, Outcome, Retrainer
    from trainer.steps import StepContext

WHO = "headwater train watch"
RETRY_MAX_S = 60.0


def worker_name() -> str:
    """Unlike that of any other process."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"


def make_retrainer(model: str, contexts: Contexts, store: Store, lease_s: float, stop: threading.Event) -> Retrainer:
    """Wire it: triggers of a store, rollouts by the recipe.

    Args:
        model: name of the recipe.
        contexts: opens one training.
        store: where the triggers are.
        lease_s: how long a claim holds that is not renewed.
        stop: begin nothing more once it is set.
    """
    from lake.monitoring.triggers import PATH, SCHEMA, TriggerTable
    from lake.tables import ControlTable
    from trainer.retrain import Retrainer

    who = worker_name()

    def tables() -> TriggerTable:
        table = ControlTable(store, PATH, SCHEMA)
        return TriggerTable(lambda: table, who, lambda: time.time_ns() // 1000)

    return Retrainer(model, contexts, tables, lease_s, start_rollout, stop)


def start_rollout(context: StepContext, release: Release, why: str) -> str:
    """Start the rollout of a release by the stages of its recipe, over one of its model that is under way.

    Raises:
        ConfigurationError: the stages cannot be.
        StoreUnavailableError: the store did not answer.
    """
    from gateway.rollouts.actions import Person, create, name_of
    from gateway.rollouts.ordering import specified
    from lake.releases import Releases
    from lake.rollouts import PATH, SCHEMA, RolloutTable
    from lake.tables import ControlTable

    table = ControlTable(context.store, PATH, SCHEMA)
    raw = rollout_of(context, release)
    spec = specified(raw, Releases(context.store).look(), f"[rollout] of {context.recipe.name}: ")
    name = name_of(spec, secrets.token_hex(3))
    person = Person(WHO, why[:500], time.time_ns() // 1000)
    return RolloutTable(lambda: table).act(create(name, spec, person, supersede=True)).get(name).name


def rollout_of(context: StepContext, release: Release) -> dict[str, Any]:
    """The recipe's `[rollout]` and `[trial]` in the words of a rollout's specification."""
    from trainer.recipe import stage_tables

    stages = stage_tables(context.recipe.rollout)
    trial = msgspec.to_builtins(context.recipe.trial)
    return {"model": release.model, "version": release.version, "stages": stages, "trial": trial}


def watch(retrainer: Retrainer, interval_s: float, stop: threading.Event, say: Callable[[Outcome], None]) -> None:
    """Work off triggers until a stop is asked for; a lake that does not answer is asked again, later and later."""
    failures = 0
    while not stop.is_set():
        try:
            outcome = retrainer.take()
            failures = 0
        except TemporaryError as error:
            failures += 1
            output.complain(f"waiting: {error}")
            stop.wait(min(RETRY_MAX_S, interval_s * 2.0 ** min(failures, 10)))
            continue
        if outcome is None:
            stop.wait(interval_s)
        else:
            say(outcome)


def sayer(*, json: bool) -> Callable[[Outcome], None]:
    """How an outcome is told."""

    def say(outcome: Outcome) -> None:
        if json:
            output.say_json(outcome)
            return
        version = "" if outcome.version is None else f"@{outcome.version}"
        output.say(f"{outcome.trigger}: {outcome.model}{version} {outcome.outcome}; {outcome.why or outcome.rollout}")

    return say

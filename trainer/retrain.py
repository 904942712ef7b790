"""Learning again: takes a trigger, trains on the data of now, and releases what is not worse than what is at work.

The candidate and the current release answer the same held-out windows of the new dataset, both as the ONNX files that
devices run. Only if the candidate is at least as good, by the recipe's metric and but for its tolerance, it becomes a
release, in DRAFT; approving it and rolling it out follow where the recipe's policy says so and the keys are at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from contract.errors import HeadwaterError, TemporaryError
from contract.models import Manifest
from lake.monitoring.triggers import ClaimLost, Trigger, TriggerEvent, TriggerTable
from lake.releases import Release, Releases, ReleaseState
from lake.rollouts import PATH as ROLLOUTS_PATH
from lake.rollouts import SCHEMA as ROLLOUTS_SCHEMA
from lake.rollouts import RolloutTable
from lake.tables import ControlTable
from trainer.approval import approver_of
from trainer.candidates import find_scorer, metric_of
from trainer.errors import DataError
from trainer.export import ONNX_FILE
from trainer.faults import inject, spread
from trainer.pipeline import EXPORT, RELEASE, STEPS
from trainer.runtime import open_session, run_model
from trainer.steps import StepContext, run_step
from trainer.tracking import check_installed
from trainer.windowset import WindowSet

_log = structlog.get_logger()

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

CLAIMS_MAX = 5
"""A training that ended so often without a word, such as for lack of memory, is given up."""
RENEWALS = 4
"""Within the time that a claim holds."""
JUDGED_MAX = 50_000
"""Windows that both answer, drawn evenly."""

Contexts = Callable[[], AbstractContextManager[StepContext]]
"""Opens the work folder and the lake for one training."""
StartRollout = Callable[[StepContext, Release, str], str]
"""Starts the rollout of an approved release for a reason, by the stages of its recipe; gives its name."""
Tables = Callable[[], TriggerTable]
"""Opens `control/triggers`, always under the same name; each thread has its own."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The candidate and the current release before the same windows."""

    metric: str
    windows: int
    candidate: float
    current: float
    tolerance: float

    @property
    def is_good(self) -> bool:
        """Whether the candidate is at least as good."""
        return self.candidate >= self.current - self.tolerance


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a trigger. `outcome` is a contract: `released`, `approved`, `rolling_out`, `worse`, `unchanged`,
    `failed`, `given_up`, `lost`."""

    trigger: str
    outcome: str
    why: str
    model: str
    version: int | None = None
    comparison: Comparison | None = None
    rollout: str | None = None


class _Stopped(Exception):
    """A stop was asked for."""


class Claim:
    """Holds a trigger while a training goes on: a thread renews it."""

    def __init__(self, tables: Tables, trigger: Trigger, lease_s: float) -> None:
        self._tables, self._trigger, self._lease_s = tables, trigger, lease_s
        self._over = threading.Event()
        self.lost = ""
        """Why it is not ours any more."""
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Before anything that others see: renews, for the machine may have stood still since the thread did.

        Raises:
            ClaimLost: somebody else has it.
            TemporaryError: the lake did not answer.
        """
        if self.lost:
            raise ClaimLost(self.lost)
        self._tables().renew(self._trigger.name, self._lease_s)

    def _run(self) -> None:
        table = self._tables()
        while not self._over.wait(self._lease_s / RENEWALS):
            try:
                table.renew(self._trigger.name, self._lease_s)
            except ClaimLost as error:
                self.lost = str(error)
                return
            except TemporaryError as error:
                # The claim runs on; there are more attempts before it is over.
                _log.warning("claim_not_renewed", trigger=self._trigger.name, error=str(error))


class Retrainer:
    """Works off the triggers of one model.

    Args:
        model: name of the recipe.
        contexts: opens one training.
        tables: opens the triggers.
        lease_s: a claim that is not renewed for so long is another's to take.
        start_rollout: None where nothing is rolled out.
        stop: no further trigger or step is begun once it is set.
    """

    def __init__(
        self,
        model: str,
        contexts: Contexts,
        tables: Tables,
        lease_s: float,
        start_rollout: StartRollout | None,
        stop: threading.Event,
    ) -> None:
        self._model, self._contexts, self._tables = model, contexts, tables
        self._lease_s, self._start_rollout, self._stop = lease_s, start_rollout, stop

    def take(self) -> Outcome | None:
        """Claim the oldest trigger and work it off; None where there is none, or a stop was asked for.

        Raises:
            TemporaryError: something did not answer, and the trigger is given back. Where that was the lake, the claim
                is left to run out.
        """
        if self._stop.is_set():
            return None
        table = self._tables()
        trigger = table.claim(self._model, self._lease_s)
        if trigger is None:
            return None
        try:
            if trigger.claims > CLAIMS_MAX:
                why = f"it was begun {CLAIMS_MAX} times and never came to an end"
                return self._finish(table, self._outcome(trigger, "given_up", why))
            with Claim(self._tables, trigger, self._lease_s) as claim:
                outcome = self._train(trigger, claim)
            return self._finish(table, outcome)
        except ClaimLost as error:
            return self._outcome(trigger, "lost", str(error))
        except _Stopped:
            table.give_back(trigger.name, "the trainer was stopped")
            return None
        except TemporaryError as error:
            table.give_back(trigger.name, str(error))
            raise

    def _finish(self, table: TriggerTable, outcome: Outcome) -> Outcome:
        failed = outcome.outcome in ("failed", "given_up")
        detail = msgspec.to_builtins(outcome)
        event = TriggerEvent.FAILED if failed else TriggerEvent.DONE
        table.finish(outcome.trigger, event, outcome.why, detail)
        return outcome

    def _train(self, trigger: Trigger, claim: Claim) -> Outcome:
        try:
            with self._contexts() as context:
                return self._steps(context, trigger, claim)
        except (TemporaryError, ClaimLost):
            raise
        except HeadwaterError as error:
            return self._outcome(trigger, "failed", str(error))

    def _steps(self, context: StepContext, trigger: Trigger, claim: Claim) -> Outcome:
        # What will not do is told now, not after hours of training.
        approver_of(context)
        check_installed()
        for step in STEPS.values():
            if step is RELEASE:
                break
            if self._stop.is_set():
                raise _Stopped
            run_step(context, step)
            claim.check()
        releases = Releases(context.store)
        book = releases.look()
        current = next((one for one in book.of_model(self._model) if one.state is ReleaseState.APPROVED), None)
        comparison = None
        if current is not None:
            if current.manifest.artifact.sha256 == context.outputs(EXPORT.name)["model"]["sha256"]:
                if self._may_roll_out(context) and not _was_rolled_out(context, current):
                    # Whoever approved it was stopped before the next act.
                    return self._rolled_out(context, current, trigger, {"version": current.version})
                why = f"the training gave {current.name} again, to the bit"
                return self._outcome(trigger, "unchanged", why, version=current.version)
            comparison = compare(context, releases, current.manifest)
        if comparison is not None and not comparison.is_good:
            why = (
                f"{comparison.metric} {comparison.candidate:.4f} on {comparison.windows} held-out windows, the current "
                f"release has {comparison.current:.4f}"
            )
            return self._outcome(trigger, "worse", why, comparison=comparison)
        if current is not None and comparison is None:
            # Nobody has compared them, so a person must decide.
            policy = msgspec.structs.replace(context.recipe.policy, approve=False, rollout=False)
            context = replace(context, recipe=msgspec.structs.replace(context.recipe, policy=policy))
        claim.check()
        return self._released(context, releases, trigger, comparison)

    def _released(
        self, context: StepContext, releases: Releases, trigger: Trigger, comparison: Comparison | None
    ) -> Outcome:
        said = run_step(context, RELEASE).record.outputs
        version = int(said["version"])
        common: dict[str, Any] = {"version": version, "comparison": comparison}
        if said["state"] != ReleaseState.APPROVED:
            return self._outcome(trigger, "released", f"a draft: {said['not_approved']}", **common)
        if not self._may_roll_out(context):
            return self._outcome(trigger, "approved", "[policy] rollout is not set", **common)
        return self._rolled_out(context, releases.look().get(self._model, version), trigger, common)

    def _may_roll_out(self, context: StepContext) -> bool:
        return context.recipe.policy.rollout and self._start_rollout is not None

    def _rolled_out(self, context: StepContext, release: Release, trigger: Trigger, common: dict[str, Any]) -> Outcome:
        assert self._start_rollout is not None
        try:
            rollout = self._start_rollout(context, release, f"trigger {trigger.name}: {trigger.why}")
        except TemporaryError:
            raise
        except HeadwaterError as error:
            return self._outcome(trigger, "approved", f"its rollout could not be started: {error}", **common)
        return self._outcome(trigger, "rolling_out", "", rollout=rollout, **common)

    def _outcome(self, trigger: Trigger, outcome: str, why: str, **rest: Any) -> Outcome:
        return Outcome(trigger=trigger.name, outcome=outcome, why=why, model=self._model, **rest)


def _was_rolled_out(context: StepContext, release: Release) -> bool:
    table = ControlTable(context.store, ROLLOUTS_PATH, ROLLOUTS_SCHEMA)
    book = RolloutTable(lambda: table).look()
    return any(rollout.spec.version == release.version for rollout in book.of_model(release.model))


def compare(context: StepContext, releases: Releases, current: Manifest) -> Comparison | None:
    """Ask the exported candidate and the current release about the held-out windows of the new dataset.

    Returns:
        None where they eat different windows or fields, and cannot be compared.

    Raises:
        DataError: there is no held-out window that could judge.
        TrainingError: the metric is not defined there.
        StoreUnavailableError: the store did not answer.
    """
    recipe, dataset = context.recipe, context.windows()
    alike = (recipe.window, recipe.data.fields, recipe.data.stream, recipe.task)
    if alike != (current.window, current.fields, current.stream, current.task):
        return None
    rows = context.split().test
    if recipe.task == "classification" and dataset.labels is not None:
        rows = rows[dataset.labels[rows] != ""]
    if not len(rows):
        raise DataError("no held-out window can judge the candidate; bring labels for newer data")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), JUDGED_MAX)).astype(np.int64)]
    candidate = (context.folder(EXPORT.name) / ONNX_FILE).read_bytes()
    exported = context.outputs(EXPORT.name)
    found = []
    for data, classes, threshold in (
        (candidate, tuple(exported["classes"]), exported["threshold"]),
        (releases.artifact(current.artifact.sha256), current.classes, current.threshold),
    ):
        found.append(_metric(context, dataset, rows, data, classes, threshold))
    return Comparison(
        metric=recipe.search.metric,
        windows=len(rows),
        candidate=found[0],
        current=found[1],
        tolerance=recipe.policy.retrain.tolerance,
    )


def _metric(
    context: StepContext, dataset: WindowSet, rows: Int64s, data: bytes, classes: tuple[str, ...], threshold: Any
) -> float:
    session, metric = open_session(data), context.recipe.search.metric
    scorer = find_scorer(metric)
    windows = dataset.windows[rows]
    if context.recipe.task == "classification" and dataset.labels is not None:
        # Of all classes that either has heard of, so that one which lacks a class has it wrong, not undefined.
        names = tuple(sorted({*dataset.classes, *classes}))
        scores = np.zeros((len(rows), len(names)), dtype=np.float32)
        scores[:, [names.index(name) for name in classes]] = run_model(session, windows).score
        place = {name: number for number, name in enumerate(names)}
        truth = np.array([place[name] for name in dataset.labels[rows].tolist()], dtype=np.int64)
        return metric_of(scores, truth, None, scorer, metric, "the release")
    faulty = inject(windows, spread(dataset.pieces(context.split().train)), context.seed)
    answers = np.concatenate([run_model(session, windows).score, run_model(session, faulty).score])
    truth = np.repeat(np.array([0, 1], dtype=np.int64), len(rows))
    return metric_of(answers, truth, threshold, scorer, metric, "the release")

"""The step `release`: what was exported and evaluated becomes a release in the lake, in DRAFT.

Where the recipe's policy says so, the targets are met and the offline keys are at hand, it is approved at once. Keys
that cannot approve are refused before anything is published.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import msgspec

from contract.models import Artifact, Dataset, Manifest, Metric, Probe, Window
from lake.approval import Approver, approve
from lake.releases import Releases, put_files
from trainer.approval import WHO, approver_of
from trainer.errors import TrainingError
from trainer.provenance import packages
from trainer.steps import Outputs, StepContext

Read = TypeVar("Read")


class ExportedFile(msgspec.Struct, frozen=True):
    """A file in the folder of the step `export`."""

    file: str
    score_tolerance: float = 0.0
    """Of the probe."""


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the step `export` has to say; it may say more."""

    task: str
    family: str
    stream: str
    fields: tuple[str, ...]
    dtypes: tuple[str, ...]
    window: Window
    sample_rate_hz: float | None
    classes: tuple[str, ...]
    threshold: float | None
    features: tuple[str, ...]
    opset: int
    ir: int
    model: ExportedFile
    probe: ExportedFile
    reference: ExportedFile


class DatasetResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the step `dataset` has to say."""

    streams: dict[str, int]
    sha256: str
    windows: int


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A metric of the evaluation; its value is None where it is not a number."""

    name: str
    value: float | None
    split: str


class EvaluateResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the step `evaluate` has to say."""

    metrics: tuple[Figure, ...]

    def shortfall(self, metric: str, target: float | None) -> str:
        """Why a target is not met by the held-out windows; empty where it is."""
        if target is None:
            return "[search] target is not set"
        value = next((figure.value for figure in self.metrics if figure.name == metric), None)
        if value is None:
            return f"the evaluation has no figure for the target's metric {metric}"
        return "" if value >= target else f"{metric} is {value:.4f} on held-out windows, below the target {target:g}"


def step(context: StepContext) -> Outputs:
    """Put artifacts, manifest and row into the lake; approve where the policy allows.

    Raises:
        TrainingError: an earlier step said what no manifest can hold.
        ConfigurationError: the manifest cannot be, or the keys are not the right ones; nothing is published.
        TemporaryError: it is signed, but no gateway has published that; run the step again.
        StoreUnavailableError: the store did not answer; run the step again.
    """
    exported = _said(context, "export", ExportResult)
    evaluated = _said(context, "evaluate", EvaluateResult)
    approver, why_not = _approver(context, evaluated)
    releases = Releases(context.store)
    folder = context.folder("export")
    files = {name: folder / getattr(exported, name).file for name in ("model", "probe", "reference")}
    with context.progress.track("publishing", len(files) + 1) as done:
        artifacts = put_files(releases, files)
        done(len(files))
        draft = manifest_of(context, exported, evaluated, artifacts, _parent(releases, context.recipe.name))
        release = releases.publish(draft, who=WHO, why=f"recipe {context.recipe.name}, code {context.code}")
        done(1)
    if approver is not None:
        release = approve(
            releases, release.model, release.version, approver, "policy of the recipe: target met"
        ).release
    return {
        "model": release.model,
        "version": release.version,
        "state": str(release.state),
        "not_approved": why_not,
        "sha256": release.manifest.artifact.sha256,
        "manifest_sha256": release.manifest_sha256,
        "parent": release.manifest.parent,
        "metrics": [msgspec.to_builtins(metric) for metric in release.manifest.metrics],
    }


def manifest_of(
    context: StepContext,
    exported: ExportResult,
    evaluated: EvaluateResult,
    artifacts: dict[str, Artifact],
    parent: int | None,
) -> Manifest:
    """The manifest; its version is given when it is published.

    Raises:
        TrainingError: the step `dataset` said what no manifest can hold.
    """
    dataset = _said(context, "dataset", DatasetResult)
    try:
        return Manifest(
            model=context.recipe.name,
            version=1,
            artifact=artifacts["model"],
            task=exported.task,
            stream=exported.stream,
            fields=exported.fields,
            dtypes=exported.dtypes,
            window=exported.window,
            sample_rate_hz=exported.sample_rate_hz,
            classes=exported.classes,
            threshold=exported.threshold,
            features=exported.features,
            opset=exported.opset,
            ir=exported.ir,
            family=exported.family,
            metrics=tuple(
                Metric(name=figure.name, value=figure.value, split=figure.split)
                for figure in evaluated.metrics
                if figure.value is not None
            ),
            dataset=msgspec.convert(msgspec.to_builtins(dataset), Dataset),
            recipe=context.recipe_text,
            code=context.code,
            seed=context.seed,
            packages=packages(),
            limits=context.recipe.limits,
            probe=Probe(artifact=artifacts["probe"], score_tolerance=exported.probe.score_tolerance),
            reference=artifacts["reference"],
            parent=parent,
            created_at_us=time.time_ns() // 1000,
        )
    except msgspec.ValidationError as error:
        raise TrainingError(f"the dataset cannot stand in a manifest ({error}); run the step dataset again") from error


def _said(context: StepContext, step: str, kind: type[Read]) -> Read:
    outputs: dict[str, Any] = context.outputs(step)
    try:
        return msgspec.convert(outputs, kind)
    except msgspec.ValidationError as error:
        raise TrainingError(
            f"the step {step} did not say what a release needs ({error}); run it again with this version: headwater "
            f"train {step} RECIPE --force"
        ) from error


def _parent(releases: Releases, model: str) -> int | None:
    """The newest approved version: that which the new one is trained to replace."""
    versions = releases.approved(model)
    return versions[-1] if versions else None


def _approver(context: StepContext, evaluated: EvaluateResult) -> tuple[Approver | None, str]:
    """Who approves at once; None, and why not."""
    if not context.recipe.policy.approve:
        return None, "[policy] approve is not set"
    search = context.recipe.search
    if shortfall := evaluated.shortfall(search.metric, search.target):
        return None, shortfall
    approver = approver_of(context)
    return approver, "no --keys were given" if approver is None else ""

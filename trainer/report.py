"""The evaluation as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer import plots
from trainer.candidates import Trained
from trainer.evaluation import Evaluation, anomalies
from trainer.figures import AlarmFigures, ClassificationFigures
from trainer.material import Material
from trainer.provenance import packages
from trainer.split import Split
from trainer.steps import StepContext
from trainer.trials import SearchResult

TRIALS_SHOWN_MAX = 30
DEVICES_SHOWN_MAX = 3
"""Timelines of a detector."""
FEW = 10
"""Labelled stretches below which a share of them says little."""
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; background: #fff; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #4b5563; margin-top: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } td:first-child { white-space: nowrap; }
th { color: #4b5563; font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; }
figcaption { color: #4b5563; max-width: 33rem; }
p { overflow-wrap: anywhere; } td.words { text-align: left; }
.ok { color: #15803d; } .warn { color: #b45309; } .fail { color: #b91c1c; }
svg { max-width: 100%; height: auto; } pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def write_report(
    path: Path,
    context: StepContext,
    evaluation: Evaluation,
    result: SearchResult,
    trained: Trained,
    material: Material,
    split: Split,
) -> None:
    """Write the page.

    Raises:
        OSError: the disk refused.
    """
    parts = [
        _head(evaluation),
        _said(evaluation, result),
        _figures(evaluation),
        _plots(context, evaluation, result, trained, material, split),
        _search(result),
        _checks(context),
        _lineage(context, evaluation),
    ]
    title = escape(f"{evaluation.recipe}: evaluation")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_CSS}</style></head>\n<body>\n{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _head(evaluation: Evaluation) -> str:
    lead = (
        f"{evaluation.task}, family {evaluation.family}; {evaluation.train_windows} windows to train, "
        f"{evaluation.test_windows} to judge ({evaluation.split})"
    )
    return f'<h1>{escape(evaluation.recipe)}</h1><p class="lead">{escape(lead)}</p>\n'


def _said(evaluation: Evaluation, result: SearchResult) -> str:
    """In sentences, with what the figures cannot say."""
    said = []
    scored = [trial for trial in result.trials if trial.score is not None]
    folds = result.best.folds
    if folds:
        said.append(
            f"Chosen of {len(scored)} candidates by {result.metric} in cross-validation: {_cell(result.best.score)} "
            f"(folds from {min(folds):.3g} to {max(folds):.3g}). The best of many is flattered by that choice; the "
            "windows below had no part in it."
        )
    if (figures := evaluation.classification) is not None:
        shares = [one.accuracy for one in evaluation.devices if one.accuracy is not None]
        if shares:
            said.append(
                f"{figures.accuracy:.1%} of {figures.windows} judged windows are right; of single devices from "
                f"{min(shares):.1%} to {max(shares):.1%} ({len(shares)} devices). Windows overlap and devices differ: "
                "the number of devices, not of windows, says how much the figure can be trusted."
            )
    elif (alarms := evaluation.alarms) is not None:
        low, high = alarms.false_alarms_per_month_95
        said.append(
            f"Judged windows: {alarms.found} of {alarms.labelled} labelled stretches found; false alarms: "
            f"{alarms.false_alarms} in {alarms.months:.2g} months, {alarms.false_alarms_per_month:.2g} a month (95 % "
            f"confidence: {low:.2g} to {high:.2g})."
        )
        if (unseen := evaluation.alarms_unseen) is not None:
            said.append(
                f"All windows that were answered by a model fitted without them, those of the folds included: "
                f"{unseen.found} of {unseen.labelled} found; false alarms: {unseen.false_alarms} in "
                f"{unseen.months:.2g} months. The row of all windows counts those, too, that the model was fitted with."
            )
        if alarms.labelled < FEW:
            said.append(
                f"Labelled stretches that judge: {alarms.labelled}, which is few: one more or less would change the "
                "picture."
            )
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in said)


def _figures(evaluation: Evaluation) -> str:
    if (figures := evaluation.classification) is not None:
        rows = [_class_row("chosen model", figures)]
        rows += [_class_row(one.name, one.classification) for one in evaluation.baselines if one.classification]
        class_table = ("", "accuracy", "macro-F1", "balanced", "ROC AUC", "PR AUC", "log-loss", "calibration error")
        classes = [
            (one.name, one.windows, one.precision, one.recall, one.f1, one.roc_auc, one.average_precision)
            for one in figures.classes
        ]
        class_heads = ("class", "windows", "precision", "recall", "F1", "ROC AUC", "PR AUC")
        return f"<h2>Figures</h2>{_table(class_table, rows)}<h2>Classes</h2>{_table(class_heads, classes)}\n"
    rows = []
    for name, judged, unseen, everything in [
        ("chosen model", evaluation.alarms, evaluation.alarms_unseen, evaluation.alarms_all),
        *((one.name, one.alarms, one.alarms_unseen, one.alarms_all) for one in evaluation.baselines),
    ]:
        rows += [
            _alarm_row(f"{name}: judged windows", judged),
            _alarm_row(f"{name}: all unseen windows", unseen),
            _alarm_row(f"{name}: all windows", everything),
        ]
    heads = ("", "labelled", "found", "alarms", "false", "months", "false a month", "95 %", "ROC AUC", "PR AUC")
    return f"<h2>Figures</h2>{_table(heads, rows)}\n"


def _class_row(name: str, figures: ClassificationFigures) -> tuple[object, ...]:
    return (
        name,
        figures.accuracy,
        figures.f1_macro,
        figures.balanced_accuracy,
        figures.roc_auc_macro,
        figures.average_precision_macro,
        figures.log_loss,
        figures.calibration_error,
    )


def _alarm_row(name: str, figures: AlarmFigures | None) -> tuple[object, ...]:
    if figures is None:
        return (name,)
    return (
        name,
        figures.labelled,
        figures.found,
        figures.alarms,
        figures.false_alarms,
        figures.months,
        figures.false_alarms_per_month,
        "\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}".join(f"{bound:.2g}" for bound in figures.false_alarms_per_month_95),
        figures.roc_auc,
        figures.average_precision,
    )


def _plots(
    context: StepContext,
    evaluation: Evaluation,
    result: SearchResult,
    trained: Trained,
    material: Material,
    split: Split,
) -> str:
    shown: list[tuple[str, str]] = []
    if (figures := evaluation.classification) is not None and material.labels is not None:
        test = split.test[material.labels[split.test] >= 0]
        scores = trained.scores(material.features[test])
        roc, precision = plots.class_curves(scores, material.labels[test], material.classes)
        shown += [
            ("Confusion", plots.confusion(figures)),
            ("ROC, each class against the rest", roc),
            ("Precision and recall", precision),
            ("Calibration", plots.calibration(figures)),
        ]
    else:
        shown += _timelines(context, trained, material, split)
    shown.append(("Devices", plots.devices(evaluation.devices)))
    if evaluation.curve:
        shown.append(("Learning curve", plots.learning_curve(evaluation.curve, evaluation.metric)))
    shown.append(
        (
            "Features that moved most (beyond the line: another distribution than in training)",
            plots.drift(evaluation.drift),
        )
    )
    shown.append(("Search", plots.history(result.trials, result.metric)))
    inside = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in shown)
    return f'<h2>Plots</h2><div class="plots">{inside}</div>\n'


def _timelines(context: StepContext, trained: Trained, material: Material, split: Split) -> list[tuple[str, str]]:
    dataset = context.windows()
    labelled = anomalies(dataset, context.recipe)
    judged = np.zeros(len(dataset), dtype=np.bool_)
    judged[split.test] = True
    scores = trained.scores(material.features)
    found = []
    for device in _telling(dataset.devices, labelled, scores > (trained.threshold or 0.0)):
        mine = np.flatnonzero(dataset.devices == device)
        drawn = plots.timeline(
            dataset.ends_us[mine], scores[mine], trained.threshold or 0.0, labelled[mine], judged[mine]
        )
        found.append((f"Score of {device}", drawn))
    truth = labelled[split.test]
    if truth.any() and not truth.all():
        roc, precision = plots.curves([("labelled windows", scores[split.test], truth)])
        found += [("ROC, judged windows", roc), ("Precision and recall, judged windows", precision)]
    return found


def _telling(
    devices: npt.NDArray[np.str_], labelled: npt.NDArray[np.bool_], flagged: npt.NDArray[np.bool_]
) -> list[str]:
    """The devices with the most labelled windows, and of these with the most above the threshold."""
    names, place = np.unique(devices, return_inverse=True)
    counts = [np.bincount(place, weights=marked, minlength=len(names)) for marked in (labelled, flagged)]
    order = np.lexsort((names, -counts[1], -counts[0]))
    return [str(names[number]) for number in order[:DEVICES_SHOWN_MAX]]


def _search(result: SearchResult) -> str:
    ordered = sorted(result.trials, key=lambda trial: -np.inf if trial.score is None else trial.score, reverse=True)
    rows = [
        (
            trial.candidate.family,
            trial.state if trial.tuned else f"{trial.state}, as it comes",
            trial.score,
            ", ".join(f"{name}={_cell(value)}" for name, value in trial.candidate.params.items()),
            trial.error,
        )
        for trial in ordered[:TRIALS_SHOWN_MAX]
    ]
    told = f"{len(result.trials)} trials, stopped at {result.stopped}; {len(result.features)} features chosen."
    table = _table(("family", "state", result.metric, "parameters", "error"), rows)
    return f"<h2>Search</h2><p>{escape(told)}</p>{table}<p>Features: {escape(', '.join(result.features))}</p>\n"


def _checks(context: StepContext) -> str:
    outputs = context.outputs("checks")
    rows = "".join(
        f'<tr><td>{escape(one["check"])}</td><td class="words {escape(one["verdict"])}">{escape(one["verdict"])}</td>'
        f'<td class="words">{escape(one["detail"])} {escape(one["remedy"])}</td></tr>'
        for one in outputs.get("findings", ())
    )
    return f"<h2>Data checks</h2><table><tbody>{rows}</tbody></table>\n"


def _lineage(context: StepContext, evaluation: Evaluation) -> str:
    dataset = context.windows()
    rows: list[tuple[object, ...]] = [
        (f"Delta version of {stream}", version) for stream, version in sorted(dataset.meta.streams.items())
    ]
    rows += [("windows, SHA-256", dataset.sha256()), ("code", context.code), ("seed", context.seed)]
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages().items())))
    recipe = f"<pre>{escape(context.recipe_text)}</pre>" if context.recipe_text else ""
    return f"<h2>Where it comes from</h2>{_table(('', ''), rows)}<h2>Recipe</h2>{recipe}\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The plots of the report: figures in, SVG text out. Nothing here decides anything."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn import metrics

from trainer.evaluation import CurvePoint, DeviceFigures, Drift
from trainer.figures import ClassificationFigures
from trainer.trials import TrialResult

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

BARS_MAX = 40
POINTS_MAX = 400
"""Of one curve: a report of some hundred kilobytes."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headwater",  # the same figures give the same file
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
_BLUE, _GREY, _RED = "#2563eb", "#9ca3af", "#dc2626"


def _figure(width: float = 5.2, height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "headwater"}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def confusion(figures: ClassificationFigures) -> str:
    """Truth against answer, in shares of the truth, with numbers of windows."""
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        names = [one.name for one in figures.classes]
        counts = np.array(figures.confusion)
        shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        side = max(3.2, 0.55 * len(names) + 1.4)
        figure, axes = _figure(side + 0.4, side)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("answer")
        axes.set_ylabel("truth")
        if len(names) <= BARS_MAX:
            for row, column in np.ndindex(counts.shape):
                ink = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=ink, fontsize=8)
        return _svg(figure)


def class_curves(scores: Float32s, truth: Int64s, names: Sequence[str]) -> tuple[str, str]:
    """ROC and precision-recall, each class against the rest.

    Args:
        scores: `[N, K]`.
        truth: `[N]`, indices of `names`.
        names: of the `K` columns.
    """
    return curves([(name, scores[:, number], truth == number) for number, name in enumerate(names)])


def curves(shown: Sequence[tuple[str, Float32s, npt.NDArray[np.bool_]]]) -> tuple[str, str]:
    """ROC and precision-recall of several answers; one whose windows are all true, or none, has no curve.

    Args:
        shown: name, scores `[N]`, and which of the `N` are true.
    """
    drawn = []
    with mpl.rc_context(_STYLE):
        for kind in ("roc", "pr"):
            figure, axes = _figure()
            for name, scores, positive in shown:
                if positive.all() or not positive.any():
                    continue
                if kind == "roc":
                    x, y, _ = metrics.roc_curve(positive, scores)
                else:
                    y, x, _ = metrics.precision_recall_curve(positive, scores)
                keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS_MAX)).astype(int))
                axes.plot(x[keep], y[keep], label=name, linewidth=1.3)
            if kind == "roc":
                axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle="--")
            axes.set_xlabel("false positive rate" if kind == "roc" else "recall")
            axes.set_ylabel("true positive rate" if kind == "roc" else "precision")
            axes.legend(fontsize=7, frameon=False)
            drawn.append(_svg(figure))
    return drawn[0], drawn[1]


def calibration(figures: ClassificationFigures) -> str:
    """Confidence against accuracy."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle="--")
        bins = figures.calibration
        sizes = [10 + 200 * one.windows / max(1, figures.windows) for one in bins]
        confidence, accuracy = [one.confidence for one in bins], [one.accuracy for one in bins]
        axes.plot(confidence, accuracy, color=_BLUE, linewidth=1, clip_on=False)
        axes.scatter(confidence, accuracy, s=sizes, color=_BLUE, clip_on=False)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        return _svg(figure)


def devices(found: Sequence[DeviceFigures]) -> str:
    """Accuracy, or the share of alarms, of every device; the worst where they are many."""
    classes = any(one.accuracy is not None for one in found)
    values = [(one.accuracy if classes else one.flagged_share) or 0.0 for one in found]
    order = np.argsort(values) if classes else np.argsort(values)[::-1]
    shown = order[:BARS_MAX]
    label = "accuracy" if classes else "share of windows above the threshold"
    return _bars([found[index].device for index in shown], [values[index] for index in shown], label)


def drift(found: Sequence[Drift]) -> str:
    """The features that moved most between training and judging."""
    shown = found[:20]
    values = [one.population_stability_index for one in shown]
    return _bars([one.feature for one in shown], values, "PSI, judged against training windows", mark=0.25)


def _bars(names: Sequence[str], values: Sequence[float], label: str, mark: float | None = None) -> str:
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.2, max(1.6, 0.2 * len(names) + 0.8))
        place = np.arange(len(names))
        axes.barh(place, values, color=_BLUE, height=0.7)
        axes.set_ylim(-0.6, max(3, len(names)) - 0.4)  # one bar alone need not be a wall
        axes.set_yticks(place, names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        if mark is not None:
            axes.axvline(mark, color=_RED, linewidth=0.8, linestyle="--")
        return _svg(figure)


def learning_curve(points: Sequence[CurvePoint], metric: str) -> str:
    """What more training windows bring."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        windows = [point.windows for point in points]
        for name, style, color, values in (
            ("accuracy", "o-", _BLUE, [point.accuracy for point in points]),
            ("macro-F1", "s--", _GREY, [point.f1_macro for point in points]),
            (metric, "o-", _BLUE, [point.metric_value for point in points]),
        ):
            if None not in values:
                axes.plot(windows, values, style, color=color, label=name)
        labels = [f"{point.windows}\n({point.groups})" for point in points]
        axes.set_xticks(windows, labels)
        axes.set(xlabel="windows (groups) in training", ylabel="before the judged windows")
        axes.legend(fontsize=7, frameon=False)
        return _svg(figure)


def history(trials: Sequence[TrialResult], metric: str) -> str:
    """Every scored trial in its order, by family, and the best so far."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        scored = [(number, trial) for number, trial in enumerate(trials, 1) if trial.score is not None]
        for family in dict.fromkeys(trial.candidate.family for _, trial in scored):
            mine = [(number, trial.score) for number, trial in scored if trial.candidate.family == family]
            axes.scatter(*zip(*mine, strict=True), s=14, label=family)
        best = np.maximum.accumulate([trial.score for _, trial in scored if trial.score is not None])
        axes.step([number for number, _ in scored], best, where="post", color=_GREY, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="trial", ylabel=f"{metric}, cross-validated")
        axes.legend(fontsize=7, frameon=False)
        return _svg(figure)


def timeline(
    ends_us: Int64s,
    scores: Float32s,
    threshold: float,
    labelled: npt.NDArray[np.bool_],
    judged: npt.NDArray[np.bool_],
) -> str:
    """Scores of one device over time, with its labelled anomalies (red) and the windows that judge (grey)."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(10.6, 3.2)
        # The highest of every piece: thinning must not lose a peak.
        pieces = np.array_split(np.arange(len(scores)), min(len(scores), 1_500))
        times = ends_us.astype("datetime64[us]")
        peaks = [piece[int(np.argmax(scores[piece]))] for piece in pieces]
        over = axes.get_xaxis_transform()
        axes.fill_between(times, 0, 1, where=judged, transform=over, color=_GREY, alpha=0.15, label="judged")
        axes.fill_between(times, 0, 1, where=labelled, transform=over, color=_RED, alpha=0.15, label="labelled")
        axes.plot(times[peaks], scores[peaks], color=_BLUE, linewidth=0.7)
        axes.axhline(threshold, color=_RED, linewidth=0.8, linestyle="--", label="threshold")
        axes.set(ylabel="score")
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")
        return _svg(figure)

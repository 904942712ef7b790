"""`headwater train …`: from a recipe to a release, step by step.

Every step is a command of its own: it can be run again at any time, does nothing when its inputs are as they were,
answers with JSON, and says by its exit status what happened. So any orchestrator can drive it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.aside import Aside
from headwater.commands.options import Data, Json, Lake, check_above_zero
from headwater.signals import stopping

if TYPE_CHECKING:
    from trainer.steps import Ran, Step, StepContext

app = typer.Typer(name="train", help="From a recipe to a release, step by step.", no_args_is_help=True)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe.toml.")]
Work = Annotated[
    Path | None,
    typer.Option("--work", metavar="DIR", help="Where the steps keep their files; else the folder train of --data."),
]
Force = Annotated[bool, typer.Option("--force", help="Run it even though its inputs are as they were.")]
Keys = Annotated[
    Path | None,
    typer.Option("--keys", metavar="DIR", help="Offline keys, to approve with where the recipe's policy allows it."),
]


@app.command()
def dataset(
    recipe: Recipe, lake: Lake = None, data: Data = None, work: Work = None, force: Force = False, json: Json = False
) -> None:
    """Cut labelled windows out of the lake, at the latest version of each table, and note which those are."""
    _one("dataset", recipe, lake, data, work, force=force, json=json)


@app.command()
def checks(
    recipe: Recipe, lake: Lake = None, data: Data = None, work: Work = None, force: Force = False, json: Json = False
) -> None:
    """Divide the windows, and look whether a model may learn from them. Exit status 1, with a report, if not."""
    _one("checks", recipe, lake, data, work, force=force, json=json)


@app.command()
def search(
    recipe: Recipe, lake: Lake = None, data: Data = None, work: Work = None, force: Force = False, json: Json = False
) -> None:
    """Train and compare the recipe's families, until the target is met or the budget is spent."""
    _one("search", recipe, lake, data, work, force=force, json=json)


@app.command()
def evaluate(
    recipe: Recipe, lake: Lake = None, data: Data = None, work: Work = None, force: Force = False, json: Json = False
) -> None:
    """Judge the best model by windows it has never seen, and write a report with plots."""
    _one("evaluate", recipe, lake, data, work, force=force, json=json)


@app.command()
def export(
    recipe: Recipe, lake: Lake = None, data: Data = None, work: Work = None, force: Force = False, json: Json = False
) -> None:
    """Write the model with its features as one ONNX file, and prove that it answers as it did in training."""
    _one("export", recipe, lake, data, work, force=force, json=json)


@app.command()
def release(
    recipe: Recipe,
    lake: Lake = None,
    data: Data = None,
    work: Work = None,
    keys: Keys = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Put the model and its manifest into the lake as a release in DRAFT; devices get it once it is approved."""
    _one("release", recipe, lake, data, work, keys=keys, force=force, json=json)


@app.command()
def run(
    recipe: Recipe,
    lake: Lake = None,
    data: Data = None,
    work: Work = None,
    keys: Keys = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="STEP", help="Stop after this step; else after the release.")
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STEP", help="Run this step in any case; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the dataset that is there, though the lake has more by now.")
    ] = False,
    json: Json = False,
) -> None:
    """Run all steps, one after the other; those whose inputs are as they were are skipped.

    With --json one line per step.
    """
    with _trainer("headwater train run"):
        from trainer.approval import approver_of
        from trainer.pipeline import STEPS
        from trainer.tracking import check_installed
    for option, name in (("--until", until), *(("--force", one) for one in force or ())):
        if name is not None and name not in STEPS:
            raise ConfigurationError(f"{option} {name!r} is no step; choose of {', '.join(STEPS)}")
    with _context(recipe, lake, data, work, keys=keys, json=json) as context:
        if until in (None, "release"):
            # What will not do is refused now, not after hours.
            approver_of(context)
            check_installed()
        for name, step in STEPS.items():
            ran = _run(context, step, force=name in (force or ()), keep_pins=resume, json=json)
            _tell(ran, context.work, json=json)
            if name == until:
                return


@app.command()
def watch(
    recipe: Recipe,
    lake: Lake = None,
    data: Data = None,
    work: Work = None,
    keys: Keys = None,
    interval: Annotated[
        float, typer.Option("--interval", metavar="S", help="Seconds between two looks for triggers.")
    ] = 10.0,
    lease: Annotated[
        float, typer.Option("--lease", metavar="S", help="A trainer not heard of for so long is taken over from.")
    ] = 120.0,
    once: Annotated[bool, typer.Option("--once", help="Work off what is there, and end.")] = False,
    json: Json = False,
) -> None:
    """Wait for triggers of this recipe's model, and learn again: a release that is not worse becomes a draft.

    Approving and rolling out follow where the recipe's policy says so. Several may watch one recipe, each in a work
    folder of its own. With --json one line per trigger.
    """
    check_above_zero("--interval", interval)
    check_above_zero("--lease", lease)
    with _trainer("headwater train watch"):
        from headwater.lake_access import opened_store
        from headwater.retraining import make_retrainer, sayer
        from headwater.retraining import watch as watch_until
        from trainer.recipe_file import load_recipe

    name = load_recipe(recipe).name
    with opened_store(lake, data, os.environ) as store, stopping() as stop:
        retrainer = make_retrainer(
            name, lambda: _context(recipe, lake, data, work, keys=keys, json=json), store, lease, stop
        )
        say = sayer(json=json)
        if not once:
            watch_until(retrainer, interval, stop, say)
            return
        while (outcome := retrainer.take()) is not None:
            say(outcome)


def _one(
    name: str,
    recipe: Path,
    lake: str | None,
    data: str | None,
    work: Path | None,
    *,
    keys: Path | None = None,
    force: bool,
    json: bool,
) -> None:
    """Run one step."""
    with _trainer(f"headwater train {name}"):
        from trainer.pipeline import STEPS
    with _context(recipe, lake, data, work, keys=keys, json=json) as context:
        _tell(_run(context, STEPS[name], force=force, json=json), context.work, json=json)


@contextmanager
def _trainer(what: str) -> Iterator[None]:
    logs.configure(quiet=True)
    with extras.imports("trainer", what):
        yield


@contextmanager
def _context(
    path: Path, lake: str | None, data: str | None, work: Path | None, *, keys: Path | None, json: bool
) -> Iterator[StepContext]:
    """All that a step may use, for one recipe."""
    from headwater.lake_access import opened_store
    from headwater.place import data_folder
    from headwater.progress import Bars
    from lake.duck import QuerySettings
    from lake.query import Lake
    from lake.trust.keys import PASSPHRASE_VARIABLE
    from trainer.files import locked
    from trainer.progress import NOBODY
    from trainer.provenance import revision
    from trainer.recipe_file import load_recipe
    from trainer.steps import StepContext

    recipe = load_recipe(path)
    folder = (work or data_folder(data, os.environ) / "train").expanduser().absolute() / recipe.name
    spill = QuerySettings(memory_bytes_max=recipe.data.memory_bytes_max, spill_folder=str(folder / ".spill"))
    with locked(folder), opened_store(lake, data, os.environ) as store:
        opened = Lake(store, spill)
        try:
            yield StepContext(
                recipe=recipe,
                work=folder,
                lake=opened,
                store=store,
                seed=recipe.seed,
                progress=Bars() if sys.stderr.isatty() and not json else NOBODY,
                recipe_text=path.read_text(encoding="utf-8"),
                code=revision(),
                keys=keys,
                passphrase=os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None,
            )
        finally:
            opened.close()


def _run(context: StepContext, step: Step, *, force: bool, keep_pins: bool = False, json: bool) -> Ran:
    from trainer.errors import ChecksFailedError
    from trainer.findings import Report
    from trainer.steps import REPORT, run_step

    try:
        with Aside(context.lake.interrupt) as aside:
            return aside.run(lambda: run_step(context, step, force=force, keep_pins=keep_pins))
    except ChecksFailedError:
        if json:
            import msgspec

            report = msgspec.json.decode((context.work / "checks.failed" / REPORT).read_bytes(), type=Report)
            output.say_json({"step": step.name, "recipe": context.recipe.name, "failed": True, "report": report})
        raise


def _tell(ran: Ran, work: Path, *, json: bool) -> None:
    """What a step did."""
    record = ran.record
    if json:
        output.say_json(
            {
                "step": record.step,
                "run": record.run,
                "skipped": ran.skipped,
                "seconds": record.seconds,
                "versions": record.pins,
                "outputs": record.outputs,
            }
        )
        return
    done = "skipped, its inputs are as they were" if ran.skipped else f"done in {record.seconds:.1f} s"
    output.say(f"{record.step}: {done}")
    output.say_pairs({f"  {name}": value for name, value in record.outputs.items() if _is_short(value)})
    for metric in record.outputs.get("metrics", ()) if record.step == "evaluate" else ():
        output.say(f"  {metric['name']:<28}{metric['value']:.4g}  ({metric['split']})")
    for name in record.outputs.get("files", {}).values() if record.step == "evaluate" else ():
        output.say(f"  see: {work / record.step / name}")
    if record.outputs.get("state") == "draft":
        output.say(f"  next: headwater release approve {record.outputs['model']}@{record.outputs['version']}")
    for finding in record.outputs.get("findings", ()):
        if finding["verdict"] != "ok":
            output.say(f"  {finding['verdict']}: {finding['check']}: {finding['detail']}. {finding['remedy']}")


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float) or (
        isinstance(value, dict) and len(value) <= 12 and not any(isinstance(one, dict | list) for one in value.values())
    )

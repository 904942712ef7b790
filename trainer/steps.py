"""One step of the trainer: what it sees, what it leaves, and when it need not run again.

A step is a function `(StepContext) -> outputs`: it reads what earlier steps published, writes its files into
`context.into`, and returns what is worth recording, as JSON. `run_step` gives it a fresh draft folder, and only when it
returned puts the draft in the place of the published folder, and then writes the record, which names every file by
hash. A step that dies at any moment leaves no record, so nobody takes what it left for whole, and it is run again.

    <work>/<recipe>/<step>/         what the step published
    <work>/<recipe>/<step>.json     its record
    <work>/<recipe>/<step>.failed/  the report of a step that found the data unfit
    <work>/<recipe>/.<step>.draft/  what a running, or killed, step has written

A step whose inputs are as they were is not run again. Its inputs are: the keys of the recipe that it reads, the seed,
the Delta versions it reads, the outputs of the steps before it, the trainer's source and the packages it works with.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from contract.errors import HeadwaterError
from lake.evaluations import Evaluation, Evaluations
from lake.query import Lake
from lake.store import Store
from trainer.errors import DataError, DiskFullError, StepNotReadyError
from trainer.files import draft_folder, hashed_files, publish, remove, write_durably
from trainer.progress import NOBODY, Progress
from trainer.provenance import packages, source_sha256
from trainer.recipe import Recipe
from trainer.split import Split, load_split
from trainer.windowset import WindowSet

Outputs = dict[str, Any]
REPORT = "report.json"
"""A step that raises `DataError` after it wrote this file has its files kept in `<step>.failed`."""
RECORD_ROOM_BYTES = 256 * 1024
"""Kept free on the disk while a step runs."""
_ROOM_FILE = ".room"


@dataclass(frozen=True)
class StepContext:
    """What a step may use."""

    recipe: Recipe
    work: Path
    """`<work>/<recipe name>`."""
    lake: Lake
    store: Store
    seed: int
    progress: Progress = NOBODY
    recipe_text: str = ""
    """The file as it is, for the manifest."""
    code: str = ""
    """Revision of the source, or the version that is installed."""
    keys: Path | None = None
    """Folder with the offline keys, where the release may be approved at once."""
    passphrase: bytes | None = field(default=None, repr=False)
    """Of those keys, where they are encrypted."""
    into: Path = Path()
    """Where the step that runs writes its files."""
    pins: Mapping[str, int] = field(default_factory=dict)
    """Delta version of every table that the step that runs may read, by path."""

    def folder(self, step: str) -> Path:
        """What an earlier step published.

        Raises:
            StepNotReadyError: it has not run.
        """
        read_record(self.work, step)
        return self.work / step

    def record(self, step: str) -> Record:
        """What is known of an earlier step's run.

        Raises:
            StepNotReadyError: it has not run.
        """
        return read_record(self.work, step)

    def outputs(self, step: str) -> Outputs:
        """What an earlier step returned.

        Raises:
            StepNotReadyError: it has not run.
        """
        return self.record(step).outputs

    def windows(self) -> WindowSet:
        """The dataset.

        Raises:
            StepNotReadyError: it has not been made.
            DataError: it is damaged.
        """
        return WindowSet.load(self.folder("dataset"))

    def split(self) -> Split:
        """The split that the checks found sound.

        Raises:
            StepNotReadyError: they have not run.
            DataError: it is damaged.
        """
        return load_split(self.folder("checks"))


StepFunction = Callable[[StepContext], Outputs]


class Step(NamedTuple):
    """One step as the pipeline knows it."""

    name: str
    function: str
    """`module:name` of a `StepFunction`, imported when the step runs."""
    needs: tuple[Step, ...]
    """Steps whose outputs it reads."""
    reads: tuple[str, ...]
    """Keys of the recipe (`data`, `checks.stuck_s`) that decide what comes out; a change of any other does not make it
    run again."""
    pins: str = ""
    """`module:name` of the function `(StepContext) -> versions by path` of the tables it reads; empty: none."""
    reads_text: bool = False
    """Whether the recipe's text as it is goes into what comes out, so that any change makes it run again."""
    after: str = ""
    """`module:name` of a function `(StepContext) -> None` for what must not be done before the step is published: by
    its run, or where that was killed or the function failed, by the next one, which skips the step. Empty: nothing."""


class StepFile(msgspec.Struct, frozen=True):
    """One file that a step published."""

    sha256: str
    size: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one run of a step: `<step>.json`."""

    step: str
    run: str
    """Names this run in `control/evaluations`."""
    key: str
    """SHA-256 of the inputs."""
    pins: dict[str, int]
    code: str
    source: str
    seed: int
    packages: dict[str, str]
    started_at_us: int
    seconds: float
    outputs: Outputs
    files: dict[str, StepFile]
    logged: bool = False
    """Whether `control/evaluations` has it."""
    finished: bool = False
    """Whether what comes after publishing is done, too."""


class Ran(NamedTuple):
    """How a step ended."""

    record: Record
    skipped: bool
    """Whether it had run before, from the same inputs."""


def run_step(context: StepContext, step: Step, *, force: bool = False, keep_pins: bool = False) -> Ran:
    """Run a step, unless it ran from the same inputs.

    Args:
        context: without `into` and `pins`, which are the step's own.
        step: which.
        force: run it in any case.
        keep_pins: of a step that ran before, take the Delta versions that it took then instead of the latest.

    Raises:
        StepNotReadyError: an earlier step has not run, or ran from something else.
        DiskFullError: the work folder cannot be written.
        HeadwaterError: what the step itself raises. Nothing was published; the failure is in `control/evaluations`.
    """
    before = _record_or_none(context.work, step.name)
    taken = before.pins if before is not None and keep_pins else None
    key, pinned = _key(context, step, taken)
    if before is not None and before.key == key and not force and _is_whole(context.work, before):
        return Ran(_finished(context, step, before), skipped=True)
    started_at_us, began = time.time_ns() // 1_000, time.monotonic()

    def record(outputs: Outputs, files: dict[str, StepFile]) -> Record:
        return Record(
            step=step.name,
            run=os.urandom(16).hex(),
            key=key,
            pins=dict(pinned),
            code=context.code,
            source=source_sha256(),
            seed=context.seed,
            packages=packages(),
            started_at_us=started_at_us,
            seconds=round(time.monotonic() - began, 3),
            outputs=outputs,
            files=files,
        )

    draft = context.work / f".{step.name}.draft"
    try:
        done = _run(replace(context, into=draft, pins=pinned), step, record)
    except HeadwaterError as error:
        remove(draft)
        _log_failure(context, record({}, {}), error)
        raise
    return Ran(_finished(context, step, done), skipped=False)


def _run(context: StepContext, step: Step, record: Callable[[Outputs, dict[str, StepFile]], Record]) -> Record:
    """Run it in the draft folder, publish, and write the record."""
    failed = context.work / f"{step.name}.failed"
    try:
        draft_folder(context.into)
        # What is given to the lake cannot be taken back: the record that will name it must find room.
        room = context.into / _ROOM_FILE
        room.write_bytes(bytes(RECORD_ROOM_BYTES))
        try:
            # Through JSON at once, so that a later step sees the same whether it runs in this process or the next.
            outputs = msgspec.json.decode(msgspec.json.encode(_load(step.function)(context)))
        except DataError:
            if (context.into / REPORT).exists():
                remove(room)
                publish(context.into, failed)
            raise
        remove(room)
        files = {name: StepFile(*found) for name, found in hashed_files(context.into).items()}
        done = record(outputs, files)
        remove(record_path(context.work, step.name))
        publish(context.into, context.work / step.name)
        write_durably(record_path(context.work, step.name), msgspec.json.format(msgspec.json.encode(done)))
        remove(failed)
    except OSError as error:
        raise DiskFullError(
            f"step {step.name} cannot write in {context.work} ({error}); make room there, or choose another --work, "
            "and run it again"
        ) from error
    return done


def current(context: StepContext, step: Step) -> Record:
    """The record of a step that ran from what the recipe says now, and all steps before it.

    Raises:
        StepNotReadyError: it has not run, or ran from something else, or its files are not there any more.
    """
    found = read_record(context.work, step.name)
    if found.key != _key(context, step, found.pins)[0]:
        raise StepNotReadyError(
            f"{step.name} of {context.recipe.name} was made from another recipe, other data or another version of the "
            f"trainer; run first: headwater train {step.name} RECIPE"
        )
    if not _is_whole(context.work, found, quick=True):
        raise StepNotReadyError(
            f"files of {step.name} are missing in {context.work / step.name}; run first: headwater train {step.name} "
            "RECIPE"
        )
    return found


def record_path(work: Path, step: str) -> Path:
    """Where the record of a step stands."""
    return work / f"{step}.json"


def read_record(work: Path, step: str) -> Record:
    """The record of a step's last run.

    Raises:
        StepNotReadyError: there is none.
    """
    found = _record_or_none(work, step)
    if found is None:
        raise StepNotReadyError(f"{step} has not been run in {work}; run first: headwater train {step} RECIPE")
    return found


def _record_or_none(work: Path, step: str) -> Record | None:
    try:
        return msgspec.json.decode(record_path(work, step).read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return None  # damaged: the step runs again


def _key(context: StepContext, step: Step, taken: Mapping[str, int] | None) -> tuple[str, Mapping[str, int]]:
    """SHA-256 of a step's inputs, and the versions among them."""
    before = {need.name: _digest(current(context, need)) for need in step.needs}
    pinned: Mapping[str, int] = {}
    if step.pins:
        pinned = taken if taken is not None else _load(step.pins)(context)
    inputs = {
        "step": step.name,
        "recipe": {name: msgspec.to_builtins(attrgetter(name)(context.recipe)) for name in step.reads},
        "seed": context.seed,
        "pins": dict(sorted(pinned.items())),
        "text": hashlib.sha256(context.recipe_text.encode()).hexdigest() if step.reads_text else "",
        "needs": before,
        "source": source_sha256(),
        "packages": packages(),
    }
    return hashlib.sha256(msgspec.json.encode(inputs, order="sorted")).hexdigest(), pinned


def _digest(record: Record) -> str:
    """What a step gave: the same for two runs that gave the same."""
    content = {"outputs": record.outputs, "files": record.files}
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _is_whole(work: Path, record: Record, *, quick: bool = False) -> bool:
    """Whether the files that a record names are there; `quick` looks at their sizes alone."""
    folder = work / record.step
    try:
        if quick:
            return all((folder / name).stat().st_size == file.size for name, file in record.files.items())
        return {name: StepFile(*found) for name, found in hashed_files(folder).items()} == record.files
    except OSError:
        return False


def _load(name: str) -> Callable[[StepContext], Any]:
    module, _, function = name.partition(":")
    found: Callable[[StepContext], Any] = getattr(import_module(module), function)
    return found


def _finished(context: StepContext, step: Step, record: Record) -> Record:
    """The record, after `control/evaluations` has it and the step's `after` is done. What a crash or an absent store
    prevented is made up for at the next run, which skips the step."""
    try:
        if not record.logged:
            Evaluations(context.store).append([_evaluation(context, record, "done", "")])
            record = _noted(context, msgspec.structs.replace(record, logged=True))
        if step.after and not record.finished:
            _load(step.after)(context)
            record = _noted(context, msgspec.structs.replace(record, finished=True))
    except OSError as error:
        raise DiskFullError(f"{context.work} cannot be written ({error}); make room there") from error
    return record


def _noted(context: StepContext, record: Record) -> Record:
    write_durably(record_path(context.work, record.step), msgspec.json.format(msgspec.json.encode(record)))
    return record


def _log_failure(context: StepContext, record: Record, error: HeadwaterError) -> None:
    try:
        Evaluations(context.store).append([_evaluation(context, record, "failed", str(error))])
    except HeadwaterError:
        pass  # the step's own error is what the caller must hear


def _evaluation(context: StepContext, record: Record, outcome: str, error: str) -> Evaluation:
    return Evaluation(
        run=record.run,
        recipe=context.recipe.name,
        step=record.step,
        outcome=outcome,
        error=error,
        started_at_us=record.started_at_us,
        seconds=record.seconds,
        seed=record.seed,
        code=record.code,
        key=record.key,
        pins=record.pins,
        packages=record.packages,
        outputs=record.outputs,
    )


__all__ = ["Outputs", "Ran", "Record", "Step", "StepContext", "StepFunction", "current", "read_record", "run_step"]

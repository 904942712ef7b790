"""A step runs once for the same inputs, again when one changes, and leaves nothing half-published wherever it dies."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract.errors import ConfigurationError, TemporaryError
from lake.errors import StoreUnavailableError
from lake.evaluations import Evaluations
from lake.store import Store, StoreSettings
from tests.unit.trainer_sets import recipe
from trainer import files, steps
from trainer.errors import DataError, DiskFullError, StepNotReadyError
from trainer.files import locked
from trainer.pipeline import RELEASE
from trainer.steps import Step, StepContext, current, read_record, run_step

CALLS: list[str] = []
WRITES: dict[str, Any] = {}
"""What the toy steps do: `error` to raise, `text` to write, `pins` of the tables they read."""


def first(context: StepContext) -> Mapping[str, Any]:
    CALLS.append("first")
    (context.into / "deep").mkdir()
    (context.into / "deep" / "data.txt").write_text(WRITES.get("text", "data"))
    if "report" in WRITES:
        (context.into / steps.REPORT).write_text(WRITES["report"])
    if "error" in WRITES:
        raise WRITES["error"]
    return {"seed": context.seed, "pins": dict(context.pins)}


def second(context: StepContext) -> Mapping[str, Any]:
    CALLS.append("second")
    text = (context.folder("first") / "deep" / "data.txt").read_text()
    (context.into / "upper.txt").write_text(text.upper())
    return {"saw": context.outputs("first")["seed"]}


def pins(context: StepContext) -> dict[str, int]:
    return dict(WRITES.get("pins", {"raw/s": 3}))


HERE = "tests.unit.test_trainer_steps"
FIRST = Step("first", f"{HERE}:first", (), ("window",), pins=f"{HERE}:pins")
SECOND = Step("second", f"{HERE}:second", (FIRST,), ("search",))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    CALLS.clear()
    WRITES.clear()


@pytest.fixture
def context(tmp_path: Path) -> StepContext:
    store = Store(StoreSettings(url=f"file://{tmp_path}/lake", fsync=False))
    work = tmp_path / "work" / "test"
    work.mkdir(parents=True)
    return StepContext(recipe=recipe(), work=work, lake=None, store=store, seed=1)


def contents(work: Path) -> dict[str, str]:
    return {path.relative_to(work).as_posix(): path.read_text() for path in sorted(work.rglob("*")) if path.is_file()}


def test_a_step_publishes_files_and_a_record_of_them(context: StepContext) -> None:
    ran = run_step(context, FIRST)
    assert not ran.skipped
    assert set(contents(context.work)) == {"first.json", "first/deep/data.txt"}
    record = read_record(context.work, "first")
    assert record.outputs == {"seed": 1, "pins": {"raw/s": 3}}
    assert record.pins == {"raw/s": 3}
    assert record.files["deep/data.txt"].size == 4
    assert {"python", "numpy"} <= set(record.packages)
    assert len(record.source) == 64


def test_a_step_whose_inputs_are_as_they_were_is_skipped(context: StepContext) -> None:
    once = run_step(context, FIRST).record
    again = run_step(context, FIRST)
    assert again.skipped
    assert again.record == once
    assert CALLS == ["first"]
    assert not run_step(context, FIRST, force=True).skipped


@pytest.mark.parametrize("what", ["seed", "recipe", "pins", "source", "packages"])
def test_a_step_runs_again_when_an_input_changed(
    context: StepContext, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step(context, FIRST)
    if what == "seed":
        context = replace(context, seed=2)
    elif what == "recipe":
        context = replace(context, recipe=recipe(window={"rows": 5}))
    elif what == "pins":
        WRITES["pins"] = {"raw/s": 4}
    elif what == "source":
        monkeypatch.setattr(steps, "source_sha256", lambda: "0" * 64)
    else:
        monkeypatch.setattr(steps, "packages", lambda: {"numpy": "0"})
    assert not run_step(context, FIRST).skipped


def test_a_change_that_a_step_does_not_read_does_not_run_it_again(context: StepContext) -> None:
    run_step(context, FIRST)
    assert run_step(replace(context, recipe=recipe(search={"trials": 7})), FIRST).skipped


def test_a_step_whose_outcome_holds_the_text_of_the_recipe_runs_again_when_it_changed(context: StepContext) -> None:
    """Gateways read `[rollout]` and `[policy]` of a release out of that text."""
    assert RELEASE.reads_text
    other = replace(context, recipe_text="[rollout]")
    run_step(context, FIRST)
    assert run_step(other, FIRST).skipped
    holds = FIRST._replace(reads_text=True)
    run_step(context, holds)
    assert run_step(context, holds).skipped
    assert not run_step(other, holds).skipped


def test_a_step_may_keep_the_versions_that_it_took(context: StepContext) -> None:
    run_step(context, FIRST)
    WRITES["pins"] = {"raw/s": 9}
    assert run_step(context, FIRST, keep_pins=True).skipped
    assert run_step(context, FIRST).record.pins == {"raw/s": 9}


def test_a_step_needs_the_steps_before_it_as_the_recipe_now_is(context: StepContext) -> None:
    with pytest.raises(StepNotReadyError, match=r"first has not been run.*headwater train first"):
        run_step(context, SECOND)
    run_step(context, FIRST)
    assert run_step(context, SECOND).record.outputs == {"saw": 1}
    other = replace(context, recipe=recipe(window={"rows": 5}))
    with pytest.raises(StepNotReadyError, match="another recipe"):
        run_step(other, SECOND)
    (context.work / "first" / "deep" / "data.txt").unlink()
    with pytest.raises(StepNotReadyError, match="missing"):
        run_step(context, SECOND)


def test_what_a_step_before_gives_anew_runs_the_next_again(context: StepContext) -> None:
    run_step(context, FIRST)
    run_step(context, SECOND)
    run_step(context, FIRST, force=True)
    assert run_step(context, SECOND).skipped  # it gave the same
    WRITES["text"] = "other"
    run_step(context, FIRST, force=True)
    assert not run_step(context, SECOND).skipped
    assert (context.work / "second" / "upper.txt").read_text() == "OTHER"


def test_a_file_that_was_changed_behind_the_record_runs_the_step_again(context: StepContext) -> None:
    run_step(context, FIRST)
    (context.work / "first" / "deep" / "data.txt").write_text("edit")
    assert not run_step(context, FIRST).skipped
    (context.work / "first.json").write_text("{")
    assert not run_step(context, FIRST).skipped


def test_a_step_that_fails_leaves_what_was_published(context: StepContext) -> None:
    run_step(context, FIRST)
    before = contents(context.work)
    WRITES["error"] = DataError("no")
    with pytest.raises(DataError, match="no"):
        run_step(context, FIRST, force=True)
    assert contents(context.work) == before
    assert current(context, FIRST).outputs["seed"] == 1


def test_the_report_of_a_failed_step_is_kept_until_it_succeeds(context: StepContext) -> None:
    WRITES.update(error=DataError("no"), report="{}")
    with pytest.raises(DataError):
        run_step(context, FIRST)
    assert contents(context.work)["first.failed/report.json"] == "{}"
    with pytest.raises(StepNotReadyError):
        current(context, FIRST)
    WRITES.clear()
    run_step(context, FIRST)
    assert set(contents(context.work)) == {"first.json", "first/deep/data.txt"}


def test_a_full_disk_is_told_with_the_remedy_and_leaves_nothing(context: StepContext) -> None:
    WRITES["error"] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskFullError, match=r"No space left.*make room"):
        run_step(context, FIRST)
    assert contents(context.work) == {}


def greedy(context: StepContext) -> Mapping[str, Any]:
    """Would give something to the lake; at that moment the record's room is on the disk."""
    CALLS.append(str(sum(path.stat().st_size for path in context.into.iterdir())))
    return {}


def test_a_step_begins_only_where_its_record_will_find_room(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FIRST._replace(function=f"{HERE}:greedy")
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if len(data) > 1_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskFullError, match="make room there"):
            run_step(context, step)
    assert CALLS == []
    assert run_step(context, step).record.files == {}
    assert [str(steps.RECORD_ROOM_BYTES)] == CALLS
    assert set(contents(context.work)) == {"first.json"}


class Killed(BaseException):
    """The power is gone."""


@pytest.mark.parametrize("published", [False, True])
def test_wherever_a_step_is_killed_nothing_half_made_is_taken_for_whole(
    context: StepContext, published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies before each change of the disk in turn, and after the last one; then the next run mends it."""
    WRITES["text"] = "old"
    if published:
        run_step(context, FIRST)
    WRITES["text"] = "new"
    deaths = 0
    for death in range(1, 40):
        left = [death]

        def dying(inner: Any, left: list[int] = left) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return inner(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "replace", "mkdir"):
                patch.setattr(Path, name, dying(getattr(Path, name)))
            patch.setattr(files.shutil, "rmtree", dying(files.shutil.rmtree))
            try:
                run_step(context, FIRST, force=True)
            except Killed:
                deaths += 1
            else:
                break
        try:
            found = current(context, FIRST)
        except StepNotReadyError:
            continue
        text = (context.work / "first" / "deep" / "data.txt").read_text()
        assert text in ("old", "new")
        assert found.files == {
            name: steps.StepFile(*one) for name, one in files.hashed_files(context.work / "first").items()
        }
    assert deaths >= 5
    assert run_step(context, FIRST).record.outputs["seed"] == 1
    assert contents(context.work)["first/deep/data.txt"] == "new"
    assert not [name for name in contents(context.work) if "draft" in name]


def test_every_run_is_a_row_of_evaluations(context: StepContext) -> None:
    done = run_step(context, FIRST).record
    run_step(context, FIRST)
    WRITES["error"] = DataError("no rows; wait")
    with pytest.raises(DataError):
        run_step(context, FIRST, force=True)
    rows = sorted(Evaluations(context.store).read().to_pylist(), key=lambda row: row["outcome"])
    assert [(row["outcome"], row["error"], row["step"], row["recipe"]) for row in rows] == [
        ("done", "", "first", "test"),
        ("failed", "no rows; wait", "first", "test"),
    ]
    assert rows[0]["run"] == done.run
    assert msgspec.json.decode(rows[0]["outputs"]) == done.outputs
    assert msgspec.json.decode(rows[0]["versions"]) == {"raw/s": 3}


def test_a_run_that_the_lake_did_not_take_is_added_by_the_next(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(self: Evaluations, rows: Any) -> None:
        raise StoreUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluations, "append", absent)
        with pytest.raises(StoreUnavailableError):
            run_step(context, FIRST)
    again = run_step(context, FIRST)
    assert again.skipped
    assert CALLS == ["first"]
    assert Evaluations(context.store).read().column("run").to_pylist() == [again.record.run]


def after(context: StepContext) -> None:
    CALLS.append("after")
    assert read_record(context.work, "first").files
    if "after" in WRITES:
        raise WRITES["after"]


def test_what_comes_after_publishing_is_done_once_and_made_up_for_by_the_next_run(context: StepContext) -> None:
    step = FIRST._replace(after=f"{HERE}:after")
    WRITES["after"] = TemporaryError("away")
    for _ in range(2):
        with pytest.raises(TemporaryError):
            run_step(context, step)
    WRITES.clear()
    ran = run_step(context, step)
    assert ran.skipped
    assert run_step(context, step).record == ran.record
    assert CALLS == ["first", "after", "after", "after"]
    assert Evaluations(context.store).read().num_rows == 1


def test_one_process_works_in_a_folder_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "a"),
        locked(tmp_path / "b"),
        pytest.raises(TemporaryError, match="another training works"),
        locked(tmp_path / "a"),
    ):
        raise AssertionError
    with locked(tmp_path / "a"):
        pass


def test_a_folder_without_locks_is_not_taken_for_one_that_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    with pytest.raises(ConfigurationError, match=r"No locks available.*choose a --work"), locked(tmp_path / "a"):
        raise AssertionError

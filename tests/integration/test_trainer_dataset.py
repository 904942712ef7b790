"""From a lake to a checked dataset: pinned, in recorded order, resumable, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from headwater.exits import Exit
from lake.duck import QuerySettings
from lake.query import Lake
from lake.store import Store
from tests.integration.servers import PATIENCE_S, wait_until
from tests.integration.trainer_lake import RECIPE, START_US, STEP_US, bring_in, bring_in_walkers, open_lake
from trainer.errors import ChecksFailedError, DataError, RecipeError
from trainer.pipeline import CHECKS, DATASET
from trainer.recipe_file import load_recipe
from trainer.steps import Ran, StepContext, run_step
from trainer.windowset import WindowSet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_lake(tmp_path / "lake")


class Training:
    """Runs steps of one recipe over a lake."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.work = folder / "work" / "walking"

    def __call__(self, text: str = RECIPE, *steps: Any, **options: Any) -> Ran:
        path = self.folder / "recipe.toml"
        path.write_text(text)
        recipe = load_recipe(path)
        self.work.mkdir(parents=True, exist_ok=True)
        lake = Lake(self.store, QuerySettings(spill_folder=str(self.work / ".spill")))
        try:
            context = StepContext(recipe=recipe, work=self.work, lake=lake, store=self.store, seed=recipe.seed)
            for step in steps or (DATASET,):
                ran = run_step(replace(context), step, **options)
            return ran
        finally:
            lake.close()

    @property
    def dataset(self) -> WindowSet:
        return WindowSet.load(self.work / "dataset")


@pytest.fixture
def train(tmp_path: Path, store: Store) -> Training:
    return Training(tmp_path, store)


def of(device: str, dataset: WindowSet) -> np.ndarray:
    return dataset.windows[dataset.devices == device]


def test_windows_hold_what_the_devices_recorded(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    outputs = train().record.outputs
    assert outputs["rows"] == 8 * 1_200
    assert outputs["streams"] == {"doing": 8, "motion": 8}
    assert outputs["sample_rate_hz"] == 50.0
    assert outputs["dtypes"] == ["float32", "float32"]
    # 47 windows of each device; the two at the changes of label, which fall within a window, are dropped.
    dataset = train.dataset
    assert outputs["windows"] == len(dataset) == 8 * (47 - 2)
    assert outputs["dropped"] == {"mixed": 16, "unlabelled": 0}
    assert outputs["classes"] == {"moving": 8 * 15, "still": 8 * 30}
    assert outputs["sha256"] == dataset.sha256()
    draw = np.random.default_rng(3)
    values = (draw.normal(size=(2, 1_200)) * np.where(np.arange(1_200) // 400 == 1, 3.0, 0.1)).astype(np.float32)
    found = of("walker-3", dataset)
    assert (found[0] == values[:, :50].T).all()
    assert (found[-1] == values[:, 1_150:].T).all()
    assert dataset.ends_us[0] == START_US + 49 * STEP_US
    assert dataset.starts_us[0] == START_US


def test_rows_are_taken_in_recorded_order_epoch_by_epoch(store: Store, train: Training) -> None:
    """The second epoch has the lower name; within an epoch the clock was set back once."""
    ts = START_US + np.arange(300) * STEP_US
    back = ts.copy()
    back[200:] -= 150 * STEP_US
    bring_in(store, "motion", "a", epoch=2, ts=back, x=np.arange(300, dtype=np.float64), y=np.arange(300) % 7)
    later = ts + 150 * STEP_US  # without a gap: only the epoch tells that the device began anew
    bring_in(store, "motion", "a", epoch=1, ts=later, x=1_000 + np.arange(300, dtype=np.float64), y=np.arange(300) % 7)
    text = RECIPE.replace('[labels]\nstream = "doing"\nfield = "what"\n', "").replace("classification", "anomaly")
    assert train(text).record.outputs["labels"] is None
    found = of("a", train.dataset)
    firsts = found[:, 0, 0].tolist()
    assert firsts == [*range(0, 151, 25), *range(200, 251, 25), *range(1_000, 1_251, 25)]
    assert (np.diff(found[:, :, 0], axis=1) == 1).all()
    assert train.dataset.labels is None


def test_rows_of_one_moment_come_in_one_order_where_sql_leaves_out_the_recorded_one(
    store: Store, train: Training
) -> None:
    ts = START_US + np.arange(400) // 4 * STEP_US
    bring_in(store, "motion", "a", ts=ts, x=np.arange(400) * 7 % 400, y=np.zeros(400))
    bring_in(store, "doing", "a", ts=[START_US], what=["still"])
    found = set()
    for order in ("x", "x DESC"):
        sql = f"SELECT _device, ts, x, y FROM (FROM motion ORDER BY {order})"
        text = RECIPE.replace('["x", "y"]', f'["x", "y"]\nsql = "{sql}"')
        found.add(train(text).record.outputs["sha256"])
    assert len(found) == 1


def test_values_are_cast_once_and_null_is_nan(store: Store, train: Training) -> None:
    count = 50
    big = 2**60 + 2**36 + 1  # float64 rounds it to what float32 then rounds down; its own float32 is higher
    assert np.float32(np.float64(big)) != np.float32(np.int64(big))
    columns = {
        "x": pa.array([None, 0.1, float("nan"), 1e300] + [2.5] * (count - 4), pa.float64()),
        "y": pa.array([None, True] + [False] * (count - 2), pa.bool_()),
        "n": pa.array([None, big, -3] + [7] * (count - 3), pa.int64()),
    }
    bring_in(store, "motion", "a", ts=START_US + np.arange(count) * STEP_US, **columns)
    bring_in(store, "doing", "a", ts=[START_US], what=["still"])
    text = RECIPE.replace('["x", "y"]', '["n", "x", "y"]')
    assert train(text).record.outputs["dtypes"] == ["int64", "float64", "bool"]
    window = train.dataset.windows[0]
    assert np.isnan(window[0]).all()
    assert window[1].tolist() == [np.float32(np.int64(big)), np.float32(0.1), 1.0]
    assert window[2, 0] == -3.0
    assert np.isnan(window[2, 1])
    assert np.isinf(window[3, 1])


def test_a_dataset_is_skipped_until_the_lake_has_more(store: Store, train: Training) -> None:
    bring_in_walkers(store, 4)
    first = train().record
    assert train().skipped
    bring_in_walkers(store, 4, since_us=START_US + 60_000_000)
    assert train(keep_pins=True).skipped
    second = train().record
    assert second.outputs["rows"] == 2 * first.outputs["rows"]
    assert second.pins == {"raw/doing": 8, "raw/motion": 8}


def test_a_dataset_at_an_older_version_is_the_dataset_of_then(store: Store, train: Training) -> None:
    bring_in_walkers(store, 4)
    then = train().record
    bring_in_walkers(store, 4, since_us=START_US + 60_000_000)
    text = RECIPE.replace('stream = "motion"', f'stream = "motion"\nversion = {then.pins["raw/motion"]}', 1)
    again = train(text).record
    assert again.outputs["rows"] == then.outputs["rows"]
    assert again.outputs["sha256"] == then.outputs["sha256"]


def test_labels_that_are_corrected_make_another_dataset(store: Store, train: Training) -> None:
    bring_in_walkers(store, 4)
    before = train().record
    bring_in(store, "doing", "walker-0", ts=[START_US + 100 * STEP_US], what=["falling"])
    after = train().record
    assert after.pins == before.pins | {"raw/doing": before.pins["raw/doing"] + 1}
    assert after.outputs["classes"]["falling"] > 0


def test_the_checks_divide_by_device_and_report(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    ran = train(RECIPE, DATASET, CHECKS)
    outputs = ran.record.outputs
    assert outputs["verdict"] == "ok"
    assert (outputs["train"], outputs["test"]) == (6 * 45, 2 * 45)
    assert set(ran.record.files) == {"split.npz", "report.json", "report.txt"}
    assert train(RECIPE, DATASET, CHECKS).skipped


def test_one_class_only_stops_with_a_report(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    text = RECIPE.replace(
        'stream = "doing"\nfield = "what"', "sql = \"SELECT DISTINCT _device, ts, 'same' AS label FROM doing\""
    )
    with pytest.raises(ChecksFailedError, match=r"labels: all windows have the label same.*report.txt"):
        train(text, DATASET, CHECKS)
    report = json.loads((train.work / "checks.failed" / "report.json").read_text())
    assert report["verdict"] == "fail"
    assert not (train.work / "checks").exists()


def test_nan_labels_stop_with_a_report(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    sql = "SELECT _device, ts, CASE what WHEN 'still' THEN 'NaN'::DOUBLE ELSE 1.0 END AS label FROM doing"
    with pytest.raises(ChecksFailedError, match=r"labels: 16 labels are NaN or empty \(leave such rows out"):
        train(RECIPE.replace('stream = "doing"\nfield = "what"', f'sql = "{sql}"'), DATASET, CHECKS)


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ('stream = "motion"', 'stream = "nothing"', DataError, "no stream 'nothing'"),
        ('["x", "y"]', '["x", "z"]', RecipeError, "no field 'z'; it has x, y"),
        ('["x", "y"]', '["x", "y"]\nsql = "SELECT _device, ts, x FROM motion"', RecipeError, "no 'y'"),
        ('["x", "y"]', '["x", "y"]\nsql = "FROM motion WHERE false"', DataError, "no rows of motion at"),
        (
            '"f1_macro"',
            '"nope"',
            RecipeError,
            r"\[search\] metric = 'nope' is no scorer of scikit-learn; choose such as",
        ),
        ('["x", "y"]', '["x", "y"]\nsql = "SELEC 1"', RecipeError, r"\[data\] sql: the query cannot be read at line 1"),
        ('stream = "doing"', 'stream = "dooing"', RecipeError, r"\[labels\] stream: .*'dooing'.* it has doing, motion"),
        ("[search]", "[families.extra_trees]\ntrees = 3\n[search]", RecipeError, "extra_trees.*trees.*mend its keys"),
        ("rows = 50", "rows = 5000", DataError, "9600 rows of 8 devices give no window: none has 5000 readings"),
        ('["x", "y"]', '["x", "y"]\ndataset_bytes_max = 9999', DataError, "more than 9999 bytes.*stride"),
        ('["x", "y"]', '["x", "y"]\ndevice_rows_max = 99', DataError, "walker-0 has more than 99 rows"),
        ('by = "device"', "by = \"group\"\ngroup = '^runner'", DataError, "does not match for device 'walker-0'"),
        (
            'stream = "doing"\nfield = "what"',
            "sql = \"SELECT 'b' AS _device, now() AS ts, 'x' AS label\"",
            DataError,
            "no window",
        ),
    ],
)
def test_what_gives_no_dataset_is_told_with_the_remedy(
    store: Store, train: Training, old: str, new: str, error: type[Exception], words: str
) -> None:
    bring_in_walkers(store)
    with pytest.raises(error, match=words):
        train(RECIPE.replace(old, new, 1))
    assert not (train.work / "dataset").exists()
    assert not (train.work / "dataset.json").exists()


def test_groups_may_come_from_sql(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    sql = "SELECT DISTINCT _device, 'house ' || right(_device, 1)::INT // 2 AS \\\"group\\\" FROM motion"
    outputs = train(
        RECIPE.replace('by = "device"', f'by = "group"\ngroup_sql = "{sql}"'), DATASET, CHECKS
    ).record.outputs
    assert outputs["split"].startswith("test: group in (house ")
    assert outputs["test"] == 2 * 45


def test_a_device_of_two_groups_is_refused(store: Store, train: Training) -> None:
    """Which of the two counted would be chance, and with it who is on both sides."""
    bring_in_walkers(store, 4)
    sql = "SELECT _device, 'ann' AS \\\"group\\\" FROM motion UNION SELECT 'walker-2', 'bob'"
    with pytest.raises(
        DataError, match=r"device 'walker-2' the groups '(ann|bob)' and '(ann|bob)'.*Give each device one"
    ):
        train(RECIPE.replace('by = "device"', f'by = "group"\ngroup_sql = "{sql}"'))


def headwater(train: Training, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "headwater", "train", *arguments, str(train.folder / "recipe.toml")]
    command += ["--lake", train.store.url, "--work", str(train.folder / "work"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=train.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_dataset_that_is_killed_is_made_whole_by_the_next_run(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    whole = train().record
    kept = (train.work / "dataset.json").read_bytes()
    # The rows come slowly, so that the process is surely killed in the middle of writing windows.
    slow = "FROM motion WHERE (SELECT count(*) FROM range(3_000_000_000)) > 0"
    (train.folder / "recipe.toml").write_text(RECIPE.replace('["x", "y"]', f'["x", "y"]\nsql = "{slow}"'))
    process = headwater(train, "dataset")
    deadline = time.monotonic() + 60
    while not (train.work / ".dataset.draft" / "windows.npy").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (train.work / "dataset.json").read_bytes() == kept
    assert train.dataset.sha256() == whole.outputs["sha256"]
    assert train(RECIPE, DATASET).skipped
    assert not train(RECIPE, DATASET, force=True).skipped
    assert not (train.work / ".dataset.draft").exists()
    assert train.dataset.sha256() == whole.outputs["sha256"]


def test_fields_that_no_stream_has_are_named_beside_those_that_there_are(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    with pytest.raises(RecipeError, match=r"\[labels\] field: the stream doing has no field 'zz'; it has what$"):
        train(RECIPE.replace('field = "what"', 'field = "zz"'))
    with pytest.raises(RecipeError, match=r"\[data\] fields: the stream motion has no field 'ts'; it has x, y\."):
        train(RECIPE.replace('["x", "y"]', '["x", "ts"]'))


def test_ctrl_c_ends_a_long_question_at_once_and_the_next_run_is_whole(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    hours = "FROM motion WHERE (SELECT sum(a.range * b.range % 7) FROM range(10000000) a, range(10000000) b) > 0"
    (train.folder / "recipe.toml").write_text(RECIPE.replace('["x", "y"]', f'["x", "y"]\nsql = "{hours}"'))
    process = headwater(train, "dataset")
    try:
        wait_until((train.work / ".dataset.draft").exists, PATIENCE_S, "the step has begun")
        works = psutil.Process(process.pid)
        begun_s = sum(works.cpu_times()[:2])
        wait_until(lambda: sum(works.cpu_times()[:2]) - begun_s > 2.0, PATIENCE_S, "the question is at work")
        asked_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (Exit.INTERRUPTED, "", "")
    assert time.monotonic() - asked_s < 10.0
    assert not train(RECIPE, DATASET).skipped
    assert not (train.work / ".dataset.draft").exists()


def test_a_disk_without_room_is_told_and_nothing_stays(store: Store, train: Training) -> None:
    """A file size limit refuses the 144 kB of windows as a full disk would."""
    bring_in_walkers(store)
    (train.folder / "recipe.toml").write_text(RECIPE)

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))

    process = headwater(train, "dataset", preexec_fn=small_disk)
    _, err = process.communicate(timeout=60)
    assert process.returncode == Exit.FAILED, err
    assert "cannot write in" in err
    assert "make room there" in err
    assert sorted(path.name for path in train.work.iterdir()) == [".lock"]
    assert headwater(train, "dataset").wait(60) == Exit.OK


def test_the_commands_answer_with_json_and_exit_statuses(store: Store, train: Training) -> None:
    bring_in_walkers(store)
    (train.folder / "recipe.toml").write_text(RECIPE)
    early = headwater(train, "checks")
    assert "headwater train dataset" in early.communicate()[1]
    assert early.returncode == Exit.USAGE
    process = headwater(train, "run", "--until", "checks")
    out, err = process.communicate()
    assert process.returncode == Exit.OK, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines] == [("dataset", False), ("checks", False)]
    assert err == ""
    (train.folder / "recipe.toml").write_text(RECIPE + "\n[checks]\nwindows_min = 100000\n")
    failed = headwater(train, "run", "--until", "checks", "--force", "checks")
    out, err = failed.communicate()
    assert failed.returncode == Exit.FAILED
    skipped, last = (json.loads(line) for line in out.splitlines())
    assert skipped["skipped"]
    assert last["failed"]
    assert last["report"]["verdict"] == "fail"
    assert "size: 360 windows" in err

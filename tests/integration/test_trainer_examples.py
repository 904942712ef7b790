"""The recipes in `examples/` give checked datasets of the data they are written for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from lake.query import Lake
from lake.store import Store
from simulators.recordings import LABELS_STREAM, STREAM, by_device, labels_table, load_watch, watch_table
from tests.integration.trainer_lake import START_US, bring_in, open_lake
from trainer.pipeline import CHECKS, DATASET
from trainer.recipe_file import load_recipe
from trainer.steps import StepContext, run_step

EXAMPLES = Path(__file__).parents[2] / "examples"
MACHINE = Path(__file__).parents[3] / "shared/data/nab/machine_temperature_system_failure.csv"


def checked(example: str, store: Store, folder: Path) -> StepContext:
    """The context after dataset and checks."""
    recipe = load_recipe(EXAMPLES / example / "recipe.toml")
    lake = Lake(store)
    try:
        context = StepContext(recipe=recipe, work=folder, lake=lake, store=store, seed=recipe.seed)
        for step in (DATASET, CHECKS):
            run_step(context, step)
    finally:
        lake.close()
    return context


def test_the_watch_example_keeps_people_apart(tmp_path: Path) -> None:
    store = open_lake(tmp_path / "lake")
    for device, recordings in list(by_device(load_watch()).items())[:10]:
        watch, labels = watch_table(recordings), labels_table(recordings)
        exercise = np.array(labels["exercise"].to_pylist())
        changes = labels.take(np.flatnonzero(np.append(True, exercise[1:] != exercise[:-1])))
        for stream, table in ((STREAM, watch), (LABELS_STREAM, changes)):
            ts = table["ts"].cast(pa.int64()).to_numpy() + START_US
            fields = {name: table[name].combine_chunks() for name in table.column_names if name != "ts"}
            bring_in(store, stream, device, batch_rows=5_000, ts=ts, **fields)
    context = checked("watch", store, tmp_path / "work")
    dataset, split = context.windows(), context.split()
    assert set(dataset.groups.tolist()) == {f"s0{number}" for number in range(1, 6)}
    assert dataset.classes == ("ABD", "ER", "FEL", "IR", "PEN", "ROW", "TRAP")
    judged = set(dataset.groups[split.test].tolist())
    assert len(judged) == 1
    assert all(group not in judged for group in dataset.groups[split.train])
    assert all(
        re.match(rf"watch-{group}-[lr]", device) for device, group in zip(dataset.devices, dataset.groups, strict=True)
    )
    assert context.outputs("dataset")["sample_rate_hz"] == 50.0


@pytest.mark.skipif(not MACHINE.exists(), reason=f"the recording {MACHINE} is not beside this checkout")
def test_the_machine_example_knows_the_four_failures(tmp_path: Path) -> None:
    rows = pacsv.read_csv(MACHINE)
    ts = rows["timestamp"].cast(pa.timestamp("us")).cast(pa.int64()).combine_chunks()
    store = open_lake(tmp_path / "lake")
    stream = "machine-temperature"
    bring_in(store, stream, "machine-1", batch_rows=5_000, ts=ts, value=rows["value"].combine_chunks())
    context = checked("machine-temperature", store, tmp_path / "work")
    dataset, split = context.windows(), context.split()
    assert context.outputs("dataset")["rows"] == 22_695
    failing = dataset.labels == "failure"
    stretches = np.flatnonzero(np.diff(failing.astype(int)) == 1)
    assert len(stretches) == 4
    began = [str(moment)[:10] for moment in dataset.starts_us[stretches + 1].astype("datetime64[us]")]
    assert began == ["2013-12-10", "2013-12-15", "2014-01-27", "2014-02-07"]
    assert dataset.ends_us[split.train].max() < dataset.starts_us[split.test].min()

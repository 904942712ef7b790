"""`headwater monitor` and `headwater label` as they are typed, over a folder and over a bucket.

Mutants tried, each found here: labels added again by a second import; the labels of one device taken for all; every
labelled window counted as right.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lake.labels import PATH as LABELS
from lake.monitoring.triggers import PATH as TRIGGERS
from lake.store import Store
from tests.integration.gateway_parts import ROOT, s3_environ
from tests.integration.servers import StoreServer
from tests.integration.test_lake_s3 import s3_settings
from tests.monitoring_parts import MODEL, NOW_US, STREAM, Device, World, reference, release, store_in

BEFORE = "2020-01-01"


class Typed:
    """A lake, and what is typed about it."""

    def __init__(self, store: Store, environ: dict[str, str], folder: Path) -> None:
        self.store, self.folder, self._environ = store, folder, environ

    def run(self, *words: str) -> tuple[int, str, str]:
        argv = (sys.executable, "-m", "headwater", *words, "--lake", self.store.url)
        environ = os.environ | self._environ
        ended = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    def json(self, *words: str) -> list[dict]:
        status, out, err = self.run(*words, "--json")
        assert (status, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(params=["file", "s3"])
def typed(request: pytest.FixtureRequest, tmp_path: Path) -> Typed:
    if request.param == "file":
        return Typed(store_in(tmp_path / "lake"), {}, tmp_path)
    server: StoreServer = request.getfixturevalue("object_store")
    environ = s3_environ(server.access) | {"AWS_ENDPOINT_URL": server.access.endpoint, "AWS_ALLOW_HTTP": "true"}
    return Typed(Store(s3_settings(server)), environ, tmp_path)


def test_drift_and_late_labels_of_each_device_are_told_and_a_training_is_asked_for(typed: Typed) -> None:
    world = World(np.random.default_rng(3))
    release(typed.store, reference(world), recipe=f'[labels]\ntable = "{LABELS}"\n')
    wrong, drifted, right = (Device(typed.store, f"watch-{number}") for number in (1, 2, 3))
    features, scores, labels = world.windows(200, label="run")
    wrong.predict(features, scores, np.where(np.arange(200) < 150, labels, "walk"))
    right.predict(*world.windows(200))
    drifted.predict(*world.windows(200))
    drifted.predict(*world.windows(100, shift=4.0))
    found = {line["device"]: line for line in typed.json("monitor", MODEL, "--since", BEFORE, "--windows", "100")}
    assert {name: line["windows"] for name, line in found.items()} == {
        "watch-1": 200,
        "watch-2": 300,
        "watch-3": 200,
    }
    assert {line["accuracy"] for line in found.values()} == {None}
    assert found["watch-3"]["drifted_share"] == 0
    assert found["watch-2"]["drifted_share"] >= 5 / 20
    assert {each["name"] for each in found["watch-2"]["features"]} == {"f0", "f1", "f2", "f3", "f4"}

    # Of the first device it turns out that it was running all the time.
    minutes = [NOW_US + 60_000_000 * number for number in range(-1, 4)]
    rows = [f"watch-1,{start},{end},run" for start, end in itertools.pairwise(minutes)]
    file = typed.folder / "labels.csv"
    file.write_text("\n".join(["device,start,end,label", *rows[:3]]))
    assert typed.json("label", "import", str(file), "--stream", STREAM) == [{"rows": 3, "added": 3, "known": 0}]
    file.write_text("\n".join(["device,start,end,label", *rows]))
    assert typed.json("label", "import", str(file), "--stream", STREAM) == [{"rows": 4, "added": 1, "known": 3}]
    assert typed.json("lake", "sql", f'SELECT count(*) AS n FROM "{LABELS}"') == [{"n": 4}]
    found = {line["device"]: line for line in typed.json("monitor", MODEL, "--since", BEFORE)}
    assert {name: line["accuracy"] for name, line in found.items()} == {
        "watch-1": 0.75,
        "watch-2": None,
        "watch-3": None,
    }
    assert found["watch-1"]["coverage"] == 1
    status, table, _ = typed.run("monitor", "--since", BEFORE)
    assert status == 0
    assert f"{MODEL}@1" in table
    assert "75.0%" in table

    [asked] = typed.json("monitor", MODEL, "--retrain", "the road was repaved")
    assert asked["model"] == MODEL
    [trigger] = typed.json("lake", "sql", f'SELECT model, kind, event, why FROM "{TRIGGERS}"')
    assert (trigger["model"], trigger["event"], trigger["why"]) == (MODEL, "requested", "the road was repaved")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("monitor", "nothing"), 2, "headwater release list"),
        (("monitor", "--since", "yesterday"), 2, "--since 'yesterday'"),
        (("monitor", "--retrain", "why"), 2, "name it"),
        (("label", "import", "nowhere.csv", "--stream", STREAM), 2, "nowhere.csv"),
        (("label", "import", "labels.csv", "--stream", STREAM, "--unit", "h"), 2, "--unit 'h'"),
        (("label", "import", "labels.csv", "--stream", STREAM, "--columns", "who=x"), 2, "--columns 'who=x'"),
        (("label", "import", "labels.csv", "--stream", STREAM), 2, "start"),
        (("label", "import", "good-labels.csv", "--stream", STREAM), 2, "import with --allow-unknown"),
    ],
)
def test_what_is_wrong_is_one_line_with_a_remedy(tmp_path, monkeypatch, words, status, said):
    typed = Typed(store_in(tmp_path / "lake"), {}, tmp_path)
    (tmp_path / "labels.csv").write_text("device,begin,end,label\nwatch-1,1,2,run\n")
    (tmp_path / "good-labels.csv").write_text("device,start,end,label\nwatch-1,1,2,run\n")
    words = tuple(str(tmp_path / word) if word.endswith("labels.csv") else word for word in words)
    found, out, err = typed.run(*words)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert said in err


def test_labels_may_come_before_their_rows_where_that_is_said(tmp_path):
    typed = Typed(store_in(tmp_path / "lake"), {}, tmp_path)
    file = tmp_path / "labels.csv"
    file.write_text("device,start,end,label\nwatch-1,1,2,run\n")
    imported = typed.json("label", "import", str(file), "--stream", STREAM, "--allow-unknown")
    assert imported == [{"rows": 1, "added": 1, "known": 0}]

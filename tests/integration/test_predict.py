"""Batch scoring into `predictions/<model>`: every window once, whatever came late and whoever was killed.

The oracle cuts the windows of every lane by the rule (`trainer.windows`) out of what was sent, all at once, and takes
means with numpy.

Mutants tried, each made a test fail: reading on from the first row that is not done; no look at what runs over a span
wrote; progress moved by a run over a span; a partly read batch counted as done; no counter of runs;
the row within the batch ignored when cutting goes on.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest

from contract.inference import decode_response
from lake.errors import CommitConflictError
from lake.predictions import PredictionTable, predictions_path
from tests.integration.gateway_parts import ROOT, GatewayProcess
from tests.integration.predict_parts import BASE_US, STREAM, Fleet, in_pieces, open_lake, open_store, run
from tests.integration.release_parts import release
from tests.unit import onnx_models
from tests.unit.inference_parts import body, manifest
from trainer import answers
from trainer import predict as module
from trainer.errors import DataError
from trainer.predict import ALL_TIME, Span
from trainer.rows import as_float32
from trainer.windows import views, window_starts

RULE = {"rows": 4, "stride": 3, "gap_s": 10.0}


@pytest.fixture(params=[3, 6], ids=["overlapping", "apart"])
def stride(request):
    return request.param


@pytest.fixture
def store(tmp_path, stride):
    found = open_store(tmp_path)
    release(found, manifest(**{**RULE, "stride": stride}), onnx_models.classifier())
    return found


@pytest.fixture
def fleet(store):
    return Fleet(store)


def expected(fleet: Fleet, stride: int, span: Span = ALL_TIME) -> dict[tuple, tuple]:
    """Key of each window → what stands of it in the table."""
    rule = manifest(**{**RULE, "stride": stride}).window
    found = {}
    for (device, epoch), batches in fleet.sent.items():
        table = pa.Table.from_batches(batches)
        ts = table.column("ts").cast(pa.int64()).to_numpy()
        values = np.stack([as_float32(table.column("x")), as_float32(table.column("y"))], axis=1)
        place = [(seq, row) for seq, batch in enumerate(batches, 1) for row in range(batch.num_rows)]
        for start in window_starts(ts, rule):
            end = start + rule.rows - 1
            if (span.since_us or -(2**62)) <= ts[end] < (span.until_us or 2**62):
                window = views(values, rule.rows)[start]
                means = window.astype(np.float64).mean(axis=0).astype(np.float32)
                found[device, epoch, *place[end]] = (
                    *place[start],
                    int(ts[start]),
                    int(ts[end]),
                    int(np.isnan(window).sum()),
                    tuple(means.view(np.uint32).tolist()) if not np.isnan(means).any() else None,
                )
    return found


def written(store, model="shaker") -> dict[tuple, tuple]:
    """The same of the table. A window that is in it twice is an error."""
    query = f'SELECT *, epoch_us(window_start) AS s, epoch_us(window_end) AS e FROM "{predictions_path(model)}"'
    rows = open_lake(store).sql(query).to_pylist()
    found = {}
    for row in rows:
        key = row["device"], row["epoch"], row["seq"], row["row"]
        assert key not in found, f"{key} is there twice"
        features = np.array(row["features"], np.float32)
        bits = None if np.isnan(features).any() else tuple(features.view(np.uint32).tolist())
        found[key] = row["first_seq"], row["first_row"], row["s"], row["e"], row["nan_count"], bits
        assert (row["release"], row["stream"]) == (1, STREAM)
        assert row["label"] in ("low", "high")
    return found


def test_a_history_is_scored_once_and_a_second_run_has_nothing_to_do(store, fleet, stride):
    fleet.send("pi-1", 1, [7, 1, 30, 2])
    fleet.send("pi-2", 1, [40])
    fleet.send("pi-3", 1, [3])
    first = run(store)
    assert written(store) == expected(fleet, stride)
    assert (first.windows, first.devices, first.rows) == (len(expected(fleet, stride)), 3, 83)
    second = run(store)
    assert (second.windows, second.rows, second.commits) == (0, 0, 0)


def test_the_bar_is_full_when_all_is_scored_and_leaves_out_what_was(store, fleet, stride):
    bar = Bar()
    for sizes, most in (([7, 1, 30, 2], 60), ([1, 5], 20), ([40], 45)):
        fleet.send("pi-1", 1, sizes)
        fleet.send("pi-2", 1, sizes[:1])
        run(store, progress=bar)
        assert sum(bar.steps) == bar.total
        assert 0 < bar.total <= most
        assert min(bar.steps) >= 0


class Bar:
    """Progress that is written down."""

    total = 0

    @contextmanager
    def track(self, what, total):
        self.total, self.steps = total, []
        yield self.steps.append


def test_windows_that_reach_over_the_end_of_a_run_are_neither_lost_nor_doubled(store, fleet, stride):
    """The stream grows by every small amount between runs."""
    for size in (2, 1, 1, 3, 1, 8, 1, 17):
        fleet.send("pi-1", 1, [size])
        run(store)
        assert written(store) == expected(fleet, stride)


def test_new_devices_and_late_epochs_are_scored_whenever_they_come(store, fleet, stride):
    fleet.send("pi-2", 5, [20], late_s=3600)
    run(store)
    fleet.send("pi-2", 3, [20])  # began an hour before the other
    fleet.send("pi-1", 1, [9])
    run(store)
    fleet.send("pi-2", 5, [9], late_s=3600)
    fleet.send("pi-2", 3, [9])
    run(store)
    assert written(store) == expected(fleet, stride)


def test_spans_write_their_windows_and_leave_the_others_to_later_runs(store, fleet, stride):
    fleet.send("pi-1", 1, [50, 20, 33])
    fleet.send("pi-2", 1, [61])
    middle = Span(BASE_US + 20_000_000, BASE_US + 60_000_000)
    run(store, span=middle)
    assert written(store) == expected(fleet, stride, middle)
    run(store, span=Span(BASE_US + 40_000_000, None))
    assert written(store) == expected(fleet, stride, Span(middle.since_us, None))
    fleet.send("pi-1", 1, [5])
    run(store)
    assert written(store) == expected(fleet, stride)


def test_a_span_reads_no_batch_behind_the_last_row_of_it(store, fleet, stride):
    """Clocks of these devices jump ahead and are set back, so the oracle looks at each row."""
    for device in ("pi-1", "pi-2"):
        fleet.send(device, 1, [20, 1, 30, 2, 40])
    fleet.send("pi-3", 1, [30], late_s=36_000)
    moment = BASE_US + 45_000_000
    needed = 0
    for batches in fleet.sent.values():
        early = [
            number for number, batch in enumerate(batches, 1) if min(batch["ts"].cast(pa.int64()).to_pylist()) < moment
        ]
        needed += sum(batch.num_rows for batch in batches[: max(early, default=0)])
    bar = Bar()
    found = run(store, span=Span(None, moment), progress=bar)
    assert written(store) == expected(fleet, stride, Span(None, moment))
    assert (found.devices, found.rows) == (2, needed)
    assert 0 < needed < 186
    assert sum(bar.steps) == bar.total
    run(store)
    assert written(store) == expected(fleet, stride)


@pytest.mark.parametrize("commit_rows", [1, 25])
def test_small_steps_give_the_same_table(store, fleet, stride, monkeypatch, commit_rows):
    monkeypatch.setattr(module, "COMMIT_ROWS", commit_rows)
    monkeypatch.setattr(module, "LANES_MAX", 1)
    monkeypatch.setattr(answers, "BATCH_MAX", 3)
    monkeypatch.setattr(module, "_by_lane", in_pieces(5))
    fleet.send("pi-1", 1, [7, 13, 30, 2])
    fleet.send("pi-2", 1, [11, 19])
    fleet.send("pi-2", 2, [11, 19])
    assert run(store).commits > 2
    assert written(store) == expected(fleet, stride)


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_9_in_the_middle_and_a_second_run_give_what_one_run_gives(tmp_path, store, fleet, stride, when):
    for device in ("pi-1", "pi-2", "pi-3"):
        fleet.send(device, 1, [15, 30, 8])
    program = (sys.executable, "-m", "tests.integration.predict_parts", str(tmp_path), "4", when)
    assert subprocess.run(program, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
    before = written(store)
    assert 0 < len(before) < len(expected(fleet, stride))
    again = run(store)
    assert written(store) == expected(fleet, stride)
    assert again.windows == len(expected(fleet, stride)) - len(before)


@pytest.mark.parametrize("span", [ALL_TIME, Span(BASE_US, None)], ids=["whole", "span"])
def test_of_two_runs_at_once_one_is_refused_and_nothing_is_doubled(store, fleet, stride, monkeypatch, span):
    fleet.send("pi-1", 1, [40])
    run(store)
    fleet.send("pi-1", 1, [40])
    append = PredictionTable.append

    def outrun(self, *arguments):
        monkeypatch.setattr(PredictionTable, "append", append)
        run(store, span=span)
        append(self, *arguments)

    monkeypatch.setattr(PredictionTable, "append", outrun)
    with pytest.raises(CommitConflictError, match="start this one again"):
        run(store, span=span)
    assert written(store) == expected(fleet, stride)
    assert run(store).windows == 0


def test_a_new_release_scores_the_whole_history_beside_the_old_one(store, fleet, stride):
    fleet.send("pi-1", 1, [40])
    run(store)
    release(store, manifest(**{**RULE, "stride": stride}, classes=("calm", "wild")), onnx_models.classifier())
    second = run(store)
    assert (second.version, second.windows) == (2, len(expected(fleet, stride)))
    counts = (
        open_lake(store)
        .sql('SELECT release, count(*) AS n FROM "predictions/shaker" GROUP BY ALL ORDER BY ALL')
        .to_pylist()
    )
    assert counts == [{"release": 1, "n": second.windows}, {"release": 2, "n": second.windows}]


def test_a_stream_without_a_field_of_the_model_or_none_at_all_is_refused(store, fleet):
    with pytest.raises(DataError, match="no stream 'vibration'"):
        run(store)
    assert "predictions" not in store.folders("")
    release(store, manifest("other", fields=("x", "z")), onnx_models.classifier())
    fleet.send("pi-1", 1, [5])
    with pytest.raises(DataError, match="'z'"):
        run(store, "other")


@pytest.mark.parametrize("stride", [3], indirect=True)
def test_the_gateway_and_batch_scoring_agree_to_the_bit(store, fleet, tmp_path, mosquitto):
    fleet.send("pi-1", 1, [300])
    run(store)
    rows = open_lake(store).sql('SELECT * FROM "predictions/shaker" WHERE nan_count = 0 ORDER BY seq, row').to_pylist()
    batch = fleet.sent["pi-1", f"{1:032x}"][0]
    values = np.stack([as_float32(_chunked(batch, name)) for name in ("x", "y")], axis=1)
    windows = np.stack([values[row["first_row"] : row["row"] + 1] for row in rows])
    assert len(rows) > 20
    with GatewayProcess(tmp_path, mosquitto.url, {"url": store.url}) as gateway:
        status, answer, _ = gateway.request(
            "POST", "/v2/models/shaker/infer", body(windows.astype(float).ravel().tolist(), windows.shape)
        )
    assert status == 200, answer
    found = {tensor.name: tensor for tensor in decode_response(answer).outputs}
    features = np.array(found["features"].data, np.float32).reshape(len(rows), 2)
    scored = np.array([row["features"] for row in rows], np.float32)
    assert np.array_equal(features.view(np.uint32), scored.view(np.uint32))
    assert found["label_name"].data == [row["label"] for row in rows]
    scores = np.array(found["score"].data, np.float32).reshape(len(rows), 2).max(axis=1)
    assert np.array_equal(scores, np.array([row["score"] for row in rows], np.float32))


def _chunked(batch, name):
    return pa.chunked_array([batch.column(name)])

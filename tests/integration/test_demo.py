"""`headwater demo`: real recordings over the whole road, then books that balance, and an exit status that says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from headwater import demo
from headwater.demo import DemoResult
from headwater.ledger import Totals
from headwater.plan import UpOptions, plan_devices, write_recordings
from headwater.values import compare
from tests.integration.servers import BrokerServer, StoreServer, alive, wait_until
from tests.integration.stacks import Running, headwater, wait_gone

# As the issue that founded the project lists them.
KEYS = (
    "rows_accepted rows_in_lake distinct lost duplicated gaps quarantined readings_per_s ack_ms wire_bytes_per_reading "
    "streams"
)


def check(result: dict[str, Any], devices: int) -> None:
    assert set(KEYS.split()) <= set(result)
    assert result["ok"] is True
    assert result["rows_accepted"] == result["rows_in_lake"] == result["distinct"] > 1_000
    bad = ("lost", "duplicated", "gaps", "quarantined", "waiting", "rows_changed", "breaks", "overruns")
    assert {name: result[name] for name in bad} == dict.fromkeys(bad, 0)
    assert len(result["streams"]) == 3 * devices
    assert sum(stream["rows_accepted"] for stream in result["streams"]) == result["rows_accepted"]
    assert {stream["stream"] for stream in result["streams"]} == {"watch", "exercise", "headwater.events"}
    # Readings of the watch and its labels; the agents' own events have no recording to compare with.
    events = sum(one["rows_accepted"] for one in result["streams"] if one["stream"] == "headwater.events")
    assert result["rows_compared"] == result["rows_accepted"] - events


@pytest.mark.timeout(300)
def test_a_demo_balances_and_answers_and_so_does_a_second_over_the_same_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with Running(tmp_path / "data", "demo", "--no-models", "--seconds", "8", "--devices", "2") as running:
            code = running.end()
        assert code == 0, running.complaints
        result = running.lines[-1]
        check(result, devices=2)
        assert result["exact"] is True
        assert result["restarts"] == {}
        assert result["ack_ms"]["p50"] <= result["ack_ms"]["p99"]
        assert 15 < result["wire_bytes_per_reading"] < 60
        assert result["readings_per_s"] > 500
        vigour, wrists, regularity = result["answers"]
        assert {row["subject"] for row in vigour["rows"]} == {1}
        assert {row["exercise"] for row in wrists["rows"]} <= {"PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"}
        assert [row["device"] for row in regularity["rows"]] == ["watch-s01-l", "watch-s01-r"]


@pytest.mark.timeout(200)
def test_a_demo_for_people_says_it_in_words_over_servers_of_yours(
    tmp_path: Path, mosquitto: BrokerServer, object_store: StoreServer
) -> None:
    access = object_store.access
    environment = {
        "AWS_ENDPOINT_URL": access.endpoint,
        "AWS_ACCESS_KEY_ID": access.key,
        "AWS_SECRET_ACCESS_KEY": access.secret,
        "AWS_ALLOW_HTTP": "true",
    }
    lake = f"s3://{access.bucket}/demo-for-people"
    options = ("--no-models", "--seconds", "3", "--devices", "1", "--broker", mosquitto.url, "--lake", lake)
    done = headwater("demo", "--data", str(tmp_path / "data"), *options, timeout_s=150, **environment)
    assert done.returncode == 0, done.stderr
    assert "Every reading is in the lake exactly once." in done.stdout
    assert "lost              0" in done.stdout
    assert "Which exercise was the most vigorous" in done.stdout
    # No key went into a file.
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert [path for path in files if access.secret.encode() in path.read_bytes()] == []


@pytest.mark.timeout(200)
def test_a_demo_in_which_processes_are_killed_still_balances(tmp_path: Path) -> None:
    with Running(
        tmp_path / "data", "demo", "--no-models", "--seconds", "14", "--devices", "2", "--broker", "mosquitto"
    ) as running:
        running.up()
        os.kill(running.child("watch-s01-l/agent.toml"), signal.SIGKILL)
        os.kill(running.child("gateway.toml"), signal.SIGKILL)
        code = running.end()
    assert code == 0, running.complaints
    result = running.lines[-1]
    check(result, devices=2)
    assert set(result["restarts"]) == {"device watch-s01-l", "gateway"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_demo_trains_rolls_out_notices_drift_and_learns_again_and_still_balances(tmp_path: Path) -> None:
    with Running(tmp_path / "data", "demo", "--seconds", "10") as running:
        code = running.end(500.0)
    assert code == 0, running.complaints
    result = running.lines[-1]
    assert result["models_trouble"] == ""
    assert result["lost"] == result["duplicated"] == result["rows_changed"] == result["breaks"] == 0
    first, second = result["models"]
    for model in (first, second):
        assert (model["name"], model["rollout"], model["devices"]) == ("watch-activity", "succeeded", 8)
    assert second["version"] > first["version"]
    # Seven exercises: chance is right once in seven. Most of these devices were learned from.
    assert first["accuracy"] > 0.7
    drift = result["drift"]
    assert drift["device"] == "watch-s01-l"
    assert drift["retrained"] is True
    assert 0 < drift["detected_after_s"] < 90
    assert drift["accuracy"][str(second["version"])] > drift["accuracy"][str(first["version"])]
    predicted = [one for one in result["streams"] if one["stream"] == "predictions.watch-activity"]
    assert {one["device"] for one in predicted} == {one["device"] for one in result["streams"]}
    assert all(one["rows_accepted"] == one["distinct"] > 0 for one in predicted)


@pytest.mark.timeout(200)
def test_ctrl_c_ends_a_demo_early_with_its_books(tmp_path: Path) -> None:
    with Running(
        tmp_path / "data", "demo", "--no-models", "--seconds", "600", "--devices", "1", "--speed", "50"
    ) as running:
        running.up()
        running.wait_for_rows("watch", 1_000)
        assert running.interrupt() == 0
    assert running.lines[-1]["ok"] is True
    assert running.lines[-1]["seconds"] < 300


@pytest.mark.timeout(200)
def test_ctrl_c_while_a_demo_counts_ends_it_at_once(tmp_path: Path) -> None:
    """Mutant tried: the signal only noted, as while devices send; or heard when the store has answered."""
    with Running(tmp_path / "data", "demo", "--no-models", "--seconds", "3", "--devices", "1") as running:
        running.up()
        children = list(running.children().values())
        devices = [pid for words, pid in running.children().items() if "agent.toml" in words]
        os.kill(running.child("-logtostderr=true mini"), signal.SIGSTOP)  # so that counting takes long
        wait_until(lambda: not running.catches(signal.SIGINT), 60.0, "the counting")
        assert not any(alive(pid) for pid in devices)
        running.signal(signal.SIGINT)
        assert running.end(10.0) == -signal.SIGINT  # 130 for a shell
    assert running.complaints == ""
    assert [line["event"] for line in running.lines] == ["up"]
    wait_gone(children)


def result_of(**changes: int) -> DemoResult:
    """The result of a run in which one thing went wrong."""
    from headwater.reconcile import Balance, StreamBalance
    from headwater.values import Values

    counts = {"rows_accepted": 10, "rows_in_lake": 10, "distinct": 10, "waiting": 0, "lost": 0, "duplicated": 0}
    books = {name: changes.get(name, number) for name, number in counts.items()}
    balance = Balance(streams=(StreamBalance(device="d", stream="s", exact=True, gaps=0, batches=1, **books),))
    values = Values(rows_compared=10, rows_changed=changes.get("rows_changed", 0), breaks=changes.get("breaks", 0))
    totals = Totals({}, {}, 0, {}, 0, 0, 0, {})
    run = demo._Run({}, {}, totals, 0, 1.0, None)
    stack: Any = type("Stack", (), {"restarts": {}})
    return demo._result(stack, run, balance, values, [], changes.get("gaps", 0), changes.get("quarantined", 0), None)


@pytest.mark.parametrize(
    "wrong", ["lost", "duplicated", "waiting", "gaps", "quarantined", "rows_changed", "breaks", "rows_accepted"]
)
def test_whatever_is_wrong_makes_the_demo_fail(wrong: str) -> None:
    """Mutants tried: each name left out of the list of what is bad."""
    assert result_of().ok
    assert not result_of(**{wrong: 0 if wrong == "rows_accepted" else 1}).ok


def test_a_changed_a_lost_and_a_doubled_value_are_found(tmp_path: Path) -> None:
    """The comparison of values against a lake that is wrong: nothing but the recording is needed to see it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    devices = plan_devices(UpOptions(data=tmp_path, devices=1), tmp_path)
    write_recordings(devices, tmp_path)
    played = pq.read_table(tmp_path / "watch-s01-l.parquet")
    labels = pq.read_table(tmp_path / "watch-s01-l.labels.parquet")

    def verdict(rows: pa.Table) -> tuple[int, int]:
        def sql(query: str) -> pa.Table:
            return rows if 'FROM "watch"' in query else labels.slice(0, 0)

        values = compare(sql, devices, {"watch-s01-l": 1}, "now()")
        return values.rows_changed, values.breaks

    looped = pa.concat_tables([played, played]).slice(100, 20_000).combine_chunks()
    assert verdict(looped) == (0, 0)
    assert verdict(pa.concat_tables([looped.slice(0, 5_000), looped.slice(5_001)])) == (0, 1)
    assert verdict(pa.concat_tables([looped.slice(0, 5_000), looped.slice(4_999)])) == (0, 1)
    ax = looped["ax"].combine_chunks().to_pylist()
    ax[7_000] += 1e-6
    assert verdict(looped.set_column(1, "ax", pa.array(ax, pa.float32()))) == (1, 0)

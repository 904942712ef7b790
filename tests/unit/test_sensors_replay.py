"""Driver `replay`: rows of a file, unchanged, in order, each when it is due.

Mutants tried, each found: due time not divided by speed; block handed over before its time; order by time instead of
file; mean distance left out between loops; shift against the pass instead of the replay; NaN read as null; naive times
taken for local ones; start_s counted from zero; rows lost at the seam of two pieces; `stop` ignored while waiting.
"""

from __future__ import annotations

import gzip
import math
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.sensors.columns import Columns
from edge_agent.sensors.options import parse_options
from edge_agent.sensors.port import SensorConfigError, SensorError, SensorExhausted
from edge_agent.sensors.recording import parse_times
from edge_agent.sensors.replay import ReplayOptions, ReplaySensor

WALL_US = 1_700_000_000_000_000
DAY_US = 86_400_000_000


class FakeClock:
    """Stands still unless somebody waits."""

    def __init__(self) -> None:
        self.ns = 5_000_000_000

    def monotonic_ns(self) -> int:
        return self.ns

    def wall_us(self) -> int:
        return WALL_US


class FakeStop(threading.Event):
    """Waiting on it lets the clock go on; it is set after some time, if so asked."""

    def __init__(self, clock: FakeClock, stop_after_s: float = math.inf) -> None:
        super().__init__()
        self._clock, self._stop_ns = clock, clock.ns + stop_after_s * 1e9

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None and 0 < timeout <= 1.0, "every wait is short enough to be stopped"
        self._clock.ns += round(timeout * 1e9)
        if self._clock.ns >= self._stop_ns:
            self.set()
        return self.is_set()


class Player:
    """Plays a file on a fake clock."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.sensor = ReplaySensor(parse_options(ReplayOptions, options, "replay"), self.clock)
        self.stop = FakeStop(self.clock)
        self.sensor.open()
        assert self.sensor.schema is not None
        self.columns = Columns(self.sensor.schema)

    def next(self) -> tuple[float, list[dict[str, Any]]]:
        """Seconds since the opening, and the rows of the next block with `ts` in µs."""
        block = self.sensor.read(self.stop)
        assert block is not None
        batch = self.columns.block(block, 0)
        ts = batch.column("ts").view(pa.int64()).to_pylist()
        rows = batch.drop_columns(["ts"]).to_pylist()
        return (self.clock.ns - 5_000_000_000) / 1e9, [{"ts": at, **row} for at, row in zip(ts, rows, strict=True)]

    def rows(self, most: int = 100_000) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        try:
            while len(found) < most:
                found += self.next()[1]
        except SensorExhausted:
            pass
        return found


def write(path: Path, text: str) -> str:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_rows_come_when_they_are_due_and_close_ones_together(tmp_path: Path) -> None:
    lines = ["ts,x"] + [f"{at},{n}" for n, at in enumerate([0, 10, 20, 30, 150, 160, 2000])]
    player = Player(path=write(tmp_path / "a.csv", "\n".join(lines)), time_format="ms")
    seen = [(round(at, 2), [row["x"] for row in rows]) for at, rows in (player.next() for _ in range(4))]
    assert seen == [(0.0, [0]), (0.1, [1, 2, 3]), (0.2, [4, 5]), (2.0, [6])]
    with pytest.raises(SensorExhausted, match="ended after 7 rows"):
        player.sensor.read(player.stop)


@pytest.mark.parametrize("speed", [0.5, 1.0, 4.0])
def test_speed_divides_waiting_and_distances_and_kept_times_stay(tmp_path: Path, speed: float) -> None:
    path = write(tmp_path / "a.csv", "ts,x\n" + "".join(f"{at},{at}\n" for at in (100, 101, 103)))
    moved = Player(path=path, time_format="s", speed=speed)
    for at in (0, 1, 3):
        seconds, rows = moved.next()
        assert seconds == pytest.approx(at / speed, abs=1e-3)
        assert [row["ts"] for row in rows] == [WALL_US + round(at * 1e6 / speed)]
    kept = Player(path=path, time_format="s", speed=speed, keep_timestamps=True)
    assert [row["ts"] for row in kept.rows()] == [100_000_000, 101_000_000, 103_000_000]


def test_a_replay_that_lags_behind_is_not_held_up_by_grouping(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "ts,x\n" + "".join(f"{n},{n}\n" for n in range(20_000)))
    player = Player(path=path, time_format="ms", speed=1e6, block_rows=100)
    assert [row["x"] for row in player.rows()] == list(range(20_000))
    assert player.clock.ns - 5_000_000_000 < 0.2e9


def test_speed_0_does_not_wait_and_keeps_the_distances(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "ts,x\n" + "".join(f"{n * 3600},{n}\n" for n in range(100)))
    player = Player(path=path, time_format="s", speed=0, block_rows=30)
    sizes = [len(player.next()[1]) for _ in range(4)]
    assert sizes == [30, 30, 30, 10]
    assert player.clock.ns == 5_000_000_000
    again = Player(path=path, time_format="s", speed=0)
    assert [row["ts"] for row in again.rows()] == [WALL_US + n * 3_600_000_000 for n in range(100)]


def test_a_loop_goes_on_after_one_mean_distance_and_without_an_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "ts,x\n10,a\n11,b\n14,c\n")
    moved = Player(path=path, time_format="s", loop=True, speed=2)
    assert [((row["ts"] - WALL_US) / 1e6, row["x"]) for row in moved.rows(7)] == [
        (0, "a"), (0.5, "b"), (2, "c"), (3, "a"), (3.5, "b"), (5, "c"), (6, "a"),
    ]  # fmt: skip
    assert moved.clock.ns == pytest.approx(5_000_000_000 + 6e9, abs=1e7)
    kept = Player(path=path, time_format="s", loop=True, keep_timestamps=True)
    assert [row["ts"] for row in kept.rows(5)] == [10_000_000, 11_000_000, 14_000_000, 10_000_000, 11_000_000]
    single = Player(path=write(tmp_path / "one.csv", "ts,x\n10,1\n"), time_format="s", loop=True)
    assert [(row["ts"] - WALL_US) / 1e6 for row in single.rows(3)] == [0, 1, 2]


def test_rows_out_of_order_keep_their_place_and_their_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "ts,x\n10,1\n12,2\n11,3\n9,4\n13,5\n")
    player = Player(path=path, time_format="s")
    seen = [(round(at), [(row["x"], (row["ts"] - WALL_US) // 1_000_000) for row in rows]) for at, rows in
            (player.next() for _ in range(3))]  # fmt: skip
    assert seen == [(0, [(1, 0)]), (2, [(2, 2), (3, 1), (4, -1)]), (3, [(5, 3)])]


def test_start_s_leaves_out_the_beginning_of_each_loop(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "ts,x\n" + "".join(f"{at},{at}\n" for at in range(100, 106)))
    player = Player(path=path, time_format="s", start_s=4, loop=True)
    assert [((row["ts"] - WALL_US) / 1e6, row["x"]) for row in player.rows(4)] == [
        (0, 104),
        (1, 105),
        (2, 104),
        (3, 105),
    ]
    beyond = Player(path=path, time_format="s", start_s=6)
    with pytest.raises(SensorConfigError, match=r"no row from start_s = 6\.0 on"):
        beyond.sensor.read(beyond.stop)


def test_a_stop_ends_the_wait_and_loses_nothing(tmp_path: Path) -> None:
    player = Player(path=write(tmp_path / "a.csv", "ts,x\n0,1\n3600,2\n"), time_format="s")
    assert [row["x"] for row in player.next()[1]] == [1]
    assert player.sensor.read(FakeStop(player.clock, stop_after_s=5)) is None
    assert player.clock.ns < 5_000_000_000 + 7e9
    seconds, rows = player.next()
    assert round(seconds) == 3600 and [row["x"] for row in rows] == [2]


def test_opening_again_begins_again(tmp_path: Path) -> None:
    player = Player(path=write(tmp_path / "a.csv", "ts,x\n0,1\n1,2\n"), time_format="s", speed=0)
    assert [row["x"] for row in player.rows()] == [1, 2]
    player.sensor.close()
    player.sensor.close()
    with pytest.raises(SensorError, match="before it was opened"):
        player.sensor.read(player.stop)
    player.sensor.open()
    assert [row["x"] for row in player.rows()] == [1, 2]


MOMENT_US = 1_714_972_089_123_456
MOMENT = datetime.fromtimestamp(MOMENT_US // 1_000_000, tz=UTC).replace(microsecond=123456)


@pytest.mark.parametrize(
    ("text", "time_format", "timezone"),
    [
        ("2024-05-06T05:08:09.123456Z", "", "UTC"),
        ("2024-05-06T05:08:09.123456789Z", "iso8601", "Europe/Berlin"),
        ("2024-05-06 07:08:09.123456+02:00", "iso8601", "UTC"),
        (" 2024-05-06 07:08:09.123456 ", "", "Europe/Berlin"),
        ("1714972089.123456", "s", "UTC"),
        ("1714972089123.456", "ms", "UTC"),
        ("1714972089123456", "us", "UTC"),
        ("1714972089123456789", "ns", "UTC"),
        ("06.05.2024 07:08:09.123456", "%d.%m.%Y %H:%M:%S.%f", "Europe/Berlin"),
        ("06/05/24 05-08-09.123456 +0000", "%d/%m/%y %H-%M-%S.%f %z", "Europe/Berlin"),
    ],
)
def test_every_way_to_write_a_time_means_the_same_moment(
    tmp_path: Path, text: str, time_format: str, timezone: str
) -> None:
    path = write(tmp_path / "a.csv", f"when;x\n{text};1\n{text};2\n")
    options = {"time_column": "when", "time_format": time_format, "timezone": timezone, "delimiter": ";"}
    player = Player(path=path, keep_timestamps=True, **options)
    assert [row["ts"] for row in player.rows()] == [MOMENT_US, MOMENT_US]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([MOMENT_US * 1000 + 789], pa.timestamp("ns")),
        pa.array([MOMENT_US * 1000 + 789], pa.timestamp("ns", tz="Asia/Tokyo")),
        pa.array([MOMENT_US], pa.timestamp("us", tz="UTC")),
    ],
)
def test_timestamps_of_a_parquet_column_are_taken_to_the_microsecond(column: pa.Array) -> None:
    assert parse_times(column, "", "UTC").to_pylist() == [MOMENT_US]


@given(ns=st.integers(-(2**62), 2**62))
def test_nanoseconds_are_cut_down_also_before_1970(ns: int) -> None:
    assert parse_times(pa.array([ns]), "ns", "UTC").to_pylist() == [ns // 1000]


@settings(max_examples=60)
@given(us=st.integers(-50 * 365 * DAY_US, 100 * 365 * DAY_US))
def test_iso_text_and_epoch_seconds_come_back_to_the_microsecond(us: int) -> None:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + np.timedelta64(us, "us").item()
    text = pa.array([moment.isoformat(timespec="microseconds")])
    assert parse_times(text, "iso8601", "Europe/Berlin").to_pylist() == [us]
    assert parse_times(pa.array([us / 1e6]), "s", "UTC").to_pylist() == [us]
    assert parse_times(pa.array([us / 1e3]), "ms", "UTC").to_pylist() == [us]


def test_seconds_that_are_not_exact_in_binary_are_rounded_and_not_cut() -> None:
    # 1098554253.192844 s times a million is 1098554253192843.9 in float64.
    assert parse_times(pa.array([1098554253.192844]), "s", "UTC").to_pylist() == [1_098_554_253_192_844]
    assert parse_times(pa.array([1099902662413.827]), "ms", "UTC").to_pylist() == [1_099_902_662_413_827]


def test_values_of_a_csv_file_are_taken_as_they_are(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tsv.gz",
        "# made by hand\nts\ti\tf\ttext\tonly\n0\t1\t0.1\tNA\t\n1\t\tnan\t\t\n2\t-3\tinf\tÖl\t\n",
    )
    player = Player(path=path, time_format="s", skip_rows=1, speed=0, fields={"i": "int16", "f": "", "text": ""})
    assert player.sensor.schema == pa.schema([("i", pa.int16()), ("f", pa.float64()), ("text", pa.string())])
    rows = [(row["i"], row["f"], row["text"]) for row in player.rows()]
    assert repr(rows) == repr([(1, 0.1, "NA"), (None, math.nan, ""), (-3, math.inf, "Öl")])


def test_a_file_without_header_and_time_is_described_by_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "1,5;x\n2,5;y\n3,5;z\n")
    player = Player(
        path=path, columns=["v", "name"], delimiter=";", decimal_point=",", time_column="", rate_hz=4, speed=0
    )
    assert [((row["ts"] - WALL_US) / 1e6, row["v"], row["name"]) for row in player.rows()] == [
        (0, 1.5, "x"), (0.25, 2.5, "y"), (0.5, 3.5, "z"),
    ]  # fmt: skip


def test_parquet_rows_keep_their_types_and_seams_lose_nothing(tmp_path: Path) -> None:
    rows = 30_000
    table = pa.table(
        {
            "at": pa.array(np.arange(rows) * 20_000, pa.timestamp("us")),
            "x": np.arange(rows, dtype=np.float32),
            "half": np.zeros(rows, np.float16),
            "label": pa.array(["a", None, "b"] * (rows // 3)).dictionary_encode(),
            "spare": np.zeros(rows),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7_001)
    player = Player(
        path=str(tmp_path / "a.parquet"), time_column="at", fields=["x", "half", "label"], speed=0, block_rows=999
    )
    assert player.sensor.schema == pa.schema(
        [("x", pa.float32()), ("half", pa.float16()), ("label", pa.dictionary(pa.int32(), pa.string()))]
    )
    found = player.rows()
    assert [row["x"] for row in found] == list(range(rows))
    assert [row["label"] for row in found[:3]] == ["a", None, "b"]
    assert found[-1]["ts"] == WALL_US + (rows - 1) * 20_000
    declared = Player(path=str(tmp_path / "a.parquet"), time_column="at", fields={"x": "float64"}, speed=0)
    assert declared.sensor.schema == pa.schema([("x", pa.float64())])


def test_a_big_csv_file_is_read_in_pieces(tmp_path: Path) -> None:
    lines = "".join(f"{n},{n * 0.5},some text that takes room {n}\n" for n in range(400_000))
    path = write(tmp_path / "a.csv", "ts,x,text\n" + lines)
    before = pa.total_allocated_bytes()
    player = Player(path=path, time_format="s", speed=0)
    found = [player.next()[1] for _ in range(10)]
    assert 20_000 < sum(map(len, found)) <= 40_960
    # The file has 18 MB, of which the reader holds some ahead.
    assert pa.total_allocated_bytes() - before < 8_000_000
    assert player.rows(1_000_000)[-1]["x"] == 399_999 * 0.5
    # Row numbers go on from piece to piece, for the times of a file without times as for messages.
    timeless = Player(path=path, time_column="", rate_hz=1000, speed=0, fields=["x"])
    last = timeless.rows(1_000_000)[-1]
    assert (last["ts"] - WALL_US, last["x"]) == (399_999_000, 399_999 * 0.5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("ts,x\n", {}, "holds no rows"),
        ("", {}, "Empty CSV file; give a file with a header line and rows"),
        ("when,x\n1,2\n", {"time_format": "s"}, r"no time column 'ts'; its columns are \['when', 'x'\]"),
        ("ts,x\n1,2\n", {"time_format": "s", "fields": ["y"]}, "Column 'y' .* does not exist"),
        ("ts,x\n1,2\n", {"time_format": "s", "fields": ["ts"]}, "also in fields"),
        ("ts,x\nsoon,2\n", {}, "row 1: the time 'soon' in column 'ts' cannot be read with time_format ''"),
        ("ts,x\n2026-01-01,2\n2026-01-01T25,2\n", {}, "row 2: the time '2026-01-01T25'"),
        ("ts,x\n,2\n2026-01-01,3\n", {}, "row 1 has no time in column 'ts'"),
        (
            "ts,x\n2026-01-01T00:00,2\n2026-01-01T00:01Z,3\n",
            {},
            "row 2, column 'ts': the time '2026-01-01T00:01Z' has a zone, those before have none; write all with",
        ),
        ("ts,x,X\n2026-01-01,1,2\n", {}, "'x' and 'X', alike or different only by case; rename one in the file"),
        ("ts,x,x\n2026-01-01,1,2\n", {}, "'x' and 'x', alike"),
        ("ts,x,\n2026-01-01,1,2\n", {}, "field name '' has 0 bytes"),
        ("ts\n2026-01-01\n", {}, "no column beside the time"),
        ("ts,ts\n2026-01-01,1\n", {}, "2 columns 'ts'"),
        ("ts,x\n1,2\n", {"time_format": "minutes"}, "time_format 'minutes' is not known"),
        ("ts,x\n1,2\n", {"time_format": "s", "timezone": "Mars/Base"}, "timezone 'Mars/Base'"),
        ("ts,x\n1,2\n,3\n", {"time_format": "s"}, "row 2 has no time"),
        ("ts,x\n" + "1,2\n" * 60_000 + ",3\n", {"time_format": "s"}, "row 60001 has no time"),
        ("ts,x\n1,2\n2\n", {"time_format": "s"}, "Expected 2 columns, got 1: 2; mend that line"),
        ("ts,x\n1,2.5\n", {"time_format": "s", "fields": {"x": "int8"}}, "conversion error to int8"),
        ("ts,x\n1,2\n", {"time_format": "s", "fields": {"x": "number"}}, "unknown type 'number'"),
        ("ts,x\n1,2\n", {"time_column": ""}, "rate_hz is not above 0"),
        ("ts,x\n1,2\n", {"format": "xlsx"}, "'format' = 'xlsx'"),
        ("ts,x\n1,2\n", {"delimiter": ", "}, "not one character"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SensorConfigError, match=message):
        Player(path=write(tmp_path / "a.csv", text), speed=0, **options).rows()


def test_a_later_value_of_another_type_is_named_with_its_row(tmp_path: Path) -> None:
    text = "ts,x\n" + "".join(f"{n},{n}\n" for n in range(200_000)) + "200000,off\n"
    with pytest.raises(SensorConfigError, match=r"invalid value 'off'; mend that value, or declare the type"):
        Player(path=write(tmp_path / "a.csv", text), time_format="s", speed=0).rows(1_000_000)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"ts,x\n1,ok\n2,K\xfchler\n", r"row 2, column 'x': b'K\\xfchler' is not UTF-8; convert the file"),
        (b"ts,K\xfchler\n1,2\n", r"not UTF-8 .*; convert the file"),
        (b"ts,x\n" + b"1,ok\n" * 100_000 + b"2,K\xfchler\n", "invalid UTF8 data; convert the file"),
    ],
)
def test_text_that_is_not_utf_8_is_refused_and_never_binary(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(SensorConfigError, match=says):
        Player(path=str(tmp_path / "a.csv"), time_format="s", speed=0).rows(1_000_000)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(SensorConfigError, match=r"'/no/such\.csv' does not exist"):
        Player(path="/no/such.csv")


def test_a_parquet_file_without_the_named_column_says_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(SensorConfigError, match=r"no column 'ts'; its columns are \['a', 'b'\]"):
        Player(path=str(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(SensorConfigError, match="Parquet"):
        Player(path=str(tmp_path / "b.parquet"))

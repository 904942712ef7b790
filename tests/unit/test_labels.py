"""Labels out of files: every format, faults named by line, nothing added twice.

Mutants tried, each made a test here fail: rows taken from a file with faults; the header counted as no line; the end
not compared with the start; known rows added again.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.errors import ConfigurationError
from lake.labels import Columns, import_labels, read_file
from lake.query import Lake
from tests.monitoring_parts import store_in

START = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
UNITS = {"ns": 1_000_000_000, "us": 1_000_000}
START_US = 1_795_262_400_000_000


def row(label="walk", start=START_US, end=START_US + 60_000_000):
    return {"stream": "watch", "device": "w-1", "start": start, "end": end, "label": label}


def written(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_every_format_gives_the_same_rows(tmp_path):
    csv = written(
        tmp_path, "a.csv", "device,start,end,label\nw-1,2026-11-21T12:00:00Z,2026-11-21T13:01:00+01:00,walk\n"
    )
    naive = written(tmp_path, "b.csv", "device,start,end,label\nw-1,2026-11-21T12:00:00,2026-11-21T12:01:00,walk\n")
    text = f'{{"device": "w-1", "start": {START_US}, "end": {START_US + 60_000_000}, "label": "walk"}}'
    array, lines = written(tmp_path, "c.json", f"[{text}]"), written(tmp_path, "d.jsonl", text + "\n")
    parquet = tmp_path / "e.parquet"
    moments = (
        pa.array([START], pa.timestamp("ms", "UTC")),
        pa.array([START.replace(minute=1)], pa.timestamp("s", "UTC")),
    )
    pq.write_table(pa.table({"device": ["w-1"], "start": moments[0], "end": moments[1], "label": ["walk"]}), parquet)
    for path in (csv, naive, array, lines, parquet):
        assert read_file(path, "watch", Columns()) == [row()], path.name


def test_times_of_parquet_may_be_finer_than_a_microsecond_but_not_beyond_the_calendar(tmp_path):
    path = tmp_path / "ns.parquet"

    def write(start, unit):
        moments = pa.array([start, start + 60 * UNITS[unit]], pa.int64()).view(pa.timestamp(unit, "UTC"))
        columns = {"device": ["w-1"], "start": moments[:1], "end": moments[1:], "label": ["walk"]}
        pq.write_table(pa.table(columns), path, version="2.6")

    write(START_US * 1_000 + 999, "ns")
    assert read_file(path, "watch", Columns()) == [row()]
    write(300_000_000_000_000_000, "us")
    with pytest.raises(ConfigurationError, match=r"ns\.parquet has a time beyond the years 1 to 9999"):
        read_file(path, "watch", Columns())


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = written(tmp_path, "a.csv", "device,start,end,label,label\nw-1,1,2,walk,run\n")
    with pytest.raises(ConfigurationError, match="more than one column label; rename"):
        read_file(path, "watch", Columns())


def test_other_columns_another_unit_and_one_device_for_all(tmp_path):
    path = written(tmp_path, "a.csv", "from,to,what\n1795262400,1795262460.0,walk\n")
    assert read_file(path, "watch", Columns(start="from", end="to", label="what"), "s", "w-1") == [row()]


def test_every_fault_is_named_by_its_line_and_nothing_is_taken(tmp_path):
    text = "\n".join(
        [
            "device,start,end,label",
            "w-1,10,20,walk",
            "W 1,10,20,walk",
            "w-1,20,20,walk",
            "w-1,soon,20,walk",
            "w-1,30,40,",
            "w-1,10,30,run",
        ]
    )
    with pytest.raises(ConfigurationError) as caught:
        read_file(written(tmp_path, "a.csv", text), "watch", Columns())
    said = str(caught.value)
    for words in ("line 3 has the device 'W 1'", "line 4 ends", "line 5 has start = 'soon'", "line 6 has no label"):
        assert words in said
    assert "line 7 says 'run' from the moment for which line 2 says 'walk'" in said


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "x", "no known kind"),
        ("a.json", "{", "cannot be read"),
        ("a.csv", "device,label\nw,x\n", "no column start, end"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(tmp_path, name, text, words):
    path = tmp_path / name if text is None else written(tmp_path, name, text)
    with pytest.raises(ConfigurationError, match=words):
        read_file(path, "watch", Columns())


def test_a_file_imported_twice_or_once_it_has_grown_adds_only_what_is_new(tmp_path):
    store = store_in(tmp_path / "lake")
    first = import_labels(store, [row(), row()], "a.csv")
    assert (first.rows, first.added, first.known) == (2, 1, 1)
    assert import_labels(store, [row()], "a.csv").added == 0
    later = row("run", START_US + 60_000_000, START_US + 90_000_000)
    assert import_labels(store, [row(), later], "a.csv").added == 1
    lake = Lake(store)
    asked = lake.sql('SELECT device, label, epoch_us("start") AS s FROM labels ORDER BY s').to_pylist()
    assert asked == [
        {"device": "w-1", "label": "walk", "s": START_US},
        {"device": "w-1", "label": "run", "s": START_US + 60_000_000},
    ]
    lake.close()

"""What a lake promises to who asks it, and what its small tables promise. Inherited per kind of store.

Mutants tried, each made a test here fail: the version left out of `delta_scan`; gaps counted from the first seq that is
there; quarantine not subtracted; repeats of quarantine shown; statements other than SELECT let through; external access
left on; check-and-set without the look before, and without the application transaction.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lake.errors import CommitConflictError, NoSuchVersionError, QueryError, UnknownStreamError
from lake.quarantine import PATH, QuarantineRecord, QuarantineTable, key_of
from lake.query import HEAD_ROWS_MAX, Lake
from lake.raw import RawTable
from lake.store import Store
from lake.tables import ControlTable
from tests.contract.lake_reading import table_in
from tests.contract.lake_suite import EPOCH, NOW_US, A, B, commit, raw, rows

OTHER_EPOCH = "cd" * 16
DEVICES = pa.schema([pa.field("device", pa.string()), pa.field("seen", pa.int64())])


def bring_in(store: Store, stream: str, *batches: Any) -> int:
    """Commit batches to a stream; the version afterwards."""
    table = RawTable(store, stream)
    table.refresh()
    commit(table, *batches)
    table.refresh()
    return table.version


def answer(lake: Lake, query: str, at: Any = None) -> list[tuple[Any, ...]]:
    table = lake.sql(query, at=at)
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def record(**change: Any) -> QuarantineRecord:
    plain = QuarantineRecord(NOW_US, "hw/v1/up/1/a/s", "bad_body", "no", "a", "s", None, None, b"\x00payload")
    return plain._replace(**change)


UNANSWERABLE = [
    ("COPY s TO 'x.csv'", "only SELECT"),
    ("INSERT INTO s VALUES (1)", "only SELECT"),
    ("DROP VIEW s", "only SELECT"),
    ("CREATE TABLE t AS FROM s", "only SELECT"),
    ("EXPLAIN ANALYZE COPY s TO 'x.csv'", "only SELECT"),
    ("SET threads = 1", "only SELECT"),
    ("ATTACH 'x.db'", "only SELECT"),
    ("INSTALL spatial", "only SELECT"),
    ("SELECT 1; DROP VIEW s", "only SELECT"),
    ("SELECT 1; SELECT 2", "one question"),
    ("", "'' is empty"),
    ("-- only a remark", "is empty"),
    ("SELEC 1", 'line 1, column 1: syntax error at or near "SELEC"'),
    ("SELECT 'ü',\n 1 FORM s", 'line 2, column 9: syntax error at or near "s"'),
    ("EXPLAIN SELECT 1 FORM s", "line 1, column 23: syntax error"),
    ("SELECT nothing FROM s", 'cannot be answered: Referenced column "nothing" not found'),
    ("SELECT 1,\n nothing FROM s", "(line 2, at: nothing FROM s)"),
    ("SELECT 1 LIMIT 99999999999999999999", "cannot be answered: "),
    ("FROM read_text('/etc/hostname')", "disabled"),
    ("FROM '/etc/hostname'", "hostname"),
    ("FROM glob('/etc/*')", "disabled"),
    ("FROM read_parquet('https://127.0.0.1:1/x.parquet')", "disabled"),
    ("FROM enable_logging(storage = 'file', storage_path = 'x')", "FROM enable_logging(…) is not answered"),
    ("EXPLAIN ANALYZE SELECT * FROM Enable_Logging()", "enable_logging"),
    ("WITH c AS (SELECT * FROM truncate_duckdb_logs()) SELECT 1", "truncate_duckdb_logs"),
    ("FROM query('FROM enable_logging()')", "FROM query(…)"),
    ("FROM json_execute_serialized_sql(json_serialize_sql('FROM s'))", "json_execute_serialized_sql"),
    ("FROM delta_set_transaction_version('s', 'a', 1)", "delta_set_transaction_version"),
    ("SELECT (SELECT count(*) FROM arrow_scan(1, 2, 3))", "arrow_scan"),
    ("PIVOT s ON x USING count(*)", "IN"),
    ('FROM "../../etc"', "no stream"),
    ("FROM nothing", "it has headwater.events, s"),
    ("FROM headwater.events", "double quotes"),
]
"""Queries, and a part of what is said about each."""


class QuerySuite:
    """Promises of a lake that is asked."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def lake(self, store: Store) -> Any:
        lake = Lake(store)
        yield lake
        lake.close()

    def test_an_empty_lake_answers(self, lake: Lake) -> None:
        assert answer(lake, "SELECT 1") == [(1,)]
        assert lake.streams().num_rows == 0
        assert answer(lake, "FROM gaps") == []
        assert answer(lake, "SELECT count(*) FROM quarantine") == [(0,)]
        assert answer(lake, "SHOW TABLES") == [("gaps",), ("quarantine",)]
        with pytest.raises(UnknownStreamError, match="none yet"):
            lake.sql("FROM vibration")

    def test_a_stream_is_a_view_with_fields_and_lineage(self, store: Store, lake: Lake) -> None:
        bring_in(store, "s", raw(A, 1, rows(2, x=pa.array([1.5, 2.5], pa.float32()))))
        found = lake.sql("FROM s ORDER BY _row")
        names = ["ts", "x", "_device", "_epoch", "_seq", "_row", "_received_at", "_clock", "_schema", "date"]
        assert found.column_names == names
        assert found.column("x").to_pylist() == [1.5, 2.5]
        assert found.column("ts").cast(pa.int64()).to_pylist() == [NOW_US, NOW_US + 1_000]
        assert found.column("_device").to_pylist() == [A, A]

    def test_what_comes_while_the_lake_is_open_is_seen(self, store: Store, lake: Lake) -> None:
        with pytest.raises(UnknownStreamError):
            lake.sql("FROM s")
        bring_in(store, "s", raw(A, 1))
        assert answer(lake, "SELECT count(*) FROM s") == [(3,)]
        bring_in(store, "s", raw(A, 2, rows(x=pa.array([1, 2, 3], pa.int8()), y=pa.array(["a", "b", "c"]))))
        assert answer(lake, "SELECT count(*), count(y) FROM s") == [(6, 3)]

    def test_versions_of_every_table_make_an_answer_repeatable(self, store: Store, lake: Lake) -> None:
        bring_in(store, "s", raw(A, 1))
        bring_in(store, "t", raw(B, 1))
        question = "SELECT (SELECT count(*) FROM s), (SELECT count(*) FROM t)"
        pins = lake.versions(question)
        assert set(pins) == {"raw/s", "raw/t"}
        bring_in(store, "t", raw(B, 2))
        assert answer(lake, question) == [(3, 6)]
        assert answer(lake, question, pins) == [(3, 3)]
        assert lake.versions(question)["raw/t"] == pins["raw/t"] + 1
        assert lake.versions("SELECT 1") == {}
        with pytest.raises(QueryError, match="no version is known of t"):
            lake.sql(question, at={"raw/s": pins["raw/s"]})
        with pytest.raises(QueryError, match="gaps"):
            lake.versions("FROM gaps")

    def test_fields_have_their_own_names_and_types(self, store: Store, lake: Lake) -> None:
        lowest = -(2**63)
        fields: dict[str, pa.Array] = {
            "speed (m/s)": pa.array([1, 2, None], pa.uint8()),
            "100%": pa.array([1, 2, 3], pa.uint64()),
            "a.b": pa.array([True, None, False]),
            "date": pa.array(["x", "y", "z"]),
            "ns": pa.array([1, lowest, 2**63 - 2], pa.int64()).view(pa.timestamp("ns")),
            "ms": pa.array([1, lowest, None], pa.int64()).view(pa.timestamp("ms", "UTC")),
            "s": pa.array([1, 2**62, None], pa.int64()).view(pa.timestamp("s")),
            "naive": pa.array([1, 2, None], pa.int64()).view(pa.timestamp("us")),
            "clock": pa.array([1, 86_399_999, None], pa.int32()).view(pa.time32("ms")),
            "day": pa.array([86_400_000, -86_400_000, None], pa.int64()).view(pa.date64()),
            "took": pa.array([5, None, lowest], pa.int64()).view(pa.duration("ns")),
            "list": pa.array([[1, lowest], [], None], pa.list_(pa.int64())).cast(pa.list_(pa.int64())),
        }
        listed = pa.ListArray.from_arrays(
            pa.array([0, 2, 2, 3]), pa.array([1, None, 3], pa.int64()).view(pa.timestamp("ns"))
        )
        fields["times"] = listed
        bring_in(store, "s", raw(A, 1, rows(**fields)))
        described = dict(row[:2] for row in answer(lake, "DESCRIBE s"))
        assert {name: described[name] for name in fields if name != "date"} == {
            "speed (m/s)": "SMALLINT",
            "100%": "DECIMAL(20,0)",
            "a.b": "BOOLEAN",
            "ns": "TIMESTAMP_NS",
            "ms": "TIMESTAMP WITH TIME ZONE",
            "s": "TIMESTAMP",
            "naive": "TIMESTAMP",
            "clock": "TIME",
            "day": "DATE",
            "took": "BIGINT",
            "list": "BIGINT[]",
            "times": "TIMESTAMP_NS[]",
        }
        assert described["field_date"] == "VARCHAR"
        assert described["date"] == "DATE"
        shown = answer(
            lake,
            """SELECT "speed (m/s)", "100%", ns::VARCHAR, ms::VARCHAR, s::VARCHAR, naive::VARCHAR, clock::VARCHAR,
            day::VARCHAR, took, times::VARCHAR FROM s ORDER BY _row""",
        )
        assert shown[0] == (
            *(1, Decimal(1), "1970-01-01 00:00:00.000000001", "1970-01-01 00:00:00.001+00", "1970-01-01 00:00:01"),
            *("1970-01-01 00:00:00.000001", "00:00:00.001", "1970-01-02", 5),
            "['1970-01-01 00:00:00.000000001', NULL]",
        )
        assert shown[1][2:5] == (None, None, None)
        assert shown[2][2] == "2262-04-11 23:47:16.854775806"

    def test_a_time_of_any_year_can_be_read(self, store: Store, lake: Lake) -> None:
        """Stored to the bit; DuckDB itself calls the highest number infinity."""
        times = [-(2**63), -(2**63) + 1, -1, 0, 9_223_372_036_854_775, 2**63 - 2, 2**63 - 1]
        content = pa.record_batch(
            {"ts": pa.array(times, pa.int64()).view(pa.timestamp("us", "UTC")), "x": pa.array(range(7), pa.int8())}
        )
        bring_in(store, "s", raw(A, 1, content))
        assert answer(lake, "SELECT count(*), count(ts) FROM s") == [(7, 7)]
        found = lake.sql("SELECT ts FROM s ORDER BY _row").column("ts").cast(pa.int64()).to_pylist()
        assert found[1:6] == times[1:6]
        assert lake.head("s", 3).num_rows == 3
        assert lake.streams().column("rows").to_pylist() == [7]

    def test_the_end_of_an_epoch_that_was_given_up_is_a_gap_when_its_device_says_so(
        self, store: Store, lake: Lake
    ) -> None:
        """No later number of the epoch will show it."""
        bring_in(store, "s", raw(A, 1), raw(A, 2), raw(B, 1), raw(B, 3))
        told = [("s", EPOCH, 5), ("s", OTHER_EPOCH, 4), ("never-seen", EPOCH, 2), ("s", EPOCH, 5), ("s", None, None)]
        texts = {
            "kind": pa.array(["epoch_closed"] * len(told)),
            "stream": pa.array([stream for stream, _, _ in told]),
            "epoch": pa.array([epoch for _, epoch, _ in told], pa.string()),
        }
        closings = rows(len(told), **texts, last_seq=pa.array([seq for _, _, seq in told], pa.int64()))
        other = rows(1, kind=pa.array(["evicted"]), stream=pa.array(["s"]), epoch=pa.array([EPOCH]),
                     last_seq=pa.array([99], pa.int64()))  # fmt: skip
        whole = rows(1, kind=pa.array(["epoch_closed"]), stream=pa.array(["s"]), epoch=pa.array([EPOCH]),
                     last_seq=pa.array([3], pa.int64()))  # fmt: skip
        bring_in(store, "headwater.events", raw(A, 1, closings), raw(A, 2, other), raw(B, 1, whole))
        assert answer(lake, "FROM gaps ORDER BY ALL") == [
            ("never-seen", A, EPOCH, "missing", 1, 2, 2, None),
            ("s", A, EPOCH, "missing", 3, 5, 3, None),
            ("s", A, OTHER_EPOCH, "missing", 1, 4, 4, None),
            ("s", B, EPOCH, "missing", 2, 2, 1, None),
        ]

    def test_gaps_are_what_is_missing_less_what_is_in_quarantine(self, store: Store, lake: Lake) -> None:
        assert answer(lake, "FROM gaps") == []
        bring_in(store, "s", raw(A, 3), raw(A, 4), raw(A, 9), raw(B, 1), raw(B, 2))
        bring_in(store, "s", raw(A, 1, epoch=OTHER_EPOCH), raw(A, 2, epoch=OTHER_EPOCH))
        thin = rows(3, x=pa.array([1, 2, 3], pa.float32()), _row=pa.array([0, 5, 9], pa.int32()))
        bring_in(store, "t", raw(B, 2, thin))
        query = "SELECT stream, device, epoch, kind, first_seq, last_seq, batches, rows FROM gaps ORDER BY ALL"
        assert answer(lake, query) == [
            ("s", A, EPOCH, "missing", 1, 2, 2, None),
            ("s", A, EPOCH, "missing", 5, 8, 4, None),
            ("t", B, EPOCH, "missing", 1, 1, 1, None),
            ("t", B, EPOCH, "thinned", 2, 2, 1, 7),
        ]
        QuarantineTable(store).append(
            [
                record(device=A, stream="s", epoch=EPOCH, seq=1),
                record(device=A, stream="s", epoch=EPOCH, seq=6),
                record(device=A, stream="s", epoch=OTHER_EPOCH, seq=2),
                record(device=A, stream="other", epoch=EPOCH, seq=2),
                record(device=B, stream="t"),
            ]
        )
        assert answer(lake, query) == [
            ("s", A, EPOCH, "missing", 2, 2, 1, None),
            ("s", A, EPOCH, "missing", 5, 5, 1, None),
            ("s", A, EPOCH, "missing", 7, 8, 2, None),
            ("t", B, EPOCH, "missing", 1, 1, 1, None),
            ("t", B, EPOCH, "thinned", 2, 2, 1, 7),
        ]

    def test_streams_are_described(self, store: Store, lake: Lake) -> None:
        bring_in(store, "s", raw(A, 1, rows(2)), raw(B, 1, rows(4)))
        version = bring_in(store, "s", raw(A, 2, rows(1, NOW_US + 5_000)))
        bring_in(store, "headwater.events", raw(A, 1, rows(1, 7)))
        found = {row["stream"]: row for row in lake.streams().to_pylist()}
        assert sorted(found) == ["headwater.events", "s"]
        one = found["s"]
        assert (one["rows"], one["devices"], one["version"]) == (7, 2, version)
        assert one["first_ts"] == datetime.fromtimestamp(NOW_US / 1e6, UTC)
        assert one["last_ts"] == datetime.fromtimestamp((NOW_US + 5_000) / 1e6, UTC)
        assert one["files"] >= 2
        assert one["bytes"] == sum(
            info.size
            for info in store.objects("raw/s")
            if info.path.endswith(".parquet") and "_delta_log" not in info.path
        )

    def test_head_shows_the_latest_rows(self, store: Store, lake: Lake) -> None:
        day_us = 86_400_000_000
        bring_in(store, "s", raw(A, 1, rows(5, NOW_US - day_us)), raw(A, 2, rows(2, NOW_US)))
        assert lake.head("s", 3).column("_seq").to_pylist() == [2, 2, 1]
        assert lake.head("s").num_rows == 7
        assert lake.head("s", 2).column("ts").cast(pa.int64()).to_pylist() == [NOW_US + 1_000, NOW_US]
        with pytest.raises(UnknownStreamError, match="it has s"):
            lake.head("nothing")
        for rows_wanted in (0, HEAD_ROWS_MAX + 1, 10**30):
            with pytest.raises(QueryError, match=f"cannot show {rows_wanted} rows; ask for 1 to {HEAD_ROWS_MAX}"):
                lake.head("s", rows_wanted)

    def test_a_version_shows_one_table_as_it_was(self, store: Store, lake: Lake) -> None:
        first = bring_in(store, "s", raw(A, 1))
        last = bring_in(store, "s", raw(A, 2, rows(y=pa.array([1, 2, 3]))))
        bring_in(store, "t", raw(A, 1))
        assert answer(lake, "SELECT max(_seq) FROM s", at=first) == [(1,)]
        assert "y" not in lake.sql("FROM s", at=first).column_names
        assert answer(lake, "SELECT max(_seq), count(y) FROM s", at=last) == [(2, 3)]
        assert lake.head("s", 9, at=first).num_rows == 3
        assert answer(lake, "WITH c AS (FROM s) SELECT count(*) FROM c", at=first) == [(3,)]
        assert answer(lake, 'SELECT (SELECT count(*) FROM s) - (SELECT count(*) FROM "raw/s")', at=first) == [(0,)]
        with pytest.raises(
            NoSuchVersionError, match=f"^s has no version {last + 1}; choose one of 0 to {last}, or a time"
        ):
            lake.sql("FROM s", at=last + 1)
        for two in ("SELECT * FROM s, t", "FROM gaps", "SELECT (SELECT max(_seq) FROM t) FROM s"):
            with pytest.raises(QueryError, match="time instead"):
                lake.sql(two, at=1)

    def test_a_time_shows_every_table_as_it_was(self, store: Store, lake: Lake) -> None:
        def now() -> datetime:
            # Commits state whole milliseconds.
            threading.Event().wait(0.005)
            moment = datetime.now(UTC)
            threading.Event().wait(0.005)
            return moment

        before = now()
        bring_in(store, "s", raw(A, 2))
        between = now()
        bring_in(store, "s", raw(A, 3, rows(y=pa.array([1, 2, 3]))))
        bring_in(store, "t", raw(B, 3))
        after = now()
        both = "SELECT (SELECT count(*) FROM s), (SELECT count(*) FROM t), (SELECT count(*) FROM gaps)"
        assert answer(lake, both, at=before) == [(0, 0, 0)]
        assert answer(lake, both, at=between) == [(3, 0, 1)]
        assert answer(lake, both, at=after) == [(6, 3, 2)]
        assert answer(lake, both) == [(6, 3, 2)]
        assert answer(lake, "SELECT count(y) FROM s", at=before) == [(0,)]
        assert answer(lake, "SELECT count(*) FROM s", at=between.replace(tzinfo=None)) == [(3,)]

    def test_a_question_that_cannot_be_answered_gets_one_clear_sentence(self, store: Store, lake: Lake) -> None:
        bring_in(store, "s", raw(A, 1))
        bring_in(store, "headwater.events", raw(A, 1))
        for query, said in UNANSWERABLE:
            with pytest.raises(QueryError) as error:
                lake.sql(query)
            assert said in str(error.value), query
            assert "\n" not in str(error.value), query

    def test_nothing_can_be_written_into_the_lake(self, store: Store, lake: Lake) -> None:
        bring_in(store, "s", raw(A, 1))
        before = sorted(store.objects(""))
        inside = store.table_uri("stolen.csv")
        for query in (
            f"COPY (SELECT 1) TO '{inside}'",
            f"EXPLAIN ANALYZE COPY (SELECT 1) TO '{inside}'",
            "EXPORT DATABASE 'x'",
        ):
            with pytest.raises(QueryError):
                lake.sql(query)
        assert sorted(store.objects("")) == before

    def test_other_questions_about_the_tables_are_answered(self, store: Store, lake: Lake) -> None:
        bring_in(store, "s", raw(A, 1))
        bring_in(store, "headwater.events", raw(A, 1))
        assert ("s",) in answer(lake, "SHOW TABLES")
        assert answer(lake, "SELECT table_name FROM information_schema.tables ORDER BY 1") == [
            (name,) for name in ("gaps", "headwater.events", "quarantine", "s")
        ]
        assert answer(lake, 'SELECT count(*) FROM "headwater.events"') == [(3,)]
        assert answer(lake, 'SELECT count(*) FROM "raw/s"') == [(3,)]
        assert lake.sql("SUMMARIZE s").num_rows == 10
        assert lake.sql("EXPLAIN FROM s").num_rows == 1
        assert answer(lake, "WITH s AS (SELECT 7 AS x) SELECT x FROM s") == [(7,)]
        assert answer(lake, "SELECT count(*) FROM query_table('s')") == [(3,)]
        assert answer(lake, "SELECT max(n) FROM range(5) r(n), LATERAL (SELECT unnest([n]))") == [(4,)]
        assert ("s",) in answer(lake, "SELECT view_name FROM duckdb_views()")
        assert answer(lake, f"SELECT count(*) FROM delta_scan('{store.table_uri('raw/s')}')") == [(3,)]
        assert answer(lake, "PIVOT s ON _row IN (0, 1) USING count(*) GROUP BY _device") == [(A, 1, 1)]

    def test_a_large_answer_comes_piece_by_piece(self, store: Store, lake: Lake) -> None:
        bring_in(store, "s", raw(A, 1, rows(25_000)))
        pieces = list(lake.read("SELECT x FROM s"))
        assert len(pieces) > 1
        assert sum(piece.num_rows for piece in pieces) == 25_000
        nothing = list(lake.read("SELECT x FROM s WHERE false"))
        assert [piece.num_rows for piece in nothing] == [0]
        assert nothing[0].schema.names == ["x"]

    def test_questions_at_the_same_time_do_not_disturb_each_other(self, store: Store, lake: Lake) -> None:
        versions = [bring_in(store, "s", raw(A, seq, rows(10))) for seq in range(1, 5)]
        wrong: list[Any] = []

        def ask(number: int) -> None:
            for turn in range(5):
                seq = (number + turn) % 4 + 1
                found = answer(lake, "SELECT count(*), max(_seq) FROM s", at=versions[seq - 1])
                if found != [(10 * seq, seq)]:
                    wrong.append((seq, found))

        askers = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(60)
        assert wrong == []

    def test_compaction_changes_no_answer(self, store: Store, lake: Lake) -> None:
        """By whom ever: delta-rs rewrites the files here. Values, order within a batch and gaps stay."""
        from deltalake import DeltaTable

        nan = np.array([0x7FC12345, 0x3F800000, 0xFFC00001], np.uint32).view(np.float32)
        for seq in (1, 3, 4):
            bring_in(store, "s", raw(A, seq, rows(3, x=pa.array(nan))))
        question = "SELECT _device, _seq, _row, ts, x FROM s ORDER BY ALL"
        before, gaps = lake.sql(question), answer(lake, "FROM gaps")
        table = DeltaTable(store.table_uri("raw/s"), storage_options=store.storage_options)
        assert table.optimize.compact()["numFilesRemoved"] == 3
        after = lake.sql(question)
        assert after.drop_columns("x") == before.drop_columns("x")
        bits = [table.column("x").combine_chunks().view(pa.uint32()).to_pylist() for table in (before, after)]
        assert bits[0] == bits[1]
        assert answer(lake, "FROM gaps") == gaps
        bring_in(store, "s", raw(A, 5))
        assert answer(lake, "SELECT count(*) FROM s") == [(12,)]


class SmallTableSuite:
    """Promises of quarantine and control tables."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_quarantine_keeps_the_bytes_and_says_why(self, store: Store) -> None:
        odd = record(topic="a/\udcff\x00/b", device=None, stream=None, payload=bytes(range(256)))
        QuarantineTable(store).append([odd, record(epoch=EPOCH, seq=7)])
        found = {row["key"]: row for row in table_in(store, PATH).to_pylist()}
        assert found[key_of(odd)]["payload"] == bytes(range(256))
        assert found[key_of(odd)]["topic"] == "a/\\udcff\x00/b"
        stepped = found[f"s/a/{EPOCH}/7"]
        assert (stepped["reason"], stepped["message"], stepped["seq"]) == ("bad_body", "no", 7)
        assert stepped["received_at"] == datetime.fromtimestamp(NOW_US / 1e6, UTC)

    def test_a_repeat_is_harmless(self, store: Store) -> None:
        """The same process writes it once; another one writes it again, and who reads sees it once."""
        table = QuarantineTable(store)
        again = record(epoch=EPOCH, seq=7, payload=b"sent again, with another envelope")
        table.append([record(epoch=EPOCH, seq=7), record()])
        table.append([again, record(), record(payload=b"other")])
        assert table_in(store, PATH).num_rows == 3
        QuarantineTable(store).append([again, record()])
        assert table_in(store, PATH).num_rows == 5
        lake = Lake(store)
        assert answer(lake, "SELECT count(*), count(DISTINCT key) FROM quarantine") == [(3, 3)]
        lake.close()

    def test_two_may_make_the_quarantine_at_once(self, store: Store) -> None:
        errors: list[BaseException] = []

        def write(number: int) -> None:
            try:
                QuarantineTable(store).append([record(payload=bytes([number]))])
            except BaseException as error:  # noqa: BLE001 - shown below
                errors.append(error)

        writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
        assert errors == []
        assert table_in(store, PATH).num_rows == 4

    def test_of_two_that_saw_the_same_one_is_refused(self, store: Store) -> None:
        one, two = (ControlTable(store, "control/devices", DEVICES) for _ in range(2))
        one.refresh()
        assert (one.version, one.read().num_rows) == (0, 0)
        one.append(pa.table({"device": ["a"], "seen": [1]}), expected=0)
        one.refresh()
        two.refresh()
        assert one.version == two.version == 1
        one.append(pa.table({"device": ["b"], "seen": [2]}), expected=1)
        with pytest.raises(CommitConflictError):
            two.append(pa.table({"device": ["c"], "seen": [3]}), expected=1)
        two.refresh()
        assert two.version == 2
        assert sorted(two.read().column("device").to_pylist()) == ["a", "b"]
        with pytest.raises(CommitConflictError):
            two.append(pa.table({"device": ["c"], "seen": [3]}), expected=1)
        two.append(pa.table({"device": ["c"], "seen": [3]}), expected=2)
        two.append(pa.table({"device": ["d"], "seen": [4]}))
        lake = Lake(store)
        assert answer(lake, "SELECT device, seen FROM devices ORDER BY 1") == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]
        lake.close()

    def test_a_newer_release_may_add_columns(self, store: Store) -> None:
        old, new = (
            ControlTable(store, "control/devices", schema)
            for schema in (DEVICES, DEVICES.append(pa.field("site", pa.string())))
        )
        old.refresh()
        old.append(pa.table({"device": ["a"], "seen": [1]}), expected=0)
        new.refresh()
        assert new.read().column("site").to_pylist() == [None]
        new.append(pa.table({"device": ["b"], "seen": [2], "site": ["north"]}), expected=1)
        new.refresh()
        assert sorted(new.read().to_pylist(), key=str) == [
            {"device": "a", "seen": 1, "site": None},
            {"device": "b", "seen": 2, "site": "north"},
        ]
        old.refresh()
        assert old.read().column_names == ["device", "seen"]

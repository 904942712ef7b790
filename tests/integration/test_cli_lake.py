"""`headwater lake …` over a lake: every format, time travel, and questions that cannot be answered."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from contract.batches import TS_TYPE, Clock
from contract.names import shard_of
from lake.raw import RawBatch, RawTable
from lake.store import Store, StoreSettings
from tests.integration.stacks import ROOT, headwater

EPOCH = "e" * 32
DAY_US = 1_790_000_000_000_000


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake with a stream `pump` of two commits: 3 rows, then 2 more."""
    url = f"file://{tmp_path_factory.mktemp('lake')}"
    table = RawTable(Store(StoreSettings(url=url)), "pump")
    clock = Clock(synced=True, wall_us=DAY_US, monotonic_us=0, boot="0" * 32)
    first = 0
    for seq, count in ((1, 3), (2, 2)):
        times = pa.array([DAY_US + (first + n) * 1_000_000 for n in range(count)], pa.int64()).cast(TS_TYPE)
        values = pa.array([1.5 * (first + n) for n in range(count)], pa.float64())
        batch = pa.record_batch([times, values], names=["ts", "bar"])
        shard = shard_of("d")
        table.refresh()
        table.append([RawBatch("d", EPOCH, seq, shard, DAY_US, clock, batch)], {("d", EPOCH): seq}, {shard: seq})
        first += count
    return url


def sql(lake: str, query: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "headwater", "lake", "sql", query, "--lake", lake, *options],
        cwd=ROOT,
        capture_output=True,
        timeout=90,
        check=False,
    )


QUERY = "SELECT bar, _seq FROM pump ORDER BY bar"
WANTED = [{"bar": 1.5 * n, "_seq": 1 if n < 3 else 2} for n in range(5)]


def test_rows_come_in_every_format(lake: str) -> None:
    lines = sql(lake, QUERY, "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == WANTED
    assert json.loads(sql(lake, QUERY, "--format", "json").stdout) == WANTED
    assert pacsv.read_csv(io.BytesIO(sql(lake, QUERY, "--format", "csv").stdout)).to_pylist() == WANTED
    with pa.ipc.open_stream(sql(lake, QUERY, "--format", "arrow").stdout) as stream:
        assert stream.read_all().to_pylist() == WANTED
    assert pq.read_table(io.BytesIO(sql(lake, QUERY, "--format", "parquet").stdout)).to_pylist() == WANTED
    table = sql(lake, QUERY).stdout.decode()
    assert [line.split() for line in table.splitlines() if line.strip()][2:] == [
        ["0.0", "1"],
        ["1.5", "1"],
        ["3.0", "1"],
        ["4.5", "2"],
        ["6.0", "2"],
    ]


def test_the_lake_as_it_was(lake: str) -> None:
    version = sql(lake, QUERY, "--json", "--at", "1").stdout.splitlines()
    assert [json.loads(line) for line in version] == WANTED[:3]
    long_ago = sql(lake, QUERY, "--json", "--at", "2001-01-01")
    assert (long_ago.returncode, long_ago.stdout) == (0, b"")


def test_a_version_that_is_not_there_is_said_of_the_stream_and_the_option(lake: str) -> None:
    for words in (("sql", "FROM pump"), ("head", "pump")):
        done = headwater("lake", *words, "--lake", lake, "--at", "999999")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == ("error: --at 999999: pump has no version 999999; choose one of 0 to 2, or a time\n")


def test_streams_and_head(lake: str) -> None:
    streams = headwater("lake", "streams", "--lake", lake, "--json")
    (found,) = [json.loads(line) for line in streams.stdout.splitlines()]
    assert (found["stream"], found["rows"], found["devices"]) == ("pump", 5, 1)
    head = headwater("lake", "head", "pump", "--lake", lake, "-n", "2", "--json")
    assert [json.loads(line)["bar"] for line in head.stdout.splitlines()] == [6.0, 4.5]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM nothing", "it has pump"),
        ("SELECT nothing FROM pump", "nothing"),
        ("DROP VIEW pump", "SELECT"),
        ("SELECT 1e400", "no DOUBLE can hold"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line_and_exit_2(lake: str, query: str, words: str) -> None:
    done = headwater("lake", "sql", query, "--lake", lake)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_who_reads_only_the_beginning_gets_it_without_complaint(lake: str) -> None:
    command = f"{sys.executable} -m headwater lake sql 'SELECT * FROM range(200000)' --lake {lake} --json | head -n 2"
    command += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout == '{"range":0}\n{"range":1}\n'
    assert (done.returncode, done.stderr) == (0, "")


def test_reading_a_folder_that_is_not_there_is_refused_and_creates_nothing(tmp_path):
    missing = tmp_path / "nope"
    ran = headwater("lake", "streams", "--lake", f"file://{missing}")
    assert ran.returncode == 2
    assert f"there is no folder {missing}" in ran.stderr
    assert not missing.exists()


@pytest.mark.parametrize("command", ["lake sql QUERY", "lake streams", "up --devices 1 --data FOLDER"])
def test_s3_without_keys_is_one_clear_sentence_at_once(command, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    words = [{"QUERY": "SELECT 1", "FOLDER": str(tmp_path)}.get(word, word) for word in command.split()]
    nobody = {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"}
    ran = headwater(*words, "--lake", "s3://nobucket/x", **nobody)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: lake s3://nobucket/x: no credentials are set; set AWS_ACCESS_KEY_ID")
    assert "169.254" not in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_head_shows_what_sql_knows_beside_streams(lake: str) -> None:
    for name in ("gaps", "quarantine", "raw/pump"):
        head = headwater("lake", "head", name, "--lake", lake, "--json")
        if name == "raw/pump":
            assert (head.returncode, "there is no stream or table 'raw/pump'" in head.stderr) == (2, True)
        else:
            assert (head.returncode, head.stdout, head.stderr) == (0, "", "")


def test_a_folder_that_is_no_lake_is_told_from_an_empty_lake(tmp_path) -> None:
    (tmp_path / "Documents").mkdir()
    none = headwater("lake", "streams", "--lake", f"file://{tmp_path}", "--json")
    assert (none.returncode, none.stdout) == (0, "")
    assert none.stderr.startswith(f"note: file://{tmp_path} holds no Headwater lake")
    (tmp_path / "control" / "devices").mkdir(parents=True)
    empty = headwater("lake", "streams", "--lake", f"file://{tmp_path}", "--json")
    assert "no reading was committed" in empty.stderr

"""Application transactions of a Delta table, read from its log.

delta-rs answers `transaction_version` by reading log files at every call: 2 to 16 ms each on an object store, too
slow for 64 shards and thousands of lanes before every commit. Here all of them are read once and then kept up with
the log, one small file per commit. Where the log looks unusual (a checkpoint in several parts, files missing) the
answer comes from delta-rs after all: this is a shortcut, not a second truth.

Source: the Delta transaction protocol, "Delta Log Entries", "Transaction Identifiers", "Checkpoints".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from lake.errors import ObjectMissingError
from lake.store import Store

_COMMIT = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.parquet")
_OTHER_CHECKPOINT = re.compile(r"\d{20}\.checkpoint\..+")


NAME = "headwaterCommit"
"""Key in `commitInfo` of what a handle calls its commit, to know it again."""


class _Transaction(msgspec.Struct, rename="camel"):
    app_id: str
    version: int


class _CommitInfo(msgspec.Struct):
    name: str = msgspec.field(name=NAME, default="")


class _Action(msgspec.Struct, rename="camel"):
    txn: _Transaction | None = None
    commit_info: _CommitInfo | None = None


_decode = msgspec.json.Decoder(_Action).decode


class TransactionLog:
    """Versions of application transactions as of one table version. Not thread-safe."""

    def __init__(self, store: Store, table: str, *, kept_max: int = 1_000_000) -> None:
        """Know nothing yet.

        Args:
            store: where the lake is.
            table: path of the table in it.
            kept_max: beyond so many application transactions nothing is kept in memory (about 200 bytes each).
        """
        self._store = store
        self._log = f"{table}/_delta_log"
        self._kept_max = kept_max
        self._versions: dict[str, int] = {}
        self._names: dict[int, str] = {}
        """Of the commits that the last `advance` read."""
        self._at = -1
        self._complete = False

    def advance(self, version: int) -> None:
        """Know what stands at a table version.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        self._names = {}
        if self._complete and self._at == version:
            return
        try:
            if self._complete and self._at < version:
                for number in range(self._at + 1, version + 1):
                    self._read_commit(number)
            else:
                self._complete = self._load(version)
        except (ObjectMissingError, pa.ArrowException, msgspec.MsgspecError, KeyError):
            self._complete = False  # an unusual log: delta-rs is asked instead
        if len(self._versions) > self._kept_max:
            self._complete = False
        if not self._complete:
            self._versions = {}
        self._at = version

    def forget(self) -> None:
        """Know nothing any more: the table is another one."""
        self._versions, self._names, self._at, self._complete = {}, {}, -1, False

    def get(self, app_id: str) -> int | None:
        """Version of an application transaction, 0 where there is none; None where this shortcut cannot tell."""
        return self._versions.get(app_id, 0) if self._complete else None

    def names(self, first: int, last: int) -> set[str]:
        """What the commits of these versions, both included, are called. One that is not in the log has no name.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        found = {
            self._names[number] if number in self._names else self._name(number) for number in range(first, last + 1)
        }
        return found - {""}

    def app_ids(self) -> list[str] | None:
        """All application transactions; None where this shortcut cannot tell."""
        return list(self._versions) if self._complete else None

    def _load(self, version: int) -> bool:
        commits: set[int] = set()
        checkpoint = -1
        unusual = False
        for found in self._store.objects(self._log):
            name = found.path.rpartition("/")[2]
            if match := _COMMIT.fullmatch(name):
                commits.add(int(match[1]))
            elif match := _CHECKPOINT.fullmatch(name):
                number = int(match[1])
                checkpoint = max(checkpoint, number) if number <= version else checkpoint
            elif _OTHER_CHECKPOINT.fullmatch(name):
                unusual = True
        wanted = range(checkpoint + 1, version + 1)
        if unusual or not commits.issuperset(wanted):
            return False
        self._versions = {}
        if checkpoint >= 0:
            self._read_checkpoint(checkpoint)
        for number in wanted:
            self._read_commit(number)
        return True

    def _read_checkpoint(self, number: int) -> None:
        data = self._store.get(f"{self._log}/{number:020d}.checkpoint.parquet")
        # The whole column: asked for "txn.appId", pyarrow 26 gives columns without their parent.
        # Not pq.read_table: it gives nested columns other names and no nulls.
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            transactions = file.read(columns=["txn"]).column("txn").combine_chunks().drop_null()
        names, versions = transactions.field("appId").to_pylist(), transactions.field("version").to_pylist()
        self._versions.update(zip(names, versions, strict=True))

    def _read_commit(self, number: int) -> None:
        self._names[number] = ""
        for action in self._actions(number):
            if action.txn is not None:
                self._versions[action.txn.app_id] = action.txn.version
            if action.commit_info is not None:
                self._names[number] = action.commit_info.name

    def _name(self, number: int) -> str:
        try:
            return next((info.name for action in self._actions(number) if (info := action.commit_info)), "")
        except (ObjectMissingError, msgspec.MsgspecError):
            return ""

    def _actions(self, number: int) -> Iterable[_Action]:
        """Those that are looked at here; the others of a commit are many, and long."""
        for line in self._store.get(f"{self._log}/{number:020d}.json").splitlines():
            if b'"txn"' in line[:64] or b'"commitInfo"' in line[:64]:
                yield _decode(line)

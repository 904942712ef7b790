"""What a query asks for, found by DuckDB's own parser: which tables it names, and that it is one SELECT and nothing
else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import duckdb
import msgspec

from lake.errors import QueryError

_EXPLAIN = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*explain\s+(?:analyze\s+)?", re.IGNORECASE | re.DOTALL)
_POINTED_MAX = 40
_CATALOG = ("duckdb_", "pragma_")
"""Functions that look at the catalog, which has all tables then."""
_BY_NAME = "query_table"
"""The function that looks at tables whose names are values."""
_FUNCTIONS = frozenset(
    f"{_BY_NAME} delta_scan delta_list_files parquet_scan parquet_schema parquet_metadata parquet_file_metadata "
    "parquet_full_metadata parquet_kv_metadata parquet_bloom_probe read_parquet read_csv read_csv_auto sniff_csv "
    "read_json read_json_auto read_json_objects read_json_objects_auto read_ndjson read_ndjson_auto "
    "read_ndjson_objects read_text read_blob glob range generate_series unnest repeat repeat_row json_each json_tree "
    "histogram histogram_values summary test_all_types pg_timezone_names icu_calendar_names which_secret".split()
)
"""Functions that may stand behind FROM, beside those of `_CATALOG`. DuckDB has others that do something (write logs to
a file, set options), that read memory by its address, or that hide another question in a text."""


class Question(NamedTuple):
    """The tables that a query names."""

    tables: frozenset[str]
    """Names without a schema, as written."""
    qualified: frozenset[str]
    """Names with a schema: `headwater.events` without quotes is one."""
    all_tables: bool
    """Whether it asks which tables there are."""


def read_question(cursor: duckdb.DuckDBPyConnection, query: str) -> Question:
    """Parse a query without looking at any table.

    Raises:
        QueryError: it is not one SELECT, or not SQL; the message says where.
    """
    explained = _EXPLAIN.match(query)
    body = query[explained.end() :] if explained else query
    answer = cursor.execute("SELECT json_serialize_sql(?)", [body]).fetchone()
    try:
        parsed: dict[str, Any] = msgspec.json.decode(answer[0]) if answer else {"error": True}
    except msgspec.DecodeError as error:
        # DuckDB writes a literal such as 1e400 as `inf`, which is no JSON.
        raise QueryError("the query has a number that no DOUBLE can hold; write 'infinity'::DOUBLE for it") from error
    if parsed["error"]:
        at = int(parsed.get("position") or 0) + len(query) - len(body)
        raise QueryError(_reason(parsed.get("error_message", ""), query, at))
    if not parsed["statements"]:
        raise QueryError(f"the query {query!r:.80} is empty; ask for example: SELECT count(*) FROM stream")
    if len(parsed["statements"]) != 1:
        raise QueryError(f"{len(parsed['statements'])} statements were given; ask one question at a time")
    tables, qualified = set(), set()
    all_tables = False
    for node in _nodes(parsed["statements"]):
        kind = node.get("type")
        if kind == "BASE_TABLE" and node["schema_name"]:
            qualified.add(f"{node['schema_name']}.{node['table_name']}")
            all_tables |= node["schema_name"].lower() in ("information_schema", "pg_catalog")
        elif kind == "BASE_TABLE":
            tables.add(node["table_name"])
        elif kind == "SHOW_REF":
            all_tables |= bool(node["table_name"])
        elif kind == "TABLE_FUNCTION":
            function = str(node["function"].get("function_name", "")).lower()
            looks_at_all = function.startswith(_CATALOG) or function == _BY_NAME
            if not (looks_at_all or function in _FUNCTIONS):
                raise QueryError(f"FROM {function}(…) is not answered here: ask the tables themselves, by SELECT")
            all_tables |= looks_at_all
    return Question(frozenset(tables), frozenset(qualified), all_tables)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a parse tree. By a list and not by recursion: how deep it goes is the asker's choice."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _reason(message: str, query: str, at: int) -> str:
    """What is wrong with a query that is no SELECT; `at` is where, in characters."""
    if message.startswith(("Only SELECT", "A CTE needs")):
        if re.match(r"\s*(?:from\s.*)?pivot\b", query, re.IGNORECASE | re.DOTALL):
            return "PIVOT needs the values of its columns: PIVOT … ON column IN (…)"
        return "only SELECT is answered here: the lake is written by gateways alone"
    before = query[:at]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    said = one_line(message) or "it is not SQL"
    return f"the query cannot be read at line {line}, column {column}: {said}; correct it there"


def one_line(message: str) -> str:
    """DuckDB's message without the kind of error in front, its drawing of the query as the words that it points at."""
    text, _, drawing = message.partition("\n\nLINE ")
    said = " ".join(re.sub(r"^[A-Z][A-Za-z ]* Error: ", "", text).split())
    if (drawn := re.match(r"(\d+): (.*)\n( *)\^", drawing)) is None:
        return said
    column = max(0, len(drawn[3]) - len(f"LINE {drawn[1]}: "))
    return f"{said} (line {drawn[1]}, at: {drawn[2][column : column + _POINTED_MAX].strip()})"

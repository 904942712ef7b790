"""Column names: every field name the contract allows gets one, and its own back.

Mutants tried, each made a test here fail: `%` not escaped; the prefix not repeated for a field that looks prefixed
already; `date` compared without its case; lower-case escapes.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contract.names import check_field_name
from lake.columns import DATE, LINEAGE, SHAPE_SUFFIX, escape, field_name, stored_name, unescape

ODD = ["date", "DATE", "_seq", "_x", "_", "field_", "field_date", "field_field__row", "field_x", "a b", "100%", "a%20b"]
NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20),
    st.lists(st.sampled_from(["field_", "date", "DATE", "_", "%", "%20", " ", "x", ";"]), min_size=1).map("".join),
    st.sampled_from(ODD),
)


@given(NAMES)
def test_a_field_gets_its_name_back(name: str) -> None:
    check_field_name(name)
    assert field_name(stored_name(name)) == name
    assert unescape(escape(name)) == name


@given(NAMES, NAMES)
@example("date", "field_date")
@example("field_date", "field_field_date")
@example("a b", "a%20b")
def test_names_that_differ_by_more_than_case_get_columns_that_do(one: str, other: str) -> None:
    if one.casefold() != other.casefold():
        assert stored_name(one).casefold() != stored_name(other).casefold()
        assert escape(one).casefold() != escape(other).casefold()


@given(NAMES)
def test_no_field_takes_a_column_of_the_lake_or_a_character_that_tools_refuse(name: str) -> None:
    stored = stored_name(name)
    assert not stored.startswith("_")
    assert stored.casefold() != DATE
    assert stored not in LINEAGE
    assert not re.search(r"[\x00-\x20\x7f,;{}()=\"'`]", stored)
    assert not stored.endswith(SHAPE_SUFFIX)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("acc_x", "acc_x"),
        ("acc.x", "acc.x"),
        ("Größe", "Größe"),
        ("date", "field_date"),
        ("Date", "field_Date"),
        ("dates", "dates"),
        ("_x", "field__x"),
        ("field_date", "field_field_date"),
        ("field_x", "field_x"),
        ("speed (m/s)", "speed%20%28m/s%29"),
        ("100%", "100%25"),
    ],
)
def test_names_that_everybody_writes_stay_as_they_are(name: str, stored: str) -> None:
    assert stored_name(name) == stored

"""`headwater simulate replay`: what is wrong with a file is said once, in the words of the command."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from headwater.file_check import FileRefused, comma_numbers, in_words_of_the_command
from headwater.replay import ReplayOptions, replay_config, run_replay

ROWS = "t,a\n1,2\n3,x\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "none.csv"}, ("FILE", "none.csv", "does not exist")),
        ({"time_column": "when"}, ("no time column 'when'", "['t', 'a']", "set --time-column, or --delimiter")),
        ({"time_format": ""}, ("--time-format ''", "set --time-format (iso8601")),
        ({"time_format": "week"}, ("--time-format 'week' is not known",)),
        ({"fields": ("zz",)}, ("'zz'", "check --fields")),
        ({"delimiter": ";;"}, ("--delimiter ';;'",)),
        ({"speed": -1.0}, ("--speed = -1.0", "above 0")),
    ],
)
def test_a_file_that_is_not_as_described_is_said_once_and_with_the_commands_options(
    change: dict[str, object], words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Mutants tried: the file not looked at before the agent starts (the agent's log says it too)."""
    path = tmp_path / "f.csv"
    path.write_text(ROWS)
    given: dict[str, object] = {"path": str(path), "device": "d", "stream": "s", "time_column": "t"}
    given |= {"time_format": "s", "broker": "mqtt://127.0.0.1:1", "folder": tmp_path / "data"}
    with pytest.raises(FileRefused) as error:
        run_replay(ReplayOptions(**(given | change)))  # type: ignore[arg-type]
    said = str(error.value)
    assert all(word in said for word in words), said
    assert "driver" not in said
    assert not (tmp_path / "data").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("typed", "meant"), [("\\t", "\t"), ("\t", "\t"), (";", ";"), ("", "")])
def test_a_tab_may_be_typed_as_in_most_languages(typed: str, meant: str, tmp_path: Path) -> None:
    given = {"path": "f.csv", "device": "d", "stream": "s", "time_column": "t", "broker": "mqtt://b"}
    config = replay_config(ReplayOptions(**given, delimiter=typed, folder=tmp_path))  # type: ignore[arg-type]
    assert config["streams"]["s"]["options"]["delimiter"] == meant


def test_what_is_quoted_is_no_option_and_what_the_command_lacks_is_pointed_to() -> None:
    said = "driver 'replay': 'speed' and time_column 'loop'; check skip_rows"
    assert in_words_of_the_command(said) == (
        "'speed' and --time-column 'loop'; check skip_rows (an agent.toml with driver replay has more options)"
    )


def test_a_type_cannot_be_declared_on_the_command_line_and_is_not_asked_for() -> None:
    said = "driver 'replay', file 'f': invalid value 'x'; mend that value, or declare the type of that column in fields"
    assert in_words_of_the_command(said) == (
        "file 'f': invalid value 'x'; mend that value, or leave that column out with --fields"
    )


def test_numbers_with_a_decimal_comma_are_noticed() -> None:
    rows = pa.record_batch(
        {"a": ["1,5", "", "-2,25", "3"], "b": ["1,5", "x", "2", "3"], "c": [1, 2, 3, 4], "d": ["", "", "", ""]}
    )
    assert comma_numbers(rows) == ["a"]

"""The command line as a contract: names, options, exit statuses, one line per error, JSON on stdout."""

from __future__ import annotations

import inspect
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import ConfigurationError, HeadwaterError, Reason, Rejected, TemporaryError
from headwater import cli, extras, toml
from headwater.commands import tree
from headwater.exits import Exit, exit_of
from headwater.reference import reference

ROOT = Path(__file__).parents[2]

# As the issues that founded its parts list them.
CONTRACT = {
    "up": "--data --devices --recordings --speed --broker --lake --port --for --json",
    "demo": "--data --seconds --devices --recordings --speed --broker --lake --port --json",
    "agent run": "--config --json",
    "agent status": "--json",
    "agent buffer": "--json",
    "gateway run": "--config --json",
    "lake sql": "QUERY --lake --format --at --json",
    "lake streams": "--json",
    "lake head": "STREAM --json",
    "simulate replay": (
        "FILE --device --stream --time-column --fields --delimiter --time-format --speed --broker --json"
    ),
    "simulate swarm": "--devices --rate --seconds --broker --json",
    "doctor": "--json",
    "train dataset": "RECIPE --lake --work --json",
    "train checks": "RECIPE --lake --work --json",
    "train search": "RECIPE --lake --work --json",
    "train evaluate": "RECIPE --lake --work --json",
    "train export": "RECIPE --lake --work --json",
    "train release": "RECIPE --lake --work --json",
    "train run": "RECIPE --lake --work --keys --json",
    "keys init": "--lake --data --keys --root-keys --root-threshold --json",
    "keys show": "--lake --data --keys --json",
    "keys rotate": "--lake --data --keys --stolen --json",
    "keys renew": "--lake --data --keys --json",
    "release list": "--stream --since --device --lake --data --json",
    "release show": "--lake --data --json",
    "release diff": "--lake --data --json",
    "release approve": "--why --by --keys --lake --data --json",
    "release retire": "--why --by --keys --lake --data --json",
    "predict": "--stream --since --until --lake --data --json",
    "train watch": "RECIPE --lake --data --work --keys --interval --lease --once --json",
    "label import": "FILE --stream --columns --device --unit --source --allow-unknown --lake --data --json",
    "monitor": "MODEL --since --watch --interval --windows --retrain --lake --data --json",
    "rollout start": (
        "--stages --to --share --bake --max-wait --guard --previous --approval --spec --draft --supersede --why --by "
        "--lake --data --json"
    ),
    "rollout status": "--watch --url --lake --data --json",
    "rollout pause": "ROLLOUT --why --by --lake --data --json",
    "rollout resume": "ROLLOUT --why --by --lake --data --json",
    "rollout approve": "ROLLOUT --why --by --lake --data --json",
    "rollout abort": "ROLLOUT --rollback --why --by --lake --data --json",
    "rollout rollback": "ROLLOUT --why --by --lake --data --json",
    "rollout history": "--lake --data --json",
}


SWARM = ("simulate", "swarm", "--broker", "mqtt://x")


def commands(command: Any, path: str = "") -> dict[str, Any]:
    """Every command that does something, by its words."""
    inner = getattr(command, "commands", None)
    if not inner:
        return {path: command}
    found: dict[str, Any] = {}
    for name, child in inner.items():
        found |= commands(child, f"{path} {name}".strip())
    return found


def all_commands() -> dict[str, Any]:
    return commands(typer.main.get_command(tree.build()))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_names_and_options_are_those_of_the_contract() -> None:
    found = all_commands()
    assert set(found) == set(CONTRACT)
    for name, words in CONTRACT.items():
        offered = {word for param in found[name].params for word in (*param.opts, param.metavar or "")}
        assert set(words.split()) <= offered, name


def test_every_command_takes_json() -> None:
    assert [name for name, command in all_commands().items() if "--json" not in words_of(command)] == []


def words_of(command: Any) -> set[str]:
    return {word for param in command.params for word in param.opts}


def test_every_command_and_option_says_what_it_is() -> None:
    for name, command in all_commands().items():
        assert command.help, name
        for param in command.params:
            assert getattr(param, "help", "") or param.name == "help", f"{name} {param.name}"


def test_the_reference_is_what_the_commands_say() -> None:
    """When this fails: `python -m headwater.reference > docs/cli.md`."""
    assert (ROOT / "docs" / "cli.md").read_text() == reference()


def test_help_goes_to_stdout_and_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert code == Exit.OK
    assert "exactly" in out
    assert "Exit status" in out
    assert err == ""
    code, out, _ = run(capsys, "--version")
    assert code == Exit.OK
    assert out.startswith("headwater ")


def test_a_wrong_command_line_is_a_usage_error_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("up", "--devices", "many"), ("nothing",), ("lake", "sql"), ("agent", "run"), ("up", "--no")):
        code, out, err = run(capsys, *arguments)
        assert code == Exit.USAGE, arguments
        assert out == ""
        assert err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("up", "--devices", "0"), ("--devices 0", "1..200", "swarm")),
        (("up", "--speed", "0"), ("--speed 0",)),
        (("up", "--broker", "http://x"), ("http://x", "mosquitto")),
        (("up", "--lake", "ftp://x"), ("ftp://x", "s3://bucket/prefix")),
        (("up", "--recordings", "none.csv"), ("none.csv", "no such file")),
        (("up", "--for", "-1"), ("--for -1", "above 0")),
        (("demo", "--seconds", "nan"), ("--seconds nan", "above 0")),
        (("demo", "--port", "70000"), ("--port 70000", "0 takes a free one")),
        (("lake", "sql", "SELECT 1", "--lake", "ftp://x"), ("ftp://x", "file:///")),
        (("lake", "streams", "--lake", "file:///"), ("'file:///'", "root of all files")),
        (("lake", "head", "watch", "--lake", "file:///nowhere", "--at", "soon"), ("soon", "ISO 8601")),
        (("lake", "sql", "SELECT 1", "--json", "--format", "csv"), ("--json", "--format csv", "one of the two")),
        (("lake", "streams", "--json", "--format", "json"), ("--json", "--format json")),
        (("lake", "streams"), ("holds no stack", "headwater up")),
        (("agent", "status"), ("--socket", "--config")),
        (("agent", "status", "--config", "none.toml"), ("none.toml",)),
        (("simulate", "swarm", "--devices", "0", "--rate", "1", "--broker", "mqtt://x"), ("--devices 0", "1..50000")),
        ((*SWARM, "--devices", "1", "--rate", "1e12"), ("--rate 1e+12", "10000000 readings")),
        ((*SWARM, "--devices", "1", "--rate", "1e6", "--rows", "1"), ("--rate", "--rows", "50,000")),
        ((*SWARM, "--devices", "1", "--rate", "1", "--rows", "0"), ("--rows 0", "1..65536")),
        ((*SWARM, "--devices", "1", "--rate", "1", "--seconds", "0"), ("--seconds 0",)),
        (("simulate", "swarm", "--devices", "1", "--rate", "1", "--broker", "tcp://x"), ("tcp://x", "mqtt://")),
        (("simulate", "swarm", "--devices", "1", "--rate", "1"), ("--broker",)),
        (("train", "run", "r.toml", "--until", "nothing"), ("--until 'nothing'", "dataset, checks, search")),
        (("train", "run", "r.toml", "--force", "nothing"), ("--force 'nothing'", "release")),
        (("train", "dataset", "none.toml"), ("none.toml", "recipe.toml")),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_remedy_and_no_traceback(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HEADWATER_DATA", "HEADWATER_LAKE", "HEADWATER_BROKER"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = run(capsys, *arguments)
    assert code == Exit.USAGE
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigurationError("x"), 2),
        (Rejected(Reason.BAD_TS, "x"), 2),
        (TemporaryError("x"), 3),
        (HeadwaterError("x"), 1),
        (extras.ExtraMissing("x"), 2),
    ],
)
def test_the_class_of_an_error_is_its_exit_status(error: HeadwaterError, status: int) -> None:
    assert exit_of(error) == status


def test_a_missing_extra_names_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Mutants tried: `require` not called by `imports` (another message)."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "duckdb" else object())
    code, out, err = run(capsys, "lake", "streams", "--lake", f"file://{tmp_path}")
    assert (code, out) == (Exit.USAGE, "")
    assert err == "error: headwater lake needs duckdb; run: pip install 'headwater[gateway]'\n"


def test_a_module_that_breaks_half_way_names_its_extra_and_a_bug_of_ours_does_not() -> None:
    with pytest.raises(extras.ExtraMissing, match=r"a_part_of_it.*headwater\[edge\]"), extras.imports("edge", "x"):
        raise ModuleNotFoundError("gone", name="a_part_of_it.inner")
    with pytest.raises(ModuleNotFoundError), extras.imports("edge", "x"):
        raise ModuleNotFoundError("gone", name="edge_agent.nothing")


def test_extras_are_those_of_the_project() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"paho": "paho-mqtt", "sklearn": "scikit-learn"}
    for extra, modules in extras.MODULES.items():
        text = " ".join(declared[extra])
        missing = [module for module in modules if names.get(module, module.replace("_", "-")) not in text]
        assert missing == [], extra


def test_the_command_line_imports_nothing_heavy_before_it_knows_what_is_wanted() -> None:
    """Mutants tried: `import duckdb` at the top of commands/lake.py."""
    import subprocess

    heavy = {"duckdb", "deltalake", "pyarrow", "numpy", "paho", "obstore", "boto3", "aiohttp", "structlog", "rich"}
    code = "import sys, headwater.commands.tree as tree; tree.build(); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert heavy & set(said.split()) == set()


scalars = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(), st.lists(st.text())
)
keys = st.text(min_size=1)


@given(st.recursive(st.dictionaries(keys, scalars), lambda inner: st.dictionaries(keys, st.one_of(scalars, inner))))
def test_toml_that_is_written_is_read_back_as_it_was(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dumps(table)) == table


def test_toml_refuses_what_it_has_no_word_for() -> None:
    assert toml.dumps({"a": None, "b": 1}) == "b = 1\n"
    with pytest.raises(TypeError, match="complex"):
        toml.dumps({"a": 1j})


def test_json_answers_are_json_whatever_is_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    from datetime import UTC, datetime, timedelta
    from decimal import Decimal

    import numpy as np

    from headwater import output

    value = {
        "time": datetime(2026, 11, 21, tzinfo=UTC),
        "span": timedelta(seconds=1.5),
        "exact": Decimal("1.10"),
        "bytes": b"\x00\xff",
        "numpy": np.float32(0.5),
        "nan": float("nan"),
        "list": [np.int64(3)],
    }
    output.say_json(value)
    assert json.loads(capsys.readouterr().out) == {
        "time": "2026-11-21T00:00:00Z",
        "span": "PT1.5S",
        "exact": "1.10",
        "bytes": "AP8=",
        "numpy": 0.5,
        "nan": None,
        "list": [3],
    }


def test_no_command_has_a_name_of_its_own_for_a_shared_option() -> None:
    """An option means the same everywhere: its help text differs only where the command says more."""
    from headwater.commands import agent, doctor, lake, simulate

    for function in (agent.status, lake.sql, simulate.swarm, doctor.doctor):
        assert str(inspect.signature(function).parameters["data"].annotation) == "Data"

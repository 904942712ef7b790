"""A recipe that cannot be is refused before anything runs, naming key, value and remedy."""

from __future__ import annotations

import copy
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from contract.errors import ConfigurationError
from headwater.learning.recipe import demo_recipe
from trainer.recipe import Range
from trainer.recipe_file import load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = tomllib.loads(
    """
    name = "activity"
    task = "classification"
    [data]
    stream = "watch"
    fields = ["ax", "ay"]
    [labels]
    stream = "exercise"
    field = "exercise"
    [window]
    rows = 128
    stride = 64
    gap_s = 0.5
    [search]
    metric = "f1_macro"
    """
)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The minimal recipe with one key set, or taken away where the value is None."""
    table = copy.deepcopy(MINIMAL)
    *folders, key = path.split(".")
    inner = table
    for folder in folders:
        inner = inner.setdefault(folder, {})
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return table


def test_the_shortest_recipe_is_enough() -> None:
    recipe = parse_recipe(MINIMAL, "recipe.toml")
    assert recipe.split.by == "device"
    assert recipe.split.test == 0.2
    assert recipe.labels is not None
    assert recipe.labels.span == "drop"
    assert not recipe.policy.approve
    assert not recipe.policy.rollout


@pytest.mark.parametrize("name", ["watch", "machine-temperature"])
def test_the_examples_are_recipes(name: str) -> None:
    assert load_recipe(ROOT / "examples" / name / "recipe.toml").name


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("name", "Über", ("name", "Über", "a-z")),
        ("name", None, ("name", "missing")),
        ("task", "regression", ("task", "regression")),
        ("sed", 1, ("sed = 1", "unknown key", "seed")),
        ("window.strid", 3, ("[window]", "strid = 3", "stride")),
        ("window.rows", 1, ("rows = 1", "2")),
        ("window.rows", 100_000, ("rows", "65536")),
        ("window.gap_s", 0, ("gap_s",)),
        ("data.stream", "a/b", ("[data] stream", "a/b")),
        ("data.fields", [], ("[data] fields", "0 names")),
        ("data.fields", ["a", "a"], ("['a']", "once")),
        ("data.fields", [f"f{n}" for n in range(9_000)], ("9000",)),
        ("labels", None, ("[labels]", "missing", "stream, table or sql")),
        ("labels.sql", "SELECT 1", ("[labels]", "exactly one")),
        ("labels.span", "first", ("span", "first")),
        ("split.test", 0.3, ("test = 0.3", "0.25")),
        ("split.by", "group", ("group", "regular expression")),
        ("split.group", "(", ("[split] group", "'('", "regular expression")),
        ("split.by", "random", ("random", "overlap", "force")),
        ("families.isolation_forest.trees", 10, ("isolation_forest", "classification", "random_forest")),
        ("families.mlp.alpha", {"low": 1, "high": 0}, ("alpha", "low 1", "high 0")),
        ("families.mlp.alpha", {"low": 0, "high": 1, "log": True}, ("alpha", "log")),
        ("families.mlp.alpha", {"low": 0, "hgh": 1}, ("alpha", "hgh")),
        ("families.mlp.alpha", [], ("alpha", "empty")),
        ("families.mlp.alpha", {"low": 1, "high": 9, "log": True, "step": 2}, ("alpha", "log", "step 2")),
        ("families.mlp.alpha", {"low": 1.0, "high": 9, "log": True, "step": 1}, ("alpha", "log", "step 1")),
        ("families.mlp.alpha", {"low": 1, "high": 9, "step": 0}, ("alpha", "step 0", "above 0")),
        ("families.mlp.alpha", {"low": 0.1, "high": 0.9, "step": -0.1}, ("alpha", "step -0.1", "above 0")),
        ("families.mlp.alpha", {"low": 0.1, "high": math.inf}, ("alpha", "high inf", "both ends")),
        ("features.include", ["mean", "bogus"], ("[features] include", "bogus", "zero_crossings")),
        ("split", {"by": "time", "test_groups": ["a"]}, ("[split] test_groups", "'a'", "time", "leave it out")),
        ("checks.ranges", {"az": [0, 1]}, ("[checks.ranges] az", "ax, ay")),
        ("checks.ranges", {"ax": [1, 0]}, ("[checks.ranges] ax", "[1, 0]", "lower one first")),
        ("rollout.guard", {"bogus": 1.0}, ("[rollout.guard] bogus = 1.0", "nan_share_max")),
        ("rollout.guard", {"nan_share_max": 2.0}, ("[rollout.guard]", "nan_share_max = 2.0")),
        ("rollout.stages", [], ("[rollout]", "0 stages", "give 1 to")),
        ("rollout.stages", [{"percent": 50}, {"percent": 50}], ("[rollout] stage 2 is 50 %", "must rise")),
        ("rollout.stages", [{"devices": ["Ü"]}], ("[rollout] stage 1", "Ü")),
        ("rollout.max_wait_s", 1e9, ("[rollout] stage 1", "max_wait_s")),
        ("rollout.stages", [{"percent": 5, "tag": "lab"}], ("stage 1", "percent", "tag")),
        ("policy.approve", True, ("[policy] approve = true", "[search] target", "person")),
        ("search.trials", 0, ("trials = 0",)),
        ("search.metric", None, ("metric", "missing")),
    ],
)
def test_what_cannot_be_is_refused_with_key_value_and_remedy(path: str, value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_recipe(changed(path, value), "recipe.toml")
    message = str(refused.value)
    assert message.startswith("recipe.toml: "), message
    assert [word for word in words if word not in message] == [], message


def test_a_release_may_be_approved_without_a_person_where_a_target_says_what_is_good() -> None:
    table = changed("policy.approve", True)
    table["search"] = table["search"] | {"target": 0.9}
    assert parse_recipe(table, "r").policy.approve


@pytest.mark.parametrize("people", [1, 4])
def test_the_recipe_of_the_demo_is_one(people: int) -> None:
    devices = [f"watch-s{number:02d}-{side}" for number in range(1, people + 1) for side in "lr"]
    found = parse_recipe(demo_recipe(devices), "demo")
    assert found.policy.approve
    assert found.split.by == ("group" if people >= 3 else "time")


def test_a_random_split_is_allowed_by_force_or_without_overlap() -> None:
    forced = changed("split.by", "random")
    forced["split"]["force"] = True
    assert parse_recipe(forced, "r").split.force
    apart = changed("split.by", "random")
    apart["window"]["stride"] = 128
    assert parse_recipe(apart, "r").split.by == "random"


def test_anomalies_need_no_labels() -> None:
    table = changed("labels", None) | {"task": "anomaly"}
    assert parse_recipe(table, "r").labels is None


def test_a_search_space_is_a_range_a_choice_or_a_value() -> None:
    table = changed("families.mlp", {"alpha": {"low": 1e-5, "high": 0.1, "log": True}, "size": [16, 32], "k": 3})
    found = parse_recipe(table, "r").families["mlp"]
    assert found == {"alpha": Range(low=1e-5, high=0.1, log=True), "size": [16, 32], "k": 3}


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml.*a recipe\.toml"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigurationError, match=r"bad\.toml is not TOML"):
        load_recipe(tmp_path / "bad.toml")

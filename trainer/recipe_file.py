"""Reading and checking `recipe.toml`, once, at the rim: an unknown key, a wrong type or a value that cannot be ends the
start with a message that names file, key, value and remedy.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from contract.errors import ConfigurationError
from contract.models import WINDOW_CELLS_MAX
from contract.names import is_name
from contract.settings import convert, read_toml
from lake import rollout_spec
from trainer.errors import RecipeError
from trainer.recipe import FAMILIES, FEATURES, FIELDS_MAX, Range, Recipe, stage_tables


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigurationError: naming file, key, value and remedy.
    """
    return parse_recipe(read_toml(path, "a recipe.toml"), str(path))


def parse_recipe(table: dict[str, Any], source: str) -> Recipe:
    """Check a parsed recipe.

    Args:
        table: the parsed TOML.
        source: its name, for messages.

    Raises:
        ConfigurationError: naming key, value and remedy.
    """
    _check_spaces(table, source)
    recipe = convert(table, Recipe, f"{source}: ")
    try:
        _check(recipe)
    except ConfigurationError as error:
        raise RecipeError(f"{source}: {error}") from error
    return recipe


def _check_spaces(table: dict[str, Any], source: str) -> None:
    """Ranges one by one: in a table of tables whose keys are free, a message could not say which one is wrong."""
    families = table.get("families")
    for family, spaces in (families if isinstance(families, dict) else {}).items():
        for name, space in (spaces if isinstance(spaces, dict) else {}).items():
            if isinstance(space, dict):
                convert(space, Range, f"{source}: [families.{family}.{name}] ")


def _check(recipe: Recipe) -> None:
    for key, name in (("name", recipe.name), ("[data] stream", recipe.data.stream)):
        if not is_name(name):
            raise RecipeError(f"{key} = {name[:80]!r} is not a name; use 1 to 63 of a-z 0-9 . _ -")
    _check_data(recipe)
    _check_labels(recipe)
    _check_split(recipe)
    _check_features(recipe)
    _check_families(recipe)
    _check_ranges(recipe)
    _check_rollout(recipe)
    if recipe.policy.approve and recipe.search.target is None:
        raise RecipeError(
            "[policy] approve = true needs [search] target, which held-out windows must meet: without one anything "
            "would be signed; give a target, or let a person approve"
        )


def _check_data(recipe: Recipe) -> None:
    fields = recipe.data.fields
    if not fields or len(fields) > FIELDS_MAX:
        raise RecipeError(f"[data] fields has {len(fields)} names; give 1 to {FIELDS_MAX}")
    if repeated := {name for name in fields if fields.count(name) > 1}:
        raise RecipeError(f"[data] fields names {sorted(repeated)} more than once; name every channel once")
    if recipe.window.rows * len(fields) > WINDOW_CELLS_MAX:
        raise RecipeError(
            f"[window] rows = {recipe.window.rows} with {len(fields)} fields has more than {WINDOW_CELLS_MAX} cells; "
            "take fewer rows or fields"
        )


def _check_labels(recipe: Recipe) -> None:
    labels = recipe.labels
    if labels is None:
        if recipe.task == "classification":
            raise RecipeError("[labels] is missing; a classification learns from labels: give stream, table or sql")
        return
    if bool(labels.stream) + bool(labels.table) + bool(labels.sql) != 1:
        raise RecipeError("[labels] has none or several of stream, table and sql; give exactly one")


def _check_split(recipe: Recipe) -> None:
    rule = recipe.split
    if rule.group and rule.group_sql:
        raise RecipeError("[split] has both group and group_sql; give one")
    if rule.by == "group" and not (rule.group or rule.group_sql):
        raise RecipeError('[split] by = "group" needs group (a regular expression) or group_sql; give one')
    if rule.test_groups and rule.by not in ("device", "group"):
        raise RecipeError(
            f'[split] test_groups = {list(rule.test_groups)} means nothing with by = "{rule.by}"; leave it out, or use '
            'by = "device" or "group"'
        )
    try:
        re.compile(rule.group)
    except re.error as error:
        raise RecipeError(f"[split] group = {rule.group!r} is not a regular expression ({error}); mend it") from error
    if rule.by == "random" and recipe.window.stride < recipe.window.rows and not rule.force:
        raise RecipeError(
            f'[split] by = "random" over windows that overlap (stride {recipe.window.stride} < rows '
            f"{recipe.window.rows}) puts nearly the same window on both sides; use device, group or time, or set "
            "force = true and do not believe the figures"
        )


def _check_features(recipe: Recipe) -> None:
    if unknown := [name for name in recipe.features.include if name not in FEATURES]:
        raise RecipeError(f"[features] include = {unknown} are no features; choose of {', '.join(FEATURES)}")


def _check_families(recipe: Recipe) -> None:
    known = FAMILIES[recipe.task]
    for family, spaces in recipe.families.items():
        if family not in known:
            raise RecipeError(f"[families.{family}] is no family for {recipe.task}; choose of {', '.join(known)}")
        for name, space in spaces.items():
            if isinstance(space, list) and not space:
                raise RecipeError(f"[families.{family}] {name} is an empty list; give values to choose from")
            if isinstance(space, Range) and (trouble := _trouble(space)):
                raise RecipeError(f"[families.{family}] {name}: {trouble}")


def _trouble(space: Range) -> str:
    """Why nothing can be drawn from a range; empty where it can."""
    if not (math.isfinite(space.low) and math.isfinite(space.high)):
        return f"low {space.low} or high {space.high} is no finite number; give both ends"
    if space.low > space.high:
        return f"low {space.low} is above high {space.high}; swap them"
    if space.step is not None and not 0 < space.step < math.inf:
        return f"step {space.step} leads nowhere; give one above 0, or leave it out"
    if not space.log:
        return ""
    if space.low <= 0:
        return f"log needs low above 0, not {space.low}"
    if space.step is not None and not (space.is_whole and space.step == 1):
        return f"log and step {space.step} cannot be together; leave one of them out"
    return ""


def _check_ranges(recipe: Recipe) -> None:
    fields = recipe.data.fields
    for name, (low, high) in recipe.checks.ranges.items():
        if name not in fields:
            raise RecipeError(f"[checks.ranges] {name} is no field; use of {', '.join(fields[:40])}")
        if not low <= high:
            raise RecipeError(f"[checks.ranges] {name} = [{low:g}, {high:g}] holds no value; give the lower one first")


def _check_rollout(recipe: Recipe) -> None:
    """What could not be ordered from a gateway later (see `lake.rollout_spec`)."""
    rollout = recipe.rollout
    guard = convert(rollout.guard, rollout_spec.Guard, "[rollout.guard] ")
    for number, stage in enumerate(rollout.stages, 1):
        if (stage.percent is not None) + bool(stage.tag) + bool(stage.devices) != 1:
            raise RecipeError(f"[rollout] stage {number} has none or several of percent, tag and devices; give one")
    stages = [
        msgspec.structs.replace(
            convert(table | {"guard": {}}, rollout_spec.Stage, f"[rollout] stage {number}: "), guard=guard
        )
        for number, table in enumerate(stage_tables(rollout), 1)
    ]
    try:
        spec = rollout_spec.Spec(model=recipe.name, version=1, sha256="", stages=tuple(stages), trial=recipe.trial)
        rollout_spec.check_spec(spec)
    except ConfigurationError as error:
        raise RecipeError(f"[rollout] {error}") from error

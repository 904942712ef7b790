"""What was exported and evaluated becomes one draft, and is approved only where recipe, figures and keys say so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract.errors import ConfigurationError
from contract.models import target_path
from lake.approval import Approver, approve
from lake.releases import Releases, ReleaseState
from lake.trust.keys import KeyFolder, generate_key, write_key
from tests.trust_world import World
from tests.unit.trainer_sets import recipe
from trainer.errors import TrainingError
from trainer.recipe import Policy, Recipe
from trainer.release import step
from trainer.steps import Record, StepContext, record_path

DATASET = {"streams": {"s": 3}, "sha256": "b" * 64, "windows": 40, "rows": 4_000}
EVALUATE: dict[str, Any] = {
    "family": "forest",
    "metrics": [
        {"name": "f1_macro", "value": 0.9, "split": "test: device in (a)"},
        {"name": "log_loss", "value": None, "split": "test: device in (a)"},
    ],
}
EXPORT = {
    "task": "classification",
    "family": "forest",
    "stream": "s",
    "fields": ["x", "y"],
    "dtypes": ["float", "double"],
    "window": {"rows": 64, "stride": 32, "gap_s": 1.5},
    "sample_rate_hz": 50.0,
    "classes": ["rest", "walk"],
    "threshold": None,
    "features": ["x_mean", "y_std"],
    "opset": 22,
    "ir": 10,
    "model": {"file": "model.onnx", "sha256": "c" * 64, "size": 5},
    "probe": {"file": "probe.arrow", "windows": 64, "score_tolerance": 1e-6},
    "reference": {"file": "reference.json"},
    "parity": {"windows": 100},
}


def said(work: Path, name: str, outputs: Any) -> None:
    record = Record(
        step=name,
        run="1",
        key="k",
        pins={},
        code="c",
        source="s",
        seed=1,
        packages={},
        started_at_us=1,
        seconds=1.0,
        outputs=outputs,
        files={},
    )
    record_path(work, name).write_bytes(msgspec.json.encode(record))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def context(world: World) -> StepContext:
    work = world.folder / "work"
    (work / "export").mkdir(parents=True)
    for name in ("model.onnx", "probe.arrow", "reference.json"):
        (work / "export" / name).write_text(f"bytes of {name}")
    for name, outputs in (("dataset", DATASET), ("evaluate", EVALUATE), ("export", EXPORT)):
        said(work, name, outputs)
    return StepContext(
        recipe=recipe(), work=work, lake=None, store=world.store, seed=7, recipe_text="# the recipe", code="rev-1"
    )


def with_policy(context: StepContext, target: float | None, **policy: Any) -> StepContext:
    found: Recipe = msgspec.structs.replace(context.recipe, policy=Policy(**policy))
    found = msgspec.structs.replace(
        found, search=msgspec.structs.replace(found.search, metric="f1_macro", target=target)
    )
    return replace(context, recipe=found)


def test_a_draft_holds_everything_that_the_steps_said(context: StepContext) -> None:
    outputs = step(context)
    release = Releases(context.store).look().get(context.recipe.name, 1)
    manifest = release.manifest
    assert (outputs["state"], outputs["version"], release.state) == ("draft", 1, ReleaseState.DRAFT)
    assert json.loads(json.dumps(outputs)) == outputs
    assert (manifest.stream, manifest.fields, manifest.dtypes) == ("s", ("x", "y"), ("float", "double"))
    assert (manifest.window.rows, manifest.window.gap_s, manifest.sample_rate_hz) == (64, 1.5, 50.0)
    assert (manifest.classes, manifest.features) == (("rest", "walk"), ("x_mean", "y_std"))
    assert [(metric.name, metric.value) for metric in manifest.metrics] == [("f1_macro", 0.9)]
    assert (manifest.dataset.streams, manifest.dataset.windows) == ({"s": 3}, 40)
    assert (manifest.recipe, manifest.code, manifest.seed) == ("# the recipe", "rev-1", 7)
    assert manifest.probe is not None and manifest.probe.score_tolerance == 1e-6
    assert manifest.limits == context.recipe.limits
    assert manifest.packages["python"]
    found = [Releases(context.store).artifact(artifact.sha256) for artifact in release.artifacts]
    assert found == [b"bytes of model.onnx", b"bytes of probe.arrow", b"bytes of reference.json"]


def test_publishing_again_finds_the_same_draft(context: StepContext) -> None:
    assert step(context)["version"] == step(context)["version"] == 1


def test_a_release_replaces_the_newest_approved_one(context: StepContext, world: World) -> None:
    name = context.recipe.name
    step(context)
    approver = Approver(world.repository(), world.targets, world.online, "bob")
    approve(Releases(world.store), name, 1, approver, "a test")
    assert step(replace(context, seed=8))["parent"] == 1
    assert step(replace(context, seed=9))["parent"] == 1


def test_a_policy_approves_where_the_target_is_met_and_keys_are_at_hand(context: StepContext, world: World) -> None:
    keyed = replace(context, keys=world.keys.path)
    cases = (
        (with_policy(keyed, 0.8), "[policy] approve is not set"),
        (with_policy(keyed, 0.95, approve=True), "f1_macro is 0.9000 on held-out windows, below the target 0.95"),
        (with_policy(keyed, None, approve=True), "[search] target is not set"),
        (with_policy(context, 0.8, approve=True), "no --keys were given"),
    )
    for case, why in cases:
        outputs = step(case)
        assert (outputs["state"], outputs["not_approved"]) == ("draft", why)
    outputs = step(with_policy(keyed, 0.8, approve=True))
    assert (outputs["state"], outputs["not_approved"], outputs["version"]) == ("approved", "", 1)
    assert target_path(context.recipe.name, 1) in world.repository().published().targets.targets


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no folder", "targets.pem cannot be read"),
        ("no anchor", "root.json is not beside them"),
        ("encrypted", "is encrypted; set HEADWATER_KEY_PASSPHRASE"),
        ("a stranger's", "is not the key that the lake names in root version 1"),
        ("a stranger's online", "online.pem is not the key that the lake names"),
        ("another lake's", "if root.json is that of another lake, name the folder of this lake"),
    ],
)
def test_keys_that_cannot_approve_are_refused_before_anything_is_published(
    context: StepContext, world: World, damage: str, words: str
) -> None:
    """A draft that stays behind would be taken for one that somebody wanted."""
    keys = world.keys
    if damage == "no folder":
        keys = KeyFolder(world.folder / "nothing")
    elif damage == "no anchor":
        keys.anchor_path.unlink()
    elif damage == "another lake's":
        (world.folder / "other").mkdir()
        keys = World(world.folder / "other").keys
    else:
        name = "online" if damage.endswith("online") else "targets"
        key = world.targets if damage == "encrypted" else generate_key()
        keys.file(name).unlink()
        write_key(keys.file(name), key, b"secret" if damage == "encrypted" else None)
    with pytest.raises(
        ConfigurationError, match=r"\[policy\] approve = true, and the keys in .* cannot approve"
    ) as said:
        step(with_policy(replace(context, keys=keys.path), 0.8, approve=True))
    assert words in str(said.value)
    assert Releases(context.store).look().releases == {}
    assert not (world.folder / "lake" / "models" / "artifacts").exists()


def test_keys_are_not_looked_at_where_the_target_is_missed(context: StepContext, tmp_path: Path) -> None:
    missed = with_policy(replace(context, keys=tmp_path / "nothing"), 0.95, approve=True)
    assert step(missed)["state"] == "draft"


def test_a_step_that_said_something_else_is_to_be_run_again(context: StepContext) -> None:
    said(context.work, "export", EXPORT | {"window": {"rows": 0, "stride": 1, "gap_s": 1}})
    with pytest.raises(TrainingError, match="headwater train export"):
        step(context)
    said(context.work, "export", EXPORT)
    said(context.work, "dataset", DATASET | {"windows": 0})
    with pytest.raises(TrainingError, match="dataset"):
        step(context)
    assert Releases(context.store).look().releases == {}


def test_a_file_that_is_gone_is_named(context: StepContext) -> None:
    (context.work / "export" / "probe.arrow").unlink()
    with pytest.raises(ConfigurationError, match=r"probe\.arrow"):
        step(context)
    assert Releases(context.store).look().releases == {}

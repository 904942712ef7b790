"""Keys and releases by the command line alone: make, publish, look, approve, rotate, retire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater import cli
from lake.releases import Releases
from lake.store import Store, StoreSettings
from lake.trust.keys import read_key
from lake.trust.repository import TrustRepository
from tests.trust_world import MODEL, manifest


class Shell:
    """Runs commands over one lake and one folder of keys."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.lake, self.keys, self._capsys = f"file://{folder}/lake", folder / "keys", capsys
        (folder / "lake").mkdir()
        self.store = Store(StoreSettings(url=self.lake, fsync=False))

    def __call__(self, *words: str, keys: bool = True, status: int = 0) -> Any:
        options = ["--lake", self.lake, *(["--keys", str(self.keys)] if keys else []), "--json"]
        with pytest.raises(SystemExit) as end:
            cli.main([*words, *options])
        said = self._capsys.readouterr()
        assert int(end.value.code or 0) == status, said.err
        if status:
            return said.err
        lines = [json.loads(line) for line in said.out.splitlines()]
        return lines if words[:2] == ("release", "list") else lines[0]

    def publish(self, **changes: Any) -> None:
        releases = Releases(self.store)
        releases.publish(manifest(artifact=releases.put_artifact(b"onnx"), **changes), who="ann", why="try")


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    for name in ("HEADWATER_KEYS", "HEADWATER_LAKE", "HEADWATER_DATA", "HEADWATER_KEY_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
    return Shell(tmp_path, capsys)


def test_a_new_root_key_leaves_those_in_other_hands_in_force(shell: Shell, tmp_path: Path) -> None:
    shell("keys", "init", "--root-keys", "3", "--root-threshold", "2")
    before = {path.name: read_key(path, None).public_key.keyid for path in shell.keys.glob("root*.pem")}
    away = tmp_path / "root-3.pem"
    (shell.keys / "root-3.pem").rename(away)
    shell("keys", "rotate", "root")
    new = read_key(shell.keys / "root.pem", None).public_key.keyid
    root = TrustRepository(shell.store, anchor=(shell.keys / "root.json").read_bytes()).published().root
    assert new not in before.values()
    assert set(root.roles["root"].keyids) == {new, before["root-2.pem"], before["root-3.pem"]}
    assert root.roles["root"].threshold == 2
    # Who has the other two can still change keys, without the one that stayed here.
    away.rename(shell.keys / "root-3.pem")
    (shell.keys / "root-2.pem").unlink()
    shell("keys", "rotate", "root")
    shell("keys", "rotate", "online")


def test_a_release_from_draft_to_retirement(shell: Shell) -> None:
    made = shell("keys", "init")
    assert {role["role"] for role in made["roles"]} == {"root", "targets", "snapshot", "timestamp"}
    assert all(role["here"] for role in made["roles"])
    assert shell("keys", "init") == made
    shell.publish()
    shell.publish(seed=2, family="forest")
    assert [(one["version"], one["state"]) for one in shell("release", "list", keys=False)] == [
        (2, "draft"),
        (1, "draft"),
    ]
    assert shell("release", "list", "--stream", "watch", "--since", "8", keys=False) == []
    assert "approved" in shell("release", "show", MODEL, keys=False, status=2)
    for word in ("approve", "retire"):
        assert "why = ' ' is no reason; say why (--why)" in shell("release", word, f"{MODEL}@2", "--why", " ", status=2)
    assert "why = ''" in shell("release", "approve", f"{MODEL}@2", status=2)
    assert shell("release", "show", f"{MODEL}@2", keys=False)["signed"] is False
    answer = shell("release", "approve", f"{MODEL}@2", "--by", "bob", "--why", "better")
    assert answer == {"model": MODEL, "version": 2, "state": "approved", "published": True}
    shown = shell("release", "show", MODEL, keys=False)
    assert (shown["version"], shown["signed"], shown["history"][-1]["by"]) == (2, True, "bob")
    changed = shell("release", "diff", f"{MODEL}@1", f"{MODEL}@2", keys=False)["changed"]
    assert changed == {"family": ["zscore", "forest"], "seed": [1, 2]}
    assert shell("release", "retire", f"{MODEL}@2", "--why", "drift")["state"] == "retired"
    assert shell("release", "show", f"{MODEL}@2", keys=False)["signed"] is False


def test_the_drill_of_changing_every_key(shell: Shell) -> None:
    shell("keys", "init")
    shell.publish()
    shell("release", "approve", f"{MODEL}@1", "--why", "good")
    before = {role["role"]: role["key"] for role in shell("keys", "show")["roles"]}
    for number, role in enumerate(("online", "targets", "root"), 2):
        assert shell("keys", "rotate", role)["root_version"] == number
        assert (shell.keys / f"{role}.retired.pem").exists()
        assert not (shell.keys / f"{role}.next.pem").exists()
    after = shell("keys", "show")
    assert all(before[role["role"]] != role["key"] and role["here"] for role in after["roles"])
    assert shell("release", "show", MODEL, keys=False)["signed"] is True
    assert shell("keys", "renew")["root_version"] == 5
    (shell.keys / "targets.pem").unlink()
    assert "targets.pem" in shell("release", "retire", f"{MODEL}@1", "--why", "drift", status=2)
    assert shell("keys", "rotate", "targets", "--stolen")["root_version"] == 6
    assert shell("release", "show", MODEL, keys=False)["signed"] is True


def test_encrypted_keys_ask_for_their_passphrase(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_KEY_PASSPHRASE", "secret")
    shell("keys", "init")
    shell.publish()
    shell("release", "approve", f"{MODEL}@1", "--why", "good")
    monkeypatch.delenv("HEADWATER_KEY_PASSPHRASE")
    assert "HEADWATER_KEY_PASSPHRASE" in shell("release", "retire", f"{MODEL}@1", "--why", "drift", status=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("release", "approve", "Gestures"), "MODEL@VERSION"),
        (("release", "approve", "gestures"), "names no version"),
        (("keys", "init", "--root-keys", "0"), "--root-keys 0"),
        (("keys", "init", "--root-keys", "2", "--root-threshold", "3"), "threshold 3"),
        (("keys", "show"), "keys init"),
    ],
)
def test_what_is_asked_wrongly_is_told_with_its_remedy(shell: Shell, words: tuple[str, ...], said: str) -> None:
    assert said in shell(*words, status=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("release", "list", "nothing"), "no release of a model 'nothing'"),
        (("release", "show", "nothing"), "release list"),
        (("release", "diff", "nothing@1", "nothing@2"), "release list"),
        (("release", "approve", "nothing@1"), "release list"),
        (("release", "retire", "nothing@1"), "release list"),
        (("rollout", "start", "nothing"), "release list"),
        (("rollout", "status", "nothing"), "rollout status"),
        (("rollout", "history", "nothing"), "rollout status"),
        (("rollout", "pause", "nothing", "--why", "x"), "rollout status"),
        (("rollout", "rollback", "nothing", "--why", "x"), "rollout status"),
    ],
)
def test_a_name_that_is_not_there_is_a_wrong_command_line(shell: Shell, words: tuple[str, ...], said: str) -> None:
    """Mutants tried: the exit status of a release and of a rollout that refuse."""
    assert said in shell(*words, keys=False, status=2)


def test_a_lake_without_keys_and_a_folder_without_its_anchor_are_told_apart(shell: Shell) -> None:
    """Mutants tried: the anchor asked for first, as it was."""
    for words in (("keys", "show"), ("keys", "rotate", "online"), ("keys", "renew")):
        said = shell(*words, status=2)
        assert said == f"error: lake {shell.lake} has no keys for models yet; make them with: headwater keys init\n"
    assert not shell.keys.exists()
    shell("keys", "init")
    (shell.keys / "root.json").unlink()
    for words in (("keys", "rotate", "online"), ("keys", "renew")):
        assert "root.json is not there" in shell(*words, status=2)
    assert sorted(path.name for path in shell.keys.iterdir()) == ["online.pem", "root.pem", "targets.pem"]


def test_narrowing_by_device_needs_a_stream(shell: Shell) -> None:
    assert "--stream" in shell("release", "list", "--device", "watch-1", keys=False, status=2)

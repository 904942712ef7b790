"""Every step of training, by the real command line, killed at its worst moments and on a full disk: what was there
stays, nothing half-made is taken for whole, and running it again is all that there is to do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.exits import Exit
from lake.evaluations import Evaluations
from lake.releases import Releases, ReleaseState
from tests.integration import trainer_lake
from tests.integration.test_buffer_disk_trouble import fill, mounted, unmounted
from tests.integration.trainer_lake import bring_in_walkers, open_lake
from trainer.files import hashed_files
from trainer.steps import read_record

ROOT = Path(__file__).parents[2]
STEPS = ("dataset", "checks", "search", "evaluate", "export", "release")
RECIPE = trainer_lake.RECIPE.replace("trials = 3", "trials = 1") + "[families.logistic_regression]\n"
DYING = """
import os, signal, sys
step, moment = sys.argv.pop(1), sys.argv.pop(1)
from trainer import steps
def dying(real):
    def call(first, second):
        if step in (first.stem, getattr(second, "name", "")):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(first, second)
    return call
setattr(steps, moment, dying(getattr(steps, moment)))
from headwater.cli import console
console()
"""
"""`headwater`, killed when a step has written its files and is to publish them (`publish`), or has published them and
is to write its record (`write_durably`)."""


SHORT_LIVED = """
import os, signal, sys
fits = int(sys.argv.pop(1))
from trainer import search
def counted(*given, real=search.train):
    global fits
    fits -= 1
    if fits < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
search.train = counted
from headwater.cli import console
console()
"""
"""`headwater`, killed in a search that would fit more often than it is told."""


class Training:
    """A recipe over a small lake."""

    def __init__(self, folder: Path) -> None:
        self.store = open_lake(folder / "lake")
        bring_in_walkers(self.store)
        (folder / "recipe.toml").write_text(RECIPE)
        self.work = folder / "work" / "walking"
        self._options = [
            str(folder / "recipe.toml"),
            "--lake",
            self.store.url,
            "--work",
            str(folder / "work"),
            "--json",
        ]

    def __call__(self, *words: str, code: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        start = ["-c", *code] if code else ["-m", "headwater"]
        command = [sys.executable, "-P", *start, "train", *words, *self._options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def is_whole(self, step: str) -> bool:
        """Whether the record of a step names what stands in its folder."""
        found = read_record(self.work, step).files
        return {name: (file.sha256, file.size) for name, file in found.items()} == hashed_files(self.work / step)

    def check_released_once(self) -> None:
        releases = Releases(self.store).look().releases
        assert {name: release.state for name, release in releases.items()} == {("walking", 1): ReleaseState.DRAFT}
        rows = Evaluations(self.store).read().to_pylist()
        assert sorted(row["step"] for row in rows if row["outcome"] == "done") == sorted(STEPS)
        assert not [path.name for path in self.work.iterdir() if "draft" in path.name or "journal" in path.name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_may_be_killed_before_and_after_it_publishes(tmp_path: Path) -> None:
    train = Training(tmp_path)
    for number, step in enumerate(STEPS):
        for moment in ("publish", "write_durably"):
            done = train("run", code=(DYING, step, moment))
            assert done.returncode == -signal.SIGKILL, done.stderr
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            assert [line["step"] for line in lines] == list(STEPS[:number])
            # What had ended before was not done again, and what was killed is not taken for done.
            assert all(line["skipped"] for line in lines[: number if moment == "write_durably" else max(0, number - 1)])
            assert all(train.is_whole(name) for name in STEPS[:number])
            assert not (train.work / f"{step}.json").exists()
    done = train("run")
    assert done.returncode == Exit.OK, done.stderr
    assert [json.loads(line)["skipped"] for line in done.stdout.splitlines()] == [True] * 5 + [False]
    train.check_released_once()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_gets_on_though_every_process_is_killed_in_its_second_trial(tmp_path: Path) -> None:
    """Five fits to a trial, and death at the eighth: without what the killed ones left it would never end."""
    train = Training(tmp_path)
    longer = RECIPE.replace("trials = 1", "trials = 4").replace("seconds = 20", "seconds = 600")
    (tmp_path / "recipe.toml").write_text(longer)
    assert train("run", "--until", "checks").returncode == Exit.OK
    deaths = 0
    while (done := train("search", code=(SHORT_LIVED, "7"))).returncode == -signal.SIGKILL:
        deaths += 1
        assert deaths < 5
        assert not (train.work / "search.json").exists()
    assert done.returncode == Exit.OK, done.stderr
    assert 2 <= deaths < 5
    said = json.loads(done.stdout)["outputs"]
    assert (said["trials"], said["stopped"]) == (4, "trials")
    assert train.is_whole("search")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A work folder on a disk of 16 MiB."""
    where = tmp_path / "work"
    mounted(["-t", "tmpfs", "-o", "size=16m", "tmpfs"], where)
    try:
        yield where
    finally:
        unmounted(where)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_says_that_the_disk_is_full_and_runs_when_there_is_room(tmp_path: Path, small: Path) -> None:
    train = Training(tmp_path)
    for step in STEPS:
        filler = fill(small)
        done = train(step)
        assert done.returncode == Exit.FAILED, (step, done.stdout, done.stderr)
        assert "make room there" in done.stderr or "choose another --work" in done.stderr, (step, done.stderr)
        assert "No space left" in done.stderr, (step, done.stderr)
        assert not (train.work / f"{step}.json").exists()
        assert not (train.work / step).exists()
        assert Releases(train.store).look().releases == {}  # a step that failed has published nothing, nowhere
        filler.unlink()
        done = train(step)
        assert done.returncode == Exit.OK, (step, done.stderr)
        assert train.is_whole(step)
    train.check_released_once()

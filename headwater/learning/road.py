"""The script of the demo's models: what happens one after the other, in a thread beside the devices.

    collect ─▶ train, sign ─▶ roll out in stages ─▶ watch ─▶ turn one device ─▶ drift alert ─▶ learn again ─▶ roll out

Everything is done by the parts that a fleet has: `headwater train run` and `headwater train watch` as processes, the
gateway's rollout controller and monitoring, the agents. The script only waits, and does what a person would.
"""

from __future__ import annotations

import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from contract.errors import HeadwaterError, TemporaryError
from gateway.rollouts.actions import Person, create, name_of
from gateway.rollouts.ordering import specified
from headwater import itself, toml
from headwater.learning.recipe import MODEL, ROWS_PER_DEVICE, demo_recipe, turned
from headwater.up import Stack
from lake.ledger import rows_of
from lake.monitoring import alerts, triggers
from lake.releases import Releases
from lake.rollouts import PATH as ROLLOUTS_PATH
from lake.rollouts import SCHEMA as ROLLOUTS_SCHEMA
from lake.rollouts import Rollout, RolloutState, RolloutTable
from lake.store import Store
from lake.tables import ControlTable

WHO = "headwater demo"
RECORDING_S = 270.0
"""The longest recording, as it was recorded; each device shall have played all of it once."""
WATCH_RATE_HZ = 50.0
LOOK_S = 1.0
TRAIN_S_MAX = 150.0
ROLLOUT_S_MAX = 120.0
WATCH_S = 8.0
"""The release is left alone for so long before a device changes: what is drift must be seen against something."""
DRIFT_S_MAX = 90.0
LEARN_S_MAX = 150.0
_ENDED = frozenset({RolloutState.SUCCEEDED, RolloutState.ABORTED, RolloutState.ROLLED_BACK})

Found = TypeVar("Found")

_log = structlog.get_logger()


class RoadFailed(HeadwaterError):
    """A step of the demo's models did not come to its end; the message says which, and where to look."""


class Rolled(msgspec.Struct, frozen=True, kw_only=True):
    """A release that went to the devices."""

    version: int
    rollout: str
    state: str


class Turned(msgspec.Struct, frozen=True, kw_only=True):
    """The device that was turned, and what became of it."""

    device: str
    since_us: int
    detected_after_s: float | None = None
    alert: str = ""
    """What the alert says."""
    retrained: bool = False


class _Stopped(Exception):
    """The demo is asked to end."""


class Road:
    """Goes the way of models once. `start` begins; `over` is set at its end.

    Args:
        stack: runs, with release keys.
        say: told what is being done.
        soon_away: called before a device is stopped on purpose, and with False when it is back.
    """

    def __init__(self, stack: Stack, say: Callable[[str], None], soon_away: Callable[[bool], None]) -> None:
        assert stack.keys is not None
        self._stack, self._say, self._soon_away = stack, say, soon_away
        self._store = Store(stack.store)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        self.over = threading.Event()
        self.rolled: list[Rolled] = []
        self.turned: Turned | None = None
        self.trouble = ""
        """Why it did not come to its end; empty when it did."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End early, and wait for the end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._go()
        except _Stopped:
            pass  # whoever ends a demo early has seen enough
        except HeadwaterError as error:
            self.trouble = str(error)
        except Exception as error:  # noqa: BLE001 - the demo must end, and not with a model that it does not have
            _log.error("models_fault", exc_info=error)
            self.trouble = f"unexpected {type(error).__name__}: {error}"
        finally:
            self.over.set()

    def _go(self) -> None:
        recipe = self._write_recipe()
        collect_s = RECORDING_S / self._stack.options.speed
        self._say(f"models: collecting recordings for {collect_s:.0f} s")
        self._pause(collect_s)
        self._say("models: training")
        self._train(recipe)
        self._roll_out()
        self._pause(WATCH_S)
        self._change_a_device(recipe)

    # Train.

    def _write_recipe(self) -> Path:
        folder = self._stack.options.data / "train"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{MODEL}.toml"
        path.write_text(toml.dumps(demo_recipe([device.name for device in self._stack.devices])), encoding="utf-8")
        return path

    def _train(self, recipe: Path) -> None:
        """From the lake to an approved release, in a process of its own, as anybody would."""
        data, log = self._stack.options.data, self._stack.options.data / "logs" / "training.log"
        words = ("train", "run", str(recipe), "--data", str(data), "--keys", str(self._stack.keys), "--json")
        with log.open("wb") as output:
            process = subprocess.Popen(
                itself.command("headwater", *words),
                env={**self._stack.environment, **itself.environment(self._stack.environment)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                self._wait(lambda: process.poll() is not None or None, TRAIN_S_MAX, f"training; see {log}")
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RoadFailed(
                f"training ended with status {process.returncode}: {lines[-1] if lines else ''}; see {log}"
            )

    # Roll out.

    def _roll_out(self) -> None:
        """Order the newest approved release for all devices, by the stages of the recipe, and wait for the end."""
        recipe = demo_recipe([])
        releases = Releases(self._store).look()
        stages = [stage | {"max_wait_s": recipe["rollout"]["max_wait_s"]} for stage in recipe["rollout"]["stages"]]
        raw = {"model": MODEL, "stages": stages, "trial": recipe["trial"]}
        spec = specified(raw, releases, "demo: ")
        person = Person(WHO, "the first release of the demo", time.time_ns() // 1000)
        name = name_of(spec, secrets.token_hex(3))
        self._rollouts().act(create(name, spec, person, supersede=True))
        self._say(f"models: {MODEL}@{spec.version} goes to the devices in {len(stages)} stages")
        self._await_rollout(lambda rollout: rollout.name == name, ROLLOUT_S_MAX)

    def _await_rollout(self, chosen: Callable[[Rollout], bool], seconds: float) -> None:
        def ended() -> Rollout | None:
            found = [one for one in self._rollouts().look().of_model(MODEL) if chosen(one)]
            return next((one for one in found if one.state in _ENDED), None)

        rollout = self._wait(ended, seconds, "the rollout; see the gateway's log")
        self.rolled.append(Rolled(version=rollout.spec.version, rollout=rollout.name, state=str(rollout.state)))
        if rollout.state is not RolloutState.SUCCEEDED:
            raise RoadFailed(
                f"rollout {rollout.name} ended as {rollout.state}: {rollout.reason}; see the gateway's log"
            )

    # Drift.

    def _change_a_device(self, recipe: Path) -> None:
        device = self._stack.devices[0]
        self._say(f"models: {device.name} is worn turned by 90 degrees from now on")
        changed = turned(device, self._stack.options.data / "recordings")
        self._soon_away(True)
        self._stack.replace_device(changed)
        self._soon_away(False)
        began_us, began_s = time.time_ns() // 1000, time.monotonic()
        self.turned = Turned(device=device.name, since_us=began_us)
        text = self._wait(lambda: self._alert(device.name, began_us), DRIFT_S_MAX, "the drift to be noticed")
        passed_s = round(time.monotonic() - began_s, 1)
        self.turned = msgspec.structs.replace(self.turned, detected_after_s=passed_s, alert=text)
        self._say(f"models: drift noticed after {passed_s:g} s: {text}")
        # Learning begins when all that it takes of this device was measured since the turn.
        self._pause(max(0.0, ROWS_PER_DEVICE / (WATCH_RATE_HZ * self._stack.options.speed) - passed_s))
        self._stack.start_trainer(recipe)
        version = self._wait(lambda: self._learned(began_us), LEARN_S_MAX, "learning again; see the trainer's log")
        self.turned = msgspec.structs.replace(self.turned, retrained=True)
        self._say(f"models: {MODEL}@{version} was learned, and goes to the devices")
        self._await_rollout(lambda rollout: rollout.spec.version == version, ROLLOUT_S_MAX)
        self._pause(WATCH_S)

    def _alert(self, device: str, since_us: int) -> str | None:
        table = ControlTable(self._store, alerts.PATH, alerts.SCHEMA)
        table.refresh()
        return next(
            (
                str(row["text"])
                for row in rows_of(table.read())
                if row["device"] == device
                and row["event"] == alerts.OPENED
                and row["kind"] in alerts.DRIFT
                and row["at"] >= since_us
            ),
            None,
        )

    def _learned(self, since_us: int) -> int | None:
        """The version that a trigger since then ended with; a training may also end without a release."""
        table = triggers.TriggerTable(
            lambda: ControlTable(self._store, triggers.PATH, triggers.SCHEMA), WHO, lambda: time.time_ns() // 1000
        )
        ended = [
            one for one in table.look().values() if one.model == MODEL and one.at_us >= since_us and not one.is_open
        ]
        versions = [one.detail.get("version") or 0 for one in ended if one.detail.get("outcome") == "rolling_out"]
        return max(versions) if versions and max(versions) > self.rolled[-1].version else None

    # Waiting.

    def _rollouts(self) -> RolloutTable:
        return RolloutTable(lambda: ControlTable(self._store, ROLLOUTS_PATH, ROLLOUTS_SCHEMA))

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    def _wait(self, look: Callable[[], Found | None], seconds: float, what: str) -> Found:
        """Look again and again until there is something to see."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            try:
                found = look()
            except TemporaryError:
                found = None  # the store may just be starting again
            if found is not None:
                return found
            self._pause(LOOK_S)
        raise RoadFailed(f"{what}: not within {seconds:g} s")

"""What is done with a child: every path of the pure state machine, and what must hold on all of them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import ConfigurationError
from headwater.stack.lifecycle import (
    Action,
    Broken,
    Event,
    Exited,
    Kill,
    Life,
    Policy,
    Probe,
    Probed,
    Spawn,
    Spawned,
    SpawnFailed,
    Start,
    State,
    Stop,
    Terminate,
    Tick,
    backoff_s,
    exit_text,
    step,
)

POLICY = Policy(
    ready_timeout_s=10.0,
    ready_interval_s=0.5,
    alive_interval_s=2.0,
    alive_failures_max=3,
    backoff_min_s=1.0,
    backoff_max_s=8.0,
    stable_after_s=20.0,
    starts_failed_max=3,
    stop_timeout_s=5.0,
)


class Play:
    """A child whose story is told event by event, on a clock of its own."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.policy = policy
        self.now = 100.0
        self.life = Life()
        self.actions: list[Action] = []

    def feed(self, *events: Event) -> list[Action]:
        for event in events:
            self.life, actions = step(self.life, event, self.now, self.policy, 0.0)
            self.actions = list(actions)
        return self.actions

    def wait(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.feed(Tick())

    def ready(self, pid: int = 7) -> None:
        self.feed(Start(), Spawned(pid), Tick(), Probed(pid, ""))
        assert self.life.state is State.READY


def test_a_start_probes_until_the_child_is_ready() -> None:
    play = Play()
    assert play.feed(Start()) == [Spawn()]
    assert play.feed(Spawned(7)) == []
    assert play.wait(0.0) == [Probe(7)]
    assert play.wait(0.1) == [], "one probe at a time"
    play.feed(Probed(7, "connection refused"))
    assert (play.life.state, play.life.trouble) == (State.STARTING, "connection refused")
    assert play.wait(0.4) == []
    assert play.wait(0.1) == [Probe(7)]
    play.feed(Probed(7, ""))
    assert (play.life.state, play.life.trouble, play.life.since_s) == (State.READY, "", play.now)


def test_a_start_that_takes_too_long_is_ended_once_and_tried_again() -> None:
    play = Play()
    play.feed(Start(), Spawned(7), Tick(), Probed(7, "silent"))
    assert play.wait(10.0) == [Kill(7)]
    assert play.wait(10.0) == [], "SIGKILL is sent once"
    play.feed(Exited(7, -9))
    assert play.life.state is State.BACKOFF
    assert (play.life.trouble, play.life.last_exit) == ("not ready in time: silent", "SIGKILL")
    assert play.wait(1.0) == [Spawn()]
    assert play.life.restarts_total == 1


def test_so_many_failed_starts_and_a_person_has_to_look() -> None:
    """Mutant tried: `>` for `>=`."""
    play = Play()
    play.feed(Start())
    for attempt in range(3):
        play.feed(Spawned(attempt + 1), Exited(attempt + 1, 1))
        if attempt < 2:
            assert play.life.state is State.BACKOFF
            assert play.wait(8.0) == [Spawn()]
    assert (play.life.state, play.life.last_exit) == (State.FAILED, "exit 1")
    assert play.life.wakes_at_s is None
    assert play.wait(1000.0) == []
    assert play.feed(Start()) == [Spawn()], "somebody looked"
    assert play.life.starts_failed == 0


def test_a_child_that_was_ready_is_started_again_for_ever() -> None:
    play = Play()
    play.ready()
    for pid in range(7, 107):
        play.feed(Exited(pid, -9))
        assert play.life.state is State.BACKOFF
        assert play.wait(8.0) == [Spawn()]
        play.feed(Spawned(pid + 1), Tick(), Probed(pid + 1, ""))
        assert play.life.state is State.READY
    assert play.life.restarts_total == 100


def test_dying_when_ready_is_no_failed_start() -> None:
    """Mutant tried: every death counted as a failed start."""
    play = Play(msgspec.structs.replace(POLICY, starts_failed_max=1))
    play.ready()
    play.feed(Exited(7, -9))
    assert play.life.state is State.BACKOFF


def test_the_pause_doubles_up_to_its_bound_and_is_forgotten_after_a_stable_time() -> None:
    play = Play()
    play.ready()
    pauses = []
    for _ in range(5):
        play.feed(Exited(7, 1))
        assert play.life.due_s is not None
        pauses.append(play.life.due_s - play.now)
        play.wait(pauses[-1])
        play.feed(Spawned(7), Tick(), Probed(7, ""))
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]
    play.now += POLICY.stable_after_s
    play.feed(Exited(7, 1))
    assert play.life.due_s == play.now + 1.0


def test_a_start_that_took_long_is_no_stable_time() -> None:
    """Mutant tried: the time in any state counted as stable."""
    play = Play(msgspec.structs.replace(POLICY, stable_after_s=5.0))
    play.feed(Start())
    pauses = []
    for pid in (1, 2):
        play.feed(Spawned(pid))
        play.now += 9.0
        play.feed(Exited(pid, 1))
        assert play.life.due_s is not None
        pauses.append(play.life.due_s - play.now)
        play.wait(pauses[-1])
    assert pauses == [1.0, 2.0]


@given(st.integers(1, 10_000), st.floats(0.0, 1.0, exclude_max=True))
def test_every_pause_is_within_its_bounds(deaths: int, jitter: float) -> None:
    assert 0.5 * POLICY.backoff_min_s <= backoff_s(deaths, POLICY, jitter) <= POLICY.backoff_max_s


def test_a_child_that_hangs_is_ended_after_so_many_silent_probes_in_a_row() -> None:
    play = Play()
    play.ready()
    for answer in ("silent", "silent", "", "silent", "silent"):
        assert play.wait(2.0) == [Probe(7)]
        assert play.feed(Probed(7, answer)) == []
    assert play.wait(2.0) == [Probe(7)]
    assert play.feed(Probed(7, "silent")) == [Kill(7)]
    play.feed(Exited(7, -9))
    assert (play.life.state, play.life.trouble) == (State.BACKOFF, "did not answer 3 times: silent")


def test_a_child_beyond_repair_is_ended_at_once() -> None:
    play = Play()
    play.ready()
    assert play.feed(Broken(7, "said 'panicked'")) == [Kill(7)]
    assert play.feed(Broken(7, "said 'panicked'")) == []
    play.feed(Probed(7, ""))
    play.feed(Exited(7, -9))
    assert (play.life.state, play.life.trouble) == (State.BACKOFF, "said 'panicked'")


def test_stopping_asks_then_insists_then_is_done() -> None:
    play = Play()
    play.ready()
    assert play.feed(Stop()) == [Terminate(7)]
    assert play.wait(4.9) == []
    assert play.wait(0.1) == [Kill(7)]
    assert play.wait(5.0) == []
    play.feed(Exited(7, -9))
    assert (play.life.state, play.life.pid, play.life.last_exit) == (State.STOPPED, None, "SIGKILL")
    assert play.wait(1000.0) == []


@pytest.mark.parametrize("state", ["starting", "backoff", "failed", "stopped"])
def test_a_stop_is_final_in_every_state(state: str) -> None:
    play = Play(msgspec.structs.replace(POLICY, starts_failed_max=1 if state == "failed" else 3))
    if state != "stopped":
        play.feed(Start(), Spawned(7))
    if state in ("backoff", "failed"):
        play.feed(Exited(7, 1))
    assert play.life.state.value == state
    play.feed(Stop())
    play.feed(Exited(7, -15))
    assert play.life.state is State.STOPPED
    assert play.wait(1000.0) == []


def test_a_start_while_stopping_is_a_restart() -> None:
    play = Play()
    play.ready()
    play.feed(Stop(), Start())
    assert play.feed(Exited(7, 0)) == [Spawn()]
    assert play.life.state is State.STARTING
    play.feed(Spawned(8), Stop(), Start(), Stop())
    assert play.feed(Exited(8, 0)) == []
    assert play.life.state is State.STOPPED


def test_what_is_said_about_an_earlier_process_is_ignored() -> None:
    """Mutant tried: without the comparison of process ids a late answer makes a child READY that never answered."""
    play = Play()
    play.ready(7)
    play.feed(Exited(7, -9))
    play.wait(1.0)
    play.feed(Spawned(8))
    for late in (Probed(7, ""), Broken(7, "panic"), Exited(7, -9)):
        assert play.feed(late) == []
        assert (play.life.state, play.life.pid) == (State.STARTING, 8)


def test_a_process_that_cannot_be_made_counts_as_a_failed_start() -> None:
    play = Play()
    play.feed(Start(), SpawnFailed("no such file"))
    assert play.life.state is State.BACKOFF
    assert play.life.last_exit == "could not be started: no such file"


@pytest.mark.parametrize(("code", "text"), [(0, "exit 0"), (127, "exit 127"), (-9, "SIGKILL"), (-63, "signal 63")])
def test_an_end_is_told_in_words(code: int, text: str) -> None:
    assert exit_text(code) == text


@pytest.mark.parametrize(
    "wrong",
    [
        {"backoff_min_s": 0.0},
        {"backoff_min_s": 5.0, "backoff_max_s": 1.0},
        {"ready_timeout_s": 0.0},
        {"stop_timeout_s": -1.0},
        {"starts_failed_max": 0},
        {"alive_interval_s": 0.0},
    ],
)
def test_a_policy_that_could_spin_or_wait_for_ever_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Policy(**wrong)  # type: ignore[arg-type]


class World:
    """A system that answers what a child's story asks for, so that only possible stories are told."""

    def __init__(self) -> None:
        self.running: int | None = None
        self.pids = 0
        self.killed: set[int] = set()


@given(st.data())
def test_whatever_happens_there_is_one_process_at_most_and_none_after_a_stop(data: st.DataObject) -> None:
    """Mutants tried: Spawn while the old process runs; SIGKILL sent again; no deadline after SIGTERM."""
    play, world = Play(), World()
    choices = st.sampled_from(["start", "stop", "tick", "late tick", "ok", "bad", "broken", "exit"])

    def act(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Spawn):
                assert world.running is None, "two processes at once"
                if data.draw(st.booleans(), label="spawn works"):
                    world.pids += 1
                    world.running = world.pids
                    act(play.feed(Spawned(world.pids)))
                else:
                    act(play.feed(SpawnFailed("no memory")))
            elif isinstance(action, Kill):
                assert action.pid == world.running
                assert action.pid not in world.killed, "SIGKILL twice"
                world.killed.add(action.pid)
            elif isinstance(action, Terminate | Probe):
                assert action.pid == world.running

    def tell(what: str) -> None:
        pid = world.running or data.draw(st.integers(1, 3), label="an old process")
        match what:
            case "start":
                act(play.feed(Start()))
            case "stop":
                act(play.feed(Stop()))
            case "tick":
                act(play.wait(0.3))
            case "late tick":
                act(play.wait(30.0))
            case "ok":
                act(play.feed(Probed(pid, "")))
            case "bad":
                act(play.feed(Probed(pid, "silent")))
            case "broken":
                act(play.feed(Broken(pid, "panic")))
            case "exit" if world.running is not None:
                gone, world.running = world.running, None
                act(play.feed(Exited(gone, -9)))
        assert play.life.pid == world.running
        if play.life.state in (State.STOPPED, State.FAILED):
            assert world.running is None
            assert play.life.wakes_at_s is None
        elif play.life.state is State.BACKOFF:
            assert play.life.wakes_at_s is not None, "nothing would ever start it again"
        elif world.running not in world.killed and play.life.state is not State.READY:
            assert play.life.deadline_s is not None, "nothing would ever end it"

    for what in data.draw(st.lists(choices, max_size=40)):
        tell(what)
    # Whatever the story was: a stop, patience, and it is over.
    tell("stop")
    tell("late tick")
    if world.running is not None:
        assert world.running in world.killed
        tell("exit")
    assert play.life.state is State.STOPPED
    assert world.running is None

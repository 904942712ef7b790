"""Supervision with real processes, really killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.errors import ConfigurationError
from headwater.stack import launch, spawn
from headwater.stack import supervisor as supervisor_module
from headwater.stack.errors import NotReady, StartFailed, StopFailed
from headwater.stack.lifecycle import Policy
from headwater.stack.supervisor import ChildSpec, ChildStatus, Supervisor
from simulators.faults.processes import ProcessFaults, kill_schedule
from tests.integration.servers import PATIENCE_S, alive, wait_until

QUICK = Policy(backoff_min_s=0.05, backoff_max_s=0.2, ready_interval_s=0.05, stop_timeout_s=PATIENCE_S)
FOREVER = "import signal\nwhile True: signal.pause()\n"


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with Supervisor() as made:
        yield made


def child(folder: Path, name: str, code: str = FOREVER, **more: object) -> ChildSpec:
    """A child that runs Python code."""
    settings = {"policy": QUICK, **more}
    return ChildSpec(name=name, argv=(sys.executable, "-u", "-c", code), log=folder / f"{name}.log", **settings)  # type: ignore[arg-type]


def status(supervisor: Supervisor, name: str) -> ChildStatus:
    return next(found for found in supervisor.status() if found.name == name)


def file_there(path: Path) -> None:
    """A probe: READY when the file exists."""
    if not path.exists():
        raise NotReady(f"{path} is not there")


def test_a_child_that_is_killed_comes_back(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start([child(tmp_path, "a")], PATIENCE_S)
    first = supervisor.pid("a")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: supervisor.pid("a") not in (None, first), PATIENCE_S, "a new process")
    supervisor.wait_ready(["a"], PATIENCE_S)
    now = status(supervisor, "a")
    assert (now.state, now.restarts_total, now.last_exit) == ("ready", 1, "SIGKILL")
    assert now.uptime_s >= 0
    assert not alive(first)


def test_a_schedule_of_kills_is_carried_out_and_survived(supervisor: Supervisor, tmp_path: Path, seed: int) -> None:
    names = ["a", "b", "c"]
    supervisor.start([child(tmp_path, name) for name in names], PATIENCE_S)
    schedule = kill_schedule(seed, names, 12, 4.0, pairs_min=3)
    killed = ProcessFaults(supervisor.pid).run(schedule, threading.Event())
    assert len({victim.pid for victim in killed}) == len(killed) == 12
    supervisor.wait_ready(names, PATIENCE_S)
    wait_until(lambda: sum(s.restarts_total for s in supervisor.status()) == 12, PATIENCE_S, "twelve restarts")
    assert not any(alive(victim.pid) for victim in killed)


def test_a_frozen_process_goes_on_where_it_was(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start([child(tmp_path, "a")], PATIENCE_S)
    with ProcessFaults(supervisor.pid).frozen("a") as pid:
        wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T", PATIENCE_S, "frozen")
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] != "T", PATIENCE_S, "going on")
    assert supervisor.pid("a") == pid


ORPHANS = """
import pathlib, sys, threading
from headwater.stack.lifecycle import Policy
from headwater.stack.supervisor import ChildSpec, Supervisor
folder = pathlib.Path(sys.argv[1])
stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: signal.pause()"
supervisor = Supervisor()
supervisor.start(
    [ChildSpec(name=f"c{n}", argv=(sys.executable, "-c", stubborn), log=folder / f"c{n}.log") for n in range(5)], 30)
(folder / "pids").write_text(" ".join(str(supervisor.pid(f"c{n}")) for n in range(5)) + "\\n")
threading.Event().wait()
"""


def test_no_child_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Mutants tried: without PR_SET_PDEATHSIG in `launch.py` all five lived on."""
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        book = tmp_path / "pids"
        wait_until(lambda: book.exists() and book.read_text().endswith("\n"), PATIENCE_S, "five children")
        pids = [int(word) for word in book.read_text().split()]
        assert len(pids) == 5
        assert all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait(PATIENCE_S)
    wait_until(lambda: not any(alive(pid) for pid in pids), PATIENCE_S, "all children are gone")


def test_a_child_whose_parent_died_before_it_began_does_not_begin(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    argv = [sys.executable, "-I", "-S", launch.__file__, "1", "0", sys.executable, "-c", f"open({str(mark)!r}, 'w')"]
    assert subprocess.run(argv, check=False, timeout=PATIENCE_S).returncode == launch.FAILED
    assert not mark.exists()


def test_a_child_that_ignores_sigterm_is_killed_after_its_deadline(supervisor: Supervisor, tmp_path: Path) -> None:
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\n" + FOREVER
    log, policy = tmp_path / "a.log", Policy(stop_timeout_s=0.2)
    supervisor.start([child(tmp_path, "a", code, ready=lambda: file_there(log), policy=policy)], PATIENCE_S)
    pid = supervisor.pid("a")
    assert pid is not None
    supervisor.stop()
    assert (status(supervisor, "a").state, status(supervisor, "a").last_exit) == ("stopped", "SIGKILL")
    assert not alive(pid)


def test_a_child_that_listens_ends_as_it_likes(supervisor: Supervisor, tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('flushed'), sys.exit(3)))\n"
        "print('up')\n" + FOREVER
    )
    log = tmp_path / "a.log"
    supervisor.start([child(tmp_path, "a", code, ready=lambda: file_there(log))], PATIENCE_S)
    supervisor.stop()
    assert status(supervisor, "a").last_exit == "exit 3"
    assert log.read_text() == "up\nflushed\n"


STEP = """
import signal, sys
def say(what): open({book!r}, "a").write(what + " {name}\\n")
signal.signal(signal.SIGTERM, lambda *_: (say("stop"), sys.exit(0)))
say("start")
open({mark!r}, "w").close()
while True: signal.pause()
"""


def test_sinks_start_before_sources_and_sources_stop_before_sinks(supervisor: Supervisor, tmp_path: Path) -> None:
    book = tmp_path / "book"

    def ordered(name: str, tier: int) -> ChildSpec:
        mark = tmp_path / f"{name}.ready"
        code = STEP.format(book=str(book), mark=str(mark), name=name)
        return child(tmp_path, name, code, tier=tier, ready=lambda: file_there(mark))

    parts = [ordered("device", 30), ordered("store", 0), ordered("gateway", 20), ordered("broker", 10)]
    supervisor.start(parts, PATIENCE_S)
    supervisor.stop()
    assert book.read_text().split("\n")[:-1] == [
        *(f"start {name}" for name in ("store", "broker", "gateway", "device")),
        *(f"stop {name}" for name in ("device", "gateway", "broker", "store")),
    ]


def test_a_source_is_not_started_while_its_sink_is_not_ready(supervisor: Supervisor, tmp_path: Path) -> None:
    mark = tmp_path / "never"
    parts = [child(tmp_path, "sink", ready=lambda: file_there(mark)), child(tmp_path, "source", tier=1)]
    with pytest.raises(StartFailed, match="never is not there"):
        supervisor.start(parts, 0.5)
    assert status(supervisor, "source").state == "stopped"


def test_a_child_that_cannot_start_is_given_up_and_its_last_words_are_told(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    policy = Policy(backoff_min_s=0.01, backoff_max_s=0.02, starts_failed_max=3)
    hopeless = child(tmp_path, "a", "import sys; sys.exit('port 1883 is taken')", ready=never, policy=policy)
    with pytest.raises(StartFailed, match="port 1883 is taken") as caught:
        supervisor.start([hopeless], PATIENCE_S)
    assert "exit 1" in str(caught.value)
    now = status(supervisor, "a")
    assert (now.state, now.restarts_total) == ("failed", 2)


def never() -> None:
    raise NotReady("never")


def test_a_program_that_is_missing_is_named(supervisor: Supervisor, tmp_path: Path) -> None:
    policy = Policy(backoff_min_s=0.01, backoff_max_s=0.02, starts_failed_max=1)
    spec = ChildSpec(name="a", argv=("/nowhere/weed",), log=tmp_path / "a.log", ready=never, policy=policy)
    with pytest.raises(StartFailed, match="cannot run /nowhere/weed"):
        supervisor.start([spec], PATIENCE_S)


def test_a_child_that_hangs_is_ended_and_started_again(supervisor: Supervisor, tmp_path: Path) -> None:
    sick = threading.Event()

    def probe() -> None:
        if sick.is_set():
            sick.clear()
            raise NotReady("no answer")

    policy = Policy(alive_interval_s=0.05, alive_failures_max=1, backoff_min_s=0.05, backoff_max_s=0.05)
    supervisor.start([child(tmp_path, "a", ready=probe, policy=policy)], PATIENCE_S)
    first = supervisor.pid("a")
    sick.set()
    wait_until(lambda: supervisor.pid("a") not in (None, first), PATIENCE_S, "a new process")
    supervisor.wait_ready(["a"], PATIENCE_S)
    assert status(supervisor, "a").last_exit == "SIGKILL"


def test_output_that_means_the_end_ends_the_child(supervisor: Supervisor, tmp_path: Path) -> None:
    """The words come in two writes, as a pipe may cut them."""
    flag = tmp_path / "said"
    code = (
        f"import os, time\nif not os.path.exists({str(flag)!r}):\n"
        f"    open({str(flag)!r}, 'w').close()\n"
        "    os.write(1, b'thread x pani'); time.sleep(0.2); os.write(1, b'cked at y\\n')\n" + FOREVER
    )
    supervisor.start([child(tmp_path, "a", code, fatal_output=b"panicked at")], PATIENCE_S)
    wait_until(lambda: status(supervisor, "a").restarts_total == 1, PATIENCE_S, "one restart")
    assert status(supervisor, "a").last_exit == "SIGKILL"
    supervisor.wait_ready(["a"], PATIENCE_S)


def test_what_a_child_started_ends_with_it(supervisor: Supervisor, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        f"grandchild = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])\n"
        "print(grandchild.pid)\n" + FOREVER
    )
    log = tmp_path / "a.log"
    supervisor.start([child(tmp_path, "a", code)], PATIENCE_S)
    grandchild = int(wait_until(lambda: log.exists() and log.read_text().strip(), PATIENCE_S, "its number"))
    pid = supervisor.pid("a")
    assert pid is not None
    assert alive(grandchild)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(grandchild), PATIENCE_S, "the grandchild is gone too")


def test_a_child_that_talks_without_end_fills_only_its_share_of_the_disk(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    code = "import os\nfor _ in range(400): os.write(1, b'x' * 65535 + b'\\n')\nos.write(1, b'done\\n')\n" + FOREVER
    supervisor.start([child(tmp_path, "a", code)], PATIENCE_S)
    log = tmp_path / "a.log"
    wait_until(lambda: log.exists() and log.read_bytes()[-5:] == b"done\n", PATIENCE_S, "all was said")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 3
    assert sum(sizes) <= 3 * 4 * 1024 * 1024


def test_ctrl_c_in_the_terminal_reaches_the_stack_and_not_its_children(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start([child(tmp_path, "a")], PATIENCE_S)
    pid = supervisor.pid("a")
    assert pid is not None
    assert os.getpgid(pid) == pid != os.getpgid(0)
    assert os.getsid(pid) == pid != os.getsid(0)


def test_a_child_may_be_replaced_only_when_it_is_stopped(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start([child(tmp_path, "a")], PATIENCE_S)
    with pytest.raises(ConfigurationError, match="'a' is ready"):
        supervisor.start([child(tmp_path, "a")], PATIENCE_S)
    first = supervisor.pid("a")
    supervisor.stop(["a"])
    supervisor.start([child(tmp_path, "a")], PATIENCE_S)
    assert supervisor.pid("a") != first


def test_settings_reach_the_child(supervisor: Supervisor, tmp_path: Path) -> None:
    code = (
        "import os, resource, signal\n"
        "print(os.getcwd(), os.environ['HW'], resource.getrlimit(resource.RLIMIT_NOFILE)[0],\n"
        "      signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN)\n" + FOREVER
    )
    made: list[str] = []
    spec = child(
        tmp_path,
        "a",
        code,
        env={"HW": "x"},
        cwd=tmp_path,
        open_files_max=123,
        prepare=lambda: made.append("prepared"),
    )
    supervisor.start([spec], PATIENCE_S)
    log = tmp_path / "a.log"
    said = wait_until(lambda: log.exists() and log.read_text().strip(), PATIENCE_S, "its words")
    assert said == f"{tmp_path} x 123 True"
    assert made == ["prepared"]


def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    gc.collect()  # what earlier tests have left open may close at any moment, and make room for numbers of ours
    threads, files = set(threading.enumerate()), set(Path("/proc/self/fd").iterdir())
    with Supervisor() as supervisor:
        supervisor.start([child(tmp_path, name) for name in "abc"], PATIENCE_S)
        pids = [supervisor.pid(name) for name in "abc"]
    supervisor.close()
    assert not any(alive(pid) for pid in pids if pid)
    assert set(threading.enumerate()) - threads == set()
    assert set(Path("/proc/self/fd").iterdir()) - files == set()


def test_a_stop_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a process in uninterruptible sleep: SIGKILL is not delivered."""
    monkeypatch.setattr(supervisor_module, "STOP_SPARE_S", 0.2)
    monkeypatch.setattr(spawn.Child, "terminate", lambda self: None)
    monkeypatch.setattr(spawn.Child, "kill", lambda self: None)
    stuck = Supervisor()
    stuck.start([child(tmp_path, "a", policy=Policy(stop_timeout_s=0.1))], PATIENCE_S)
    pid = stuck.pid("a")
    assert pid is not None
    with pytest.raises(StopFailed, match=f"'a': {pid}"):
        stuck.close()
    # Its thread has ended, so the kernel has ended the child; nobody is left to collect it but this test.
    wait_until(lambda: not alive(pid), PATIENCE_S, "the kernel ends it")
    os.waitpid(pid, 0)


def test_uptime_and_state_are_told_for_display(supervisor: Supervisor, tmp_path: Path) -> None:
    before = time.monotonic()
    supervisor.start([child(tmp_path, "b", tier=1), child(tmp_path, "a", tier=1), child(tmp_path, "z")], PATIENCE_S)
    told = supervisor.status()
    assert [one.name for one in told] == ["z", "a", "b"], "in order of tier, then name"
    assert all(0 <= one.state_s <= one.uptime_s <= time.monotonic() - before for one in told)

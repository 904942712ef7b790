"""The thread that owns all child processes of a stack: starts them in order, restarts them, stops them in order.

One thread makes every child, reads their output into bounded logs, sees their ends and keeps their timers; it waits in
one `select` for whatever comes first. Probes may block, so they run beside it, on a few threads of their own. What has
to be done is decided by `lifecycle`, which is pure; this module only does it.

Children are grouped in tiers. Starting goes up: a tier is started when all below it are READY, sinks before sources.
Stopping goes down: a tier is stopped when all above it are gone, sources before sinks.
"""

from __future__ import annotations

import os
import queue
import random
import selectors
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog

from contract.errors import ConfigurationError, HeadwaterError
from headwater.stack import lifecycle
from headwater.stack.errors import StartFailed, StopFailed
from headwater.stack.lifecycle import Life, Policy, State
from headwater.stack.logs import RotatingLog
from headwater.stack.spawn import Child

PROBES_AT_ONCE_MAX = 4
STOP_SPARE_S = 10.0
"""How much longer than its own deadline a child may take to vanish after SIGKILL, before stopping it has failed."""

GONE = (State.STOPPED, State.FAILED)

Probe = Callable[[], None]
"""Returns when all is well, else raises `HeadwaterError` or `OSError`; must end by itself within seconds."""


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is and how to treat it."""

    name: str
    argv: tuple[str, ...]
    log: Path
    """Where its output goes; three files of 4 MiB at most."""
    env: dict[str, str] = {}
    """Set beside the environment of the stack."""
    cwd: Path | None = None
    tier: int = 0
    """Lower tiers start first and stop last."""
    prepare: Callable[[], None] | None = None
    """Called before every start, for files that the program reads; raises `HeadwaterError` when it cannot."""
    ready: Probe | None = None
    """Also asked while READY when `policy.alive_interval_s` is set. None: a process that exists is READY."""
    clean: Callable[[], None] | None = None
    """Called after every end of the process, for what it leaves behind when it is killed; must not raise."""
    killed_in_stop: bool = False
    """Whether it is known to stop too late now and then, and loses nothing by SIGKILL: no warning then."""
    fatal_output: bytes = b""
    """Output that shows that the process is beyond repair although it runs on; empty for none."""
    policy: Policy = Policy()
    open_files_max: int = 0
    """Open files allowed; 0 for what the stack itself is allowed."""


class ChildStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One child at one moment, for display."""

    name: str
    state: str
    pid: int | None
    uptime_s: float
    """Since the process was made; 0 when there is none."""
    state_s: float
    """How long it is in this state."""
    restarts_total: int
    last_exit: str
    trouble: str
    log: str
    log_bytes_lost_total: int


class _Entry:
    """One child as the supervisor's thread sees it."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.life = Life()
        self.log = RotatingLog(spec.log)
        self.child: Child | None = None
        self.made_at_s = 0.0
        self.seen = b""


class Supervisor:
    """Runs children until told to stop; a context manager that stops what still runs.

    Args:
        clock: monotonic seconds.
        rng: jitters the pauses before restarts.

    Raises:
        ConfigurationError: when the system cannot watch processes as this needs.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None) -> None:
        if not hasattr(os, "pidfd_open"):
            raise ConfigurationError(
                "supervision needs Linux 5.3 or newer; run the servers by hand and name their URLs"
            )
        self._clock = clock
        self._rng = rng or random.Random()
        self._logger = structlog.get_logger()
        self._entries: dict[str, _Entry] = {}
        self._changed = threading.Condition()
        self._inbox: queue.SimpleQueue[tuple[str, lifecycle.Event] | None] = queue.SimpleQueue()
        self._sent = self._handled = 0
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._probes = ThreadPoolExecutor(PROBES_AT_ONCE_MAX, thread_name_prefix="probe")
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self, specs: Iterable[ChildSpec], timeout_s: float) -> None:
        """Add children and start them, tier by tier; returns when all are READY.

        Children of earlier calls run on; a name may be used again when its child is STOPPED or FAILED.

        Args:
            specs: what to start.
            timeout_s: for all of them together.

        Raises:
            StartFailed: when one is FAILED, or not READY in time; the others are left as they are.
            ConfigurationError: when a name is in use.
        """
        specs = list(specs)
        deadline = self._clock() + timeout_s
        with self._changed:
            for spec in specs:
                known = self._entries.get(spec.name)
                if known is not None and known.life.state not in (State.STOPPED, State.FAILED):
                    raise ConfigurationError(
                        f"child {spec.name!r} is {known.life.state}; stop it before it is replaced"
                    )
            for spec in specs:
                self._entries[spec.name] = _Entry(spec)
        for tier in sorted({spec.tier for spec in specs}):
            names = [spec.name for spec in specs if spec.tier == tier]
            self._command(names, lifecycle.Start())
            self.wait_ready(names, deadline - self._clock())

    def wait_ready(self, names: Iterable[str], timeout_s: float) -> None:
        """Wait until these children are READY.

        Raises:
            StartFailed: when one is FAILED, or not READY in time; the message ends with the end of its log.
        """
        names = list(names)
        deadline = self._clock() + timeout_s
        with self._changed:
            while True:
                self._check()
                lives = {name: self._entries[name].life for name in names}
                failed = [name for name in names if lives[name].state is State.FAILED]
                waiting = [name for name in names if lives[name].state is not State.READY]
                left_s = deadline - self._clock()
                if failed or (waiting and left_s <= 0):
                    raise self._start_failed((failed or waiting)[0], timeout_s)
                if not waiting:
                    return
                self._changed.wait(left_s)

    def stop(self, names: Iterable[str] | None = None) -> None:
        """Stop these children, or all, tier by tier from the top; returns when they are gone.

        Raises:
            StopFailed: when one is still there STOP_SPARE_S after its SIGKILL was due.
        """
        with self._changed:
            chosen = [self._entries[name].spec for name in (self._entries if names is None else names)]
        for tier in sorted({spec.tier for spec in chosen}, reverse=True):
            together = [spec for spec in chosen if spec.tier == tier]
            self._command([spec.name for spec in together], lifecycle.Stop())
            longest_s = max(spec.policy.stop_timeout_s for spec in together) + STOP_SPARE_S
            self._wait_gone([spec.name for spec in together], longest_s)

    def close(self) -> None:
        """Stop all children and end the supervisor. Closing twice is allowed.

        Raises:
            StopFailed: see `stop`; the supervisor has ended all the same, and the kernel ends what is left.
        """
        if self._closed:
            return
        try:
            if self._failure is None:
                self.stop()
        finally:
            self._closed = True
            self._inbox.put(None)
            self._wake()
            self._thread.join()
            self._probes.shutdown(wait=True, cancel_futures=True)
            os.close(self._wake_in)
            os.close(self._wake_out)

    def status(self) -> tuple[ChildStatus, ...]:
        """All children at this moment, in order of tier and name."""
        now = self._clock()
        with self._changed:
            entries = sorted(self._entries.values(), key=lambda entry: (entry.spec.tier, entry.spec.name))
            return tuple(
                ChildStatus(
                    name=entry.spec.name,
                    state=entry.life.state.value,
                    pid=entry.life.pid,
                    uptime_s=now - entry.made_at_s if entry.life.pid is not None else 0.0,
                    state_s=now - entry.life.since_s,
                    restarts_total=entry.life.restarts_total,
                    last_exit=entry.life.last_exit,
                    trouble=entry.life.trouble,
                    log=str(entry.spec.log),
                    log_bytes_lost_total=entry.log.bytes_lost_total,
                )
                for entry in entries
            )

    def pid(self, name: str) -> int | None:
        """The process id of a child, or None while it has none."""
        with self._changed:
            return self._entries[name].life.pid

    # From here to `_run`: for the threads of callers and probes. From `_run` on: the supervisor's thread only.

    def _send(self, name: str, event: lifecycle.Event) -> int:
        with self._changed:
            self._inbox.put((name, event))
            self._sent += 1
            number = self._sent
        self._wake()
        return number

    def _command(self, names: list[str], event: lifecycle.Event) -> None:
        """Send and wait until it is handled: the state seen afterwards is one that knows of the command."""
        last = max((self._send(name, event) for name in names), default=0)
        with self._changed:
            self._changed.wait_for(lambda: self._handled >= last or self._failure is not None)
            self._check()

    def _wake(self) -> None:
        try:
            os.write(self._wake_in, b"\0")
        except BlockingIOError:
            # The pipe is full of wake-ups that were not read yet: it will wake.
            return

    def _wait_gone(self, names: list[str], timeout_s: float) -> None:
        deadline = self._clock() + timeout_s
        with self._changed:
            while True:
                self._check()
                states = {name: self._entries[name].life.state for name in names}
                there = [name for name, state in states.items() if state not in GONE]
                if not there:
                    return
                if (left_s := deadline - self._clock()) <= 0:
                    pids = {name: self._entries[name].life.pid for name in there}
                    raise StopFailed(f"still there after SIGKILL: {pids}; look for processes in state D (ps -l)")
                self._changed.wait(left_s)

    def _check(self) -> None:
        if self._failure is not None:
            raise StartFailed(f"the supervisor itself failed: {self._failure!r}") from self._failure

    def _start_failed(self, name: str, timeout_s: float) -> StartFailed:
        entry = self._entries[name]
        why = entry.life.trouble or "no answer"
        return StartFailed(
            f"{name} is {entry.life.state} after {timeout_s:.0f} s at most: {why}; "
            f"its log {entry.spec.log} ends with:\n{entry.log.tail()}"
        )

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            # Children must not outlive their supervisor, and who waits must not wait for ever.
            for entry in self._entries.values():
                if entry.child is not None:
                    entry.child.kill()
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            raise
        finally:
            self._selector.close()

    def _turn(self) -> bool:
        """Wait for whatever comes first and handle it; False when it was the end."""
        now = self._clock()
        wakes = [time for entry in self._entries.copy().values() if (time := entry.life.wakes_at_s) is not None]
        timeout = max(0.0, min(wakes) - now) if wakes else None
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                os.read(self._wake_out, 4096)
                continue
            entry, part = key.data
            if entry.child is None:
                continue
            if part == "output":
                self._copy_output(entry)
            else:
                self._end(entry)
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if message is None:
                return False
            name, event = message
            self._apply(self._entries[name], event)
            with self._changed:
                self._handled += 1
                self._changed.notify_all()
        for entry in self._entries.copy().values():
            if entry.life.wakes_at_s is not None:
                self._apply(entry, lifecycle.Tick())
        return True

    def _apply(self, entry: _Entry, event: lifecycle.Event) -> None:
        """Feed one event, then do what is asked, which may bring more events."""
        events = [event]
        while events:
            before = entry.life
            life, actions = lifecycle.step(before, events.pop(0), self._clock(), entry.spec.policy, self._rng.random())
            with self._changed:
                entry.life = life
                if life.state is not before.state:
                    self._changed.notify_all()
            if life.state is not before.state:
                self._tell(entry, before)
            for action in actions:
                events.extend(self._do(entry, action))

    def _do(self, entry: _Entry, action: lifecycle.Action) -> list[lifecycle.Event]:
        match action:
            case lifecycle.Spawn():
                return [self._spawn(entry)]
            case lifecycle.Probe(pid):
                if entry.spec.ready is None:
                    return [lifecycle.Probed(pid, "")]
                self._probes.submit(self._ask, entry.spec.name, entry.spec.ready, pid)
            case lifecycle.Terminate() if entry.child is not None:
                entry.child.terminate()
            case lifecycle.Kill() if entry.child is not None:
                known = entry.spec.killed_in_stop and entry.life.state is State.STOPPING
                say = self._logger.info if known else self._logger.warning
                say("child.kill", child=entry.spec.name, pid=entry.child.pid, why=entry.life.trouble)
                entry.child.kill()
        return []

    def _spawn(self, entry: _Entry) -> lifecycle.Event:
        spec = entry.spec
        try:
            if spec.prepare is not None:
                spec.prepare()
            child = Child(spec.argv, env=spec.env, cwd=spec.cwd, files_max=spec.open_files_max)
        except (OSError, HeadwaterError) as error:
            return lifecycle.SpawnFailed(str(error))
        entry.child, entry.made_at_s, entry.seen = child, self._clock(), b""
        self._selector.register(child.output_fd, selectors.EVENT_READ, (entry, "output"))
        self._selector.register(child.end_fd, selectors.EVENT_READ, (entry, "end"))
        return lifecycle.Spawned(child.pid)

    def _ask(self, name: str, probe: Probe, pid: int) -> None:
        """On a thread of its own: ask the child, and report what it said."""
        try:
            probe()
            reason = ""
        except (OSError, HeadwaterError) as error:
            reason = str(error) or repr(error)
        except Exception as error:  # noqa: BLE001 - a probe with a mistake must not leave its child waiting for ever
            reason = f"the probe itself failed: {error!r}"
        self._send(name, lifecycle.Probed(pid, reason))

    def _copy_output(self, entry: _Entry) -> None:
        """Output to log; and look for the words that mean the end."""
        assert entry.child is not None
        data = entry.child.read()
        if data is None:
            # The child closed its output and lives on; there is nothing more to read.
            self._selector.unregister(entry.child.output_fd)
        elif data:
            entry.log.write(data)
            if (fatal := entry.spec.fatal_output) and fatal in (seen := entry.seen + data):
                line = seen[seen.index(fatal) :].split(b"\n", 1)[0].decode("utf-8", "replace")
                self._apply(entry, lifecycle.Broken(entry.child.pid, f"said {line[:200]!r}"))
            # Enough to find words that were cut in two by the pipe.
            entry.seen = (entry.seen + data)[-len(fatal) :] if fatal else b""

    def _end(self, entry: _Entry) -> None:
        """The process has ended: keep its last words, give everything back, decide what comes next."""
        child = entry.child
        assert child is not None
        code = child.reap()
        if code is None:
            return
        entry.log.write(child.last_words())
        entry.log.close()
        for descriptor in (child.output_fd, child.end_fd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        child.close()
        entry.child = None
        if entry.spec.clean is not None:
            entry.spec.clean()
        self._apply(entry, lifecycle.Exited(child.pid, code))

    def _tell(self, entry: _Entry, before: Life) -> None:
        """One line for what an operator wants to know: unexpected ends loudly, the rest as lifecycle."""
        life = entry.life
        bad = life.state in (State.BACKOFF, State.FAILED)
        say = self._logger.warning if bad else self._logger.info
        say(
            f"child.{life.state}",
            child=entry.spec.name,
            pid=life.pid,
            was=before.state.value,
            restarts=life.restarts_total,
            **({"last_exit": life.last_exit, "why": life.trouble} if bad else {}),
        )

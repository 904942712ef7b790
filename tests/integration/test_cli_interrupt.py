"""Ctrl-C: at whatever moment it comes, the command ends at once, quietly, with exit status 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from headwater.aside import Aside
from lake.duck import interruptible
from lake.errors import QueryError
from lake.query import Lake
from lake.store import Store, StoreSettings
from tests.integration.servers import PATIENCE_S, wait_until
from tests.integration.stacks import ROOT

LONG = "SELECT sum(a.range * b.range % 7) FROM range(10000000) a, range(10000000) b"
"""Hours of work."""
ENDS_S = 10.0


@pytest.mark.parametrize("into_query", [False, True])
def test_ctrl_c_ends_a_query_whether_it_is_loading_or_at_work(tmp_path: Path, *, into_query: bool) -> None:
    command = [sys.executable, "-m", "headwater", "lake", "sql", LONG, "--lake", f"file://{tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: ".duckdb_extension" in maps.read_text(), PATIENCE_S, "an extension is loaded")
        if into_query:
            works = psutil.Process(process.pid)
            begun_s = sum(works.cpu_times()[:2])
            wait_until(lambda: sum(works.cpu_times()[:2]) - begun_s > 3.0, PATIENCE_S, "the query works")
        asked_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, *said) == (130, "", "")
    assert time.monotonic() - asked_s < ENDS_S


@pytest.mark.parametrize("module", ["headwater.commands.tree", "typer", "headwater.output"])
def test_ctrl_c_while_the_command_line_is_imported_is_quiet(module: str) -> None:
    code = f"""
import sys
from headwater.cli import main
class CtrlC:
    def find_spec(self, name, path, target=None):
        if name == {module!r}: raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
main(["--version"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_that_duckdb_caught_is_ctrl_c_again() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        raise RuntimeError("Query interrupted")
    with pytest.raises(RuntimeError, match="another"), interruptible():
        raise RuntimeError("another")


def test_questions_of_another_thread_are_ended(tmp_path: Path) -> None:
    lake = Lake(Store(StoreSettings(url=f"file://{tmp_path}")))
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            lake.sql(LONG)
        except QueryError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(600):
        lake.interrupt()
        thread.join(0.1)
        if not thread.is_alive():
            break
    assert "nterrupt" in str(ended[0])
    assert lake.sql("SELECT 1 AS one").to_pylist() == [{"one": 1}]
    lake.close()


def test_work_beside_gives_back_what_it_makes_and_what_it_raises() -> None:
    with Aside() as aside:
        assert list(aside.each(iter(range(3)))) == [0, 1, 2]
        assert aside.run(threading.get_ident) != threading.get_ident()
        with pytest.raises(QueryError, match="no"):
            aside.run(lambda: (_ for _ in ()).throw(QueryError("no")))


def test_a_second_ctrl_c_ends_at_once_with_last_words() -> None:
    code = """
import os, signal, threading
from headwater.signals import stopping
with stopping('{"event":"stopped"}') as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.wait(10)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(30)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, '{"event":"stopped"}\n', "")

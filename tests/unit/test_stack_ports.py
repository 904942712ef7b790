"""Ports are usual, free and remembered; the files that remember are whole or not there; one stack per folder."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from contract.errors import ConfigurationError
from headwater.stack.errors import FolderInUse, NoFreePort
from headwater.stack.folder import DataFolder
from headwater.stack.ports import PORT_MAX, PORT_MIN, PortBook, choose, is_free, listener, write_whole


def test_the_usual_port_is_taken_when_it_is_free() -> None:
    assert choose({"mqtt": 1883}, {}, free=lambda port: True, rng=random.Random(1)) == {"mqtt": 1883}


def test_the_port_of_last_time_comes_before_the_usual_one() -> None:
    assert choose({"mqtt": 1883}, {"mqtt": 21000}, free=lambda port: True, rng=random.Random(1)) == {"mqtt": 21000}


def test_a_taken_port_is_replaced_by_one_that_no_outgoing_connection_uses() -> None:
    chosen = choose({"mqtt": 1883}, {"mqtt": 1900}, free=lambda port: port > 2000, rng=random.Random(1))
    assert PORT_MIN <= chosen["mqtt"] <= PORT_MAX < 32_768


def test_who_listens_on_a_port_is_known_by_name_and_number() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert listener(taken.getsockname()[1]) == ""
        taken.listen(1)
        name = Path("/proc/self/comm").read_text().strip()
        assert listener(taken.getsockname()[1]) == f" by {name} (process {os.getpid()})"


def test_two_names_never_share_a_port() -> None:
    """Mutant tried: without `reserved`, both get 1883."""
    chosen = choose({"a": 1883, "b": 1883}, {}, free=lambda port: True, rng=random.Random(1))
    assert chosen["a"] == 1883
    assert chosen["b"] != 1883


def test_nobody_takes_the_port_that_another_name_remembers() -> None:
    chosen = choose({"a": 8333, "b": 9000}, {"b": 8333}, free=lambda port: True, rng=random.Random(1))
    assert chosen["b"] == 8333
    assert chosen["a"] != 8333


def test_the_search_ends() -> None:
    tried: list[int] = []

    def taken(port: int) -> bool:
        tried.append(port)
        return False

    with pytest.raises(NoFreePort, match=r"'mqtt'.*1883"):
        choose({"mqtt": 1883}, {}, free=taken, rng=random.Random(1))
    assert len(tried) <= 201


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_with_a_listener_is_not_free(host: str) -> None:
    with socket.socket() as listener:
        listener.bind((host, 0))
        port = listener.getsockname()[1]
        listener.listen()
        assert not is_free(port)
    assert is_free(port)


def test_a_port_whose_last_connections_are_in_time_wait_is_free() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.listen()
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        server.close()
        client.close()
    assert is_free(port)


def test_a_book_gives_the_same_ports_at_the_next_start(tmp_path: Path) -> None:
    first = PortBook(tmp_path / "ports.json", rng=random.Random(1)).claim({"a": None, "b": None})
    second = PortBook(tmp_path / "ports.json", rng=random.Random(2)).claim({"b": None, "a": None, "c": None})
    assert {name: second[name] for name in first} == first
    assert PortBook(tmp_path / "ports.json").read() == second


def test_a_remembered_port_that_was_taken_meanwhile_is_replaced_and_the_new_one_remembered(tmp_path: Path) -> None:
    book = PortBook(tmp_path / "ports.json")
    first = book.claim({"a": None})["a"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", first))
        listener.listen()
        second = book.claim({"a": None})["a"]
    assert second != first
    assert book.claim({"a": None})["a"] == second


@pytest.mark.parametrize("content", [b"", b"[]", b'{"ports": {"a": "b"}}', b"\xff"])
def test_a_damaged_book_is_named_and_the_remedy_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ports.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match="delete it"):
        PortBook(tmp_path / "ports.json").claim({"a": None})


def test_a_file_is_replaced_whole_with_the_right_mode_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_whole(path, b"new", 0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        write_whole(tmp_path / "nowhere" / "file", b"", 0o600)


def test_a_second_stack_over_the_same_folder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with DataFolder(tmp_path / "data") as folder:
        with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
            DataFolder(tmp_path / "data")
        assert folder.log("broker").parent.is_dir()
    DataFolder(tmp_path / "data").close()


def test_the_lock_goes_with_the_process_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from headwater.stack.folder import DataFolder\n"
        "folder = DataFolder(pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], check=False, timeout=60)
    assert ended.returncode == -9
    DataFolder(tmp_path / "data").close()


def test_the_data_folder_is_its_owners(tmp_path: Path) -> None:
    with DataFolder(tmp_path / "data") as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="--data"):
        DataFolder(tmp_path / "file" / "data")


def test_a_part_that_cannot_be_made_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a start by another user. Mutants tried: the errors of the system as they come (a traceback)."""
    with DataFolder(tmp_path / "data") as folder:
        (folder.path / "logs").write_bytes(b"")
        with pytest.raises(ConfigurationError, match=r"folder .*/logs cannot be made.*--data"):
            folder.log("store")
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(ConfigurationError, match=r"folder .*/broker cannot be written.*--data"):
            folder.part("broker")
        folder.ports.mkdir()
        with pytest.raises(ConfigurationError, match=r"port book .*ports.json cannot be read"):
            PortBook(folder.ports).read()

"""The board's fingerprint: the same at every start, another one on another board, and no serial number in it.

Mutants tried, each made a test here fail: meaningless serials taken at their word; made-up addresses counted.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_agent.identity import IdentityPaths, hardware_fingerprint

UUID = "4c4c4544-0032-3510-8056-b8c04f4a3732"


class Board:
    def __init__(self, folder: Path) -> None:
        self.paths = IdentityPaths(
            device_tree_serial=folder / "serial", dmi_product_uuid=folder / "uuid", net=folder / "net"
        )

    def serial(self, text: str) -> Board:
        self.paths.device_tree_serial.write_bytes(text.encode() + b"\0")
        return self

    def uuid(self, text: str) -> Board:
        self.paths.dmi_product_uuid.write_text(text + "\n")
        return self

    def card(self, name: str, address: str, kind: str = "0", *, device: bool = True) -> Board:
        folder = self.paths.net / name
        folder.mkdir(parents=True)
        (folder / "address").write_text(address + "\n")
        (folder / "addr_assign_type").write_text(kind + "\n")
        if device:
            (folder / "device").mkdir()
        return self

    @property
    def fingerprint(self) -> str:
        return hardware_fingerprint(self.paths)


@pytest.fixture
def boards(tmp_path: Path):
    def make() -> Board:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return Board(folder)

    return make


def test_a_fingerprint_is_the_same_at_every_start_and_another_on_another_board(boards) -> None:
    board = boards().serial("10000000a1b2c3d4")
    assert board.fingerprint == board.fingerprint == boards().serial("10000000A1B2C3D4").fingerprint
    assert board.fingerprint != boards().serial("10000000a1b2c3d5").fingerprint
    assert re.fullmatch("[0-9a-f]{32}", board.fingerprint)
    assert "a1b2c3d4" not in board.fingerprint


def test_the_device_tree_comes_before_dmi_and_dmi_before_network_cards(boards) -> None:
    serial, uuid = boards().serial("10000000a1b2c3d4"), boards().uuid(UUID)
    card = boards().card("eth0", "dc:a6:32:01:02:03")
    everything = boards().serial("10000000a1b2c3d4").uuid(UUID).card("eth0", "dc:a6:32:01:02:03")
    assert everything.fingerprint == serial.fingerprint
    assert boards().uuid(UUID).card("eth0", "dc:a6:32:01:02:03").fingerprint == uuid.fingerprint
    assert len({serial.fingerprint, uuid.fingerprint, card.fingerprint}) == 3


@pytest.mark.parametrize(
    "nothing",
    [
        "",
        "0000000000000000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        "Default string",
        "To be filled by O.E.M.",
        "03000200-0400-0500-0006-000700080009",
        "0123456789",
        "Not Specified",
        "None",
    ],
)
def test_a_serial_that_every_board_has_tells_nothing(boards, nothing: str) -> None:
    card = boards().card("eth0", "dc:a6:32:01:02:03").fingerprint
    assert boards().serial(nothing).uuid(nothing).card("eth0", "dc:a6:32:01:02:03").fingerprint == card


def test_only_burnt_in_addresses_of_real_cards_count(boards) -> None:
    plain = boards().card("eth0", "dc:a6:32:01:02:03").fingerprint
    crowded = (
        boards()
        .card("br0", "02:00:00:00:00:01", "3")
        .card("docker0", "02:42:00:00:00:01", "0", device=False)
        .card("lo", "00:00:00:00:00:00", "0")
        .card("wlan0", "fe:a6:32:01:02:04", "0")
        .card("usb0", "02:a6:32:01:02:04", "1")
        .card("eth0", "dc:a6:32:01:02:03")
    )
    assert crowded.fingerprint == plain


def test_a_board_that_says_nothing_still_has_a_fingerprint(boards) -> None:
    assert boards().fingerprint == boards().card("eth0", "02:a6:32:01:02:04", "3").fingerprint
    assert re.fullmatch("[0-9a-f]{32}", boards().fingerprint)

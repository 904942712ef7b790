"""Files that cannot be read: moved aside, said so, and what can still be read of them is sent.

Mutants tried, each made a test here fail: damaged bodies handed out; salvaging into the file's own place; the
log of the damaged file left for the new one; another program's database replaced.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.errors import ConfigurationError
from edge_agent.buffer import files
from edge_agent.buffer.port import Eviction, Hollow, NewBatch, OpenedKind
from edge_agent.buffer.sqlite import SqliteBuffer
from tests.contract.buffer_suite import PLENTY, ROOMY, Hands, held, lane_of
from tests.integration.buffer_disk import memory_folder

PAGE = 512


@pytest.fixture
def path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder / "buffer.db"


def buffer_at(path: Path, fingerprint: str = "board") -> SqliteBuffer:
    return SqliteBuffer(path, {"a": ROOMY, "b": ROOMY}, PLENTY, Hands(), fingerprint)


def body(seq: int) -> bytes:
    return random.Random(seq).randbytes(400 + 37 * seq % 2_000)


def filled(path: Path, count: int = 60) -> str:
    """A closed buffer with so many batches of stream a, and its epoch."""
    buffer = buffer_at(path)
    epoch = [buffer.append("a", body(seq), seq, Hands()()).epoch for seq in range(1, count + 1)].pop()
    buffer.close()
    return epoch


def copies(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.glob("*.corrupt-*"))


def test_a_file_that_is_no_database_is_moved_aside_and_kept(path: Path) -> None:
    garbage = random.Random(1).randbytes(10_000)
    path.write_bytes(garbage)
    buffer = buffer_at(path)
    assert buffer.opened.kind is OpenedKind.CORRUPT_REPLACED
    assert "buffer.db.corrupt-1" in buffer.opened.detail
    assert path.with_name("buffer.db.corrupt-1").read_bytes() == garbage
    assert buffer.append("a", b"new", 1, Hands()()).seq == 1
    buffer.close()
    again = buffer_at(path)
    assert again.opened.kind is OpenedKind.RESUMED
    again.close()


def test_an_empty_file_is_a_new_buffer(path: Path) -> None:
    path.touch()
    buffer = buffer_at(path)
    assert buffer.opened.kind is OpenedKind.NEW
    buffer.close()


def test_the_number_of_kept_files_is_bounded(path: Path) -> None:
    for number in range(5):
        path.write_bytes(b"no database " * 100 + bytes([number]))
        buffer_at(path).close()
    assert copies(path) == ["buffer.db.corrupt-4", "buffer.db.corrupt-5"]
    assert path.with_name("buffer.db.corrupt-5").read_bytes()[-1] == 4


def test_another_programs_database_is_not_touched(path: Path) -> None:
    foreign = sqlite3.connect(path)
    foreign.execute("CREATE TABLE precious (x)")
    foreign.commit()
    foreign.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="another program's database"):
        buffer_at(path)
    assert path.read_bytes()[100:] == before[100:]
    assert sqlite3.connect(path).execute("SELECT count(*) FROM precious").fetchone() == (0,)


def test_a_layout_of_a_later_version_is_refused(path: Path) -> None:
    filled(path)
    later = sqlite3.connect(path)
    later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(ConfigurationError, match="layout 99"):
        buffer_at(path)


def test_a_damaged_body_is_given_up_and_the_others_are_not(path: Path) -> None:
    epoch = filled(path)
    content = bytearray(path.read_bytes())
    at = content.index(body(7)[100:140])
    content[at + 5] ^= 0x10
    path.write_bytes(content)
    buffer = buffer_at(path)
    assert buffer.opened.kind is OpenedKind.RESUMED
    assert buffer.body("a", epoch, 7) is None
    assert list(buffer.take_evictions()) == [Eviction("a", epoch, 7, 7, 7, "corrupt")]
    assert held(buffer, "a", epoch) == [seq for seq in range(1, 61) if seq != 7]
    assert all(buffer.body("a", epoch, seq) == body(seq) for seq in range(1, 61) if seq != 7)
    assert lane_of(buffer, "a", epoch).batches == 59
    assert buffer.append("a", b"next", 1, Hands()())[:2] == (epoch, 61)
    buffer.close()


def test_what_can_be_read_of_a_cut_file_is_saved_and_never_continued(path: Path) -> None:
    epoch = filled(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    buffer = buffer_at(path)
    drained = drain(buffer, epoch)
    assert buffer.opened.kind is OpenedKind.CORRUPT_REPLACED
    assert len(drained) > 10
    assert all(found == body(seq) for seq, found in drained.items())
    new = buffer.append("a", b"new", 1, Hands()())
    assert new.seq == 1
    assert new.epoch != epoch
    buffer.close()


def drain(buffer: SqliteBuffer, epoch: str) -> dict[int, bytes]:
    """What the uplink would send of the epoch."""
    drained: dict[int, bytes] = {}
    after = 0
    while (batch := buffer.peek("a", epoch, after)) is not None:
        after = batch.seq
        found = buffer.body("a", epoch, batch.seq)
        if found is not None:
            drained[batch.seq] = found
    return drained


def test_no_damaged_page_brings_a_wrong_body_a_used_number_or_the_agent_down(path: Path, seed: int) -> None:
    """Every page in turn is zeroed, filled with noise, or has one bit flipped."""
    epoch = filled(path)
    content = path.read_bytes()
    rng = random.Random(seed)
    saved = []
    for page in range(len(content) // PAGE):
        damaged = bytearray(content)
        place = slice(page * PAGE, (page + 1) * PAGE)
        match page % 3:
            case 0:
                damaged[place] = bytes(PAGE)
            case 1:
                damaged[place] = rng.randbytes(PAGE)
            case _:
                damaged[page * PAGE + rng.randrange(PAGE)] ^= 1 << rng.randrange(8)
        for leftover in path.parent.glob("buffer.db*"):
            leftover.unlink()
        path.write_bytes(damaged)
        try:
            buffer = buffer_at(path)
        except ConfigurationError:
            assert page == 0, "only the first page says whose file it is"
            continue
        drained = drain(buffer, epoch)
        assert all(found == body(seq) for seq, found in drained.items())
        appended = buffer.append("a", b"new", 1, Hands()())
        assert appended.seq == 61 if appended.epoch == epoch else appended.seq == 1
        if buffer.opened.kind is OpenedKind.CORRUPT_REPLACED:
            assert appended.epoch != epoch
        buffer.acknowledge("a", epoch, 60)
        buffer.maintain()
        assert buffer.append("a", b"newer", 1, Hands()()).seq == appended.seq + 1
        saved.append(len(drained))
        buffer.close()
    assert sum(saved) > 0.9 * 60 * len(saved), "one page should cost a batch or a few, not the buffer"


def break_the_tree(path: Path) -> None:
    """Damage one interior page: the leaves stay, but the way to some of them is gone."""
    content = bytearray(path.read_bytes())
    interior = next(at for at in range(4 * PAGE, len(content), PAGE) if content[at] == 5)
    content[interior : interior + 40] = bytes([0x77]) * 40
    path.write_bytes(content)


def test_damage_found_in_use_costs_no_healthy_batch_and_stops_nothing(path: Path) -> None:
    buffer = buffer_at(path)
    epoch = [buffer.append("a", body(seq), seq, Hands()()).epoch for seq in range(1, 201)].pop()
    other = buffer.append("b", b"other", 1, Hands()()).epoch
    buffer.acknowledge("a", epoch, 10)
    buffer._db._checkpoint("TRUNCATE")
    break_the_tree(path)
    buffer._db.close_connections()
    drained = drain(buffer, epoch)
    assert buffer.opened.kind is OpenedKind.CORRUPT_REPLACED
    drained.update(drain(buffer, epoch))
    assert all(found == body(seq) for seq, found in drained.items())
    assert set(drained) <= set(range(11, 201)), "what was acknowledged before is not sent again"
    lost = sum(eviction.rows for eviction in buffer.take_evictions() if eviction.cause == "corrupt")
    assert lost == sum(range(11, 201)) - sum(drained)
    appended = buffer.append("a", b"new", 1, Hands()())
    assert appended.seq == 1
    assert [info.live for info in buffer.lanes() if info.epoch in (epoch, other)] == [False, False]
    buffer.close()


def test_an_acknowledgement_that_finds_the_damage_holds_for_what_is_saved(path: Path) -> None:
    """The sender believes it: what came back would be sent, acknowledged, and never deleted.

    Mutants tried: the acknowledgement lost with the old file.
    """
    buffer = buffer_at(path)
    epoch = [buffer.append("a", body(seq), seq, Hands()()).epoch for seq in range(1, 201)].pop()
    buffer._db._checkpoint("TRUNCATE")
    break_the_tree(path)
    buffer._db.close_connections()
    buffer.acknowledge("a", epoch, 150)
    assert buffer.opened.kind is OpenedKind.CORRUPT_REPLACED
    assert held(buffer, "a", epoch) != []
    assert min(held(buffer, "a", epoch)) > 150
    buffer.close()


def break_the_root(path: Path) -> None:
    """Damage the one page through which all batches are found."""
    content = bytearray(path.read_bytes())
    content[PAGE : 2 * PAGE] = bytes([0x77]) * PAGE
    path.write_bytes(content)


@pytest.mark.parametrize("in_use", [True, False])
def test_an_epoch_lost_with_its_file_is_told_with_how_far_it_went(path: Path, in_use: bool) -> None:
    """No later batch of it will ever show that its last ones are missing.

    Before: an epoch of which nothing was saved was forgotten.
    """
    buffer = buffer_at(path)
    epoch = [buffer.append("a", body(seq), seq, Hands()()).epoch for seq in range(1, 101)].pop()
    buffer.acknowledge("a", epoch, 10)
    buffer._db._checkpoint("TRUNCATE")
    if in_use:
        break_the_root(path)
        buffer._db.close_connections()
        drain(buffer, epoch)
    else:
        buffer.close()
        break_the_root(path)
        buffer = buffer_at(path)
    assert buffer.opened.kind is OpenedKind.CORRUPT_REPLACED
    assert drain(buffer, epoch) == {}
    assert buffer.hollow() == [Hollow("a", epoch, 100)]
    assert buffer.append("a", b"new", 1, Hands()()).epoch != epoch
    buffer.close()
    again = buffer_at(path)
    assert again.hollow() == [Hollow("a", epoch, 100)]
    again.forget("a", epoch)
    assert again.hollow() == []
    again.close()


def test_saving_a_damaged_file_is_seen_to_go_on_at_opening_and_in_use(path: Path) -> None:
    """It takes minutes where the buffer is large, and whoever waits for it has to know that it does not hang.

    A start that was silent meanwhile was ended by the service manager.
    """
    epoch = filled(path, 200)
    break_the_tree(path)
    told: list[int] = []

    def open_it() -> SqliteBuffer:
        progress = lambda: told.append(1)  # noqa: E731
        return SqliteBuffer(path, {"a": ROOMY}, PLENTY, Hands(), "board", progress=progress)

    buffer = open_it()
    assert buffer.opened.kind is OpenedKind.CORRUPT_REPLACED
    assert len(told) >= len(held(buffer, "a", epoch)) > 0
    buffer.close()
    told.clear()
    buffer = open_it()
    assert (buffer.opened.kind, told) == (OpenedKind.RESUMED, [])
    buffer._db._checkpoint("TRUNCATE")
    break_the_tree(path)
    buffer._db.close_connections()
    drain(buffer, epoch)
    assert buffer.opened.kind is OpenedKind.CORRUPT_REPLACED
    assert told
    buffer.close()


class PowerCut(BaseException):
    """Nothing after this happens."""


@pytest.mark.parametrize("step", range(12))
def test_a_power_cut_while_a_damaged_file_is_replaced_loses_nothing_more(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    epoch = filled(path, 200)
    killed = buffer_at(path)
    for seq in range(201, 204):
        killed.append("a", body(seq), 1, Hands()())
    cut, whole = (path.parent / name / path.name for name in ("cut", "whole"))
    for copy in (cut, whole):
        # A sound log of a damaged file. Taken for the log of the new one it would damage that, too.
        copy.parent.mkdir()
        for suffix in ("", "-wal"):
            copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
        break_the_tree(copy)
    killed.close()
    undisturbed = buffer_at(whole)
    assert undisturbed.opened.kind is OpenedKind.CORRUPT_REPLACED
    expected = drain(undisturbed, epoch)
    undisturbed.close()

    steps = 0

    def counted(original):
        def call(*arguments, **options):
            nonlocal steps
            if steps == step:
                raise PowerCut
            steps += 1
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        for module in ("files", "database"):
            patch.setattr(f"edge_agent.buffer.{module}.sync_folder", counted(files.sync_folder))
        try:
            buffer_at(cut).close()
        except PowerCut:
            pass
    again = buffer_at(cut)
    assert drain(again, epoch) == expected
    assert len(expected) > 50
    assert again.append("a", b"new", 1, Hands()()).epoch != epoch
    again.close()
    assert not cut.with_name("buffer.db-new").exists()


def test_the_log_of_the_old_file_is_not_taken_for_that_of_the_new_one(path: Path) -> None:
    """A power cut came when the old file had been moved away, and before its log and the new file were."""
    replacement = path.with_name("replacement.db")
    epoch = filled(replacement, 20)
    filled(path, 200)
    killed = buffer_at(path)
    for seq in range(201, 231):
        killed.append("a", body(seq), 1, Hands()())
    log = path.with_name("buffer.db-wal").read_bytes()
    killed.close()
    path.unlink()
    path.with_name("buffer.db-wal").write_bytes(log)
    replacement.rename(path.with_name("buffer.db-new"))
    buffer = buffer_at(path)
    assert buffer.opened.kind is OpenedKind.RESUMED
    assert drain(buffer, epoch) == {seq: body(seq) for seq in range(1, 21)}
    assert [info.epoch for info in buffer.lanes()] == [epoch]
    buffer.close()


# Another board


def test_a_copied_card_begins_new_epochs_and_drains_the_old_ones(path: Path) -> None:
    epoch = filled(path, 5)
    clone = buffer_at(path, "another board")
    assert clone.opened.kind is OpenedKind.CLONED
    assert "5 batches" in clone.opened.detail
    appended = clone.append("a", b"new", 1, Hands()())
    assert appended.seq == 1
    assert appended.epoch != epoch
    assert held(clone, "a", epoch) == [1, 2, 3, 4, 5]
    clone.close()
    again = buffer_at(path, "another board")
    assert again.opened.kind is OpenedKind.RESUMED
    assert again.append("a", b"new", 1, Hands()())[:2] == (appended.epoch, 2)
    again.close()


def test_a_restart_on_the_same_board_continues(path: Path) -> None:
    epoch = filled(path, 5)
    again = buffer_at(path)
    assert again.opened == (OpenedKind.RESUMED, "5 batches held")
    info = lane_of(again, "a", epoch)
    assert (info.last_seq, info.last_seq_at_open) == (5, 5)
    assert again.append("a", b"next", 1, Hands()())[:2] == (epoch, 6)
    info = lane_of(again, "a", epoch)
    assert (info.last_seq, info.last_seq_at_open) == (6, 5)
    again.close()


def test_numbers_are_remembered_over_a_restart_when_no_batch_is_left(path: Path) -> None:
    epoch = filled(path, 5)
    for _ in range(2):
        buffer = buffer_at(path)
        buffer.acknowledge("a", epoch, 5)
        buffer.close()
    again = buffer_at(path)
    assert held(again, "a", epoch) == []
    assert again.append("a", b"next", 1, Hands()())[:2] == (epoch, 6)
    again.close()


def test_an_epoch_that_ends_in_a_hole_is_remembered_over_a_restart(path: Path) -> None:
    epoch = filled(path, 2)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE batches SET crc32 = 1 WHERE rows = 2")
    file.close()
    buffer = buffer_at(path)
    buffer.acknowledge("a", epoch, 1)
    buffer.open_epoch("a")
    assert buffer.fetch("a", epoch, 2) is None
    assert buffer.hollow() == [Hollow("a", epoch, 2)]
    buffer.close()
    again = buffer_at(path)
    assert again.hollow() == [Hollow("a", epoch, 2)]
    again.forget("a", epoch)
    again.close()
    last = buffer_at(path)
    assert last.hollow() == []
    last.close()


def test_an_epoch_whose_numbers_are_used_up_is_followed_by_another(path: Path) -> None:
    epoch = filled(path, 3)
    by_hand = sqlite3.connect(path)
    by_hand.execute("UPDATE lanes SET last_seq = (1 << 40) - 2")
    by_hand.commit()
    by_hand.close()
    buffer = buffer_at(path)
    assert buffer.append("a", b"last", 1, Hands()())[:2] == (epoch, 2**40 - 1)
    new = buffer.append("a", b"first", 1, Hands()())
    assert new.seq == 1
    assert new.epoch != epoch
    assert held(buffer, "a", epoch) == [1, 2, 3, 2**40 - 1]
    assert held(buffer, "a", new.epoch) == [1]
    buffer.close()


def test_a_large_acknowledgement_is_worked_off_bit_by_bit_also_over_a_restart(path: Path) -> None:
    buffer = buffer_at(path)
    new = [NewBatch("a", b"x", 1, Hands()()) for _ in range(5_000)]
    epoch = buffer.append_many(new)[0].epoch
    stored = "SELECT count(*) FROM batches"
    assert buffer.acknowledge("a", epoch, 4_990) == 4_990
    buffer.maintain()
    assert 10 < buffer._db.query(stored)[0][0] < 5_000
    assert buffer.floor("a", epoch) == 4_991
    buffer.close()
    again = buffer_at(path)
    assert again.floor("a", epoch) == 4_991
    assert lane_of(again, "a", epoch).batches == 10
    for _ in range(4):
        again.maintain()
    assert again._db.query(stored)[0][0] == 10
    assert held(again, "a", epoch) == list(range(4_991, 5_001))
    again.close()

"""What is known of devices is a fold: over rows in any order, repeated or not; and only changes become rows.

Mutants tried, each found here: writing a row for every retained presence document after a restart; an older desired
document winning over a newer one; counting bytes of forgotten reports for ever; first_seen moving forward.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from contract.messages import Desired, DesiredStream, Presence, Reported, encode
from gateway.devices import DESIRED, FIRST_SEEN, OFFLINE, ONLINE, DeviceBook, DeviceEvent

BOOT = "ab" * 16


def said(online: bool = True, boot: str = BOOT, reason: str = "started") -> Presence:
    return Presence(online=online, reason=reason, at_us=0, agent="agent/1", boot=boot)


def reported(revision: int = 0) -> Reported:
    return Reported(revision=revision, agent="agent/1", boot=BOOT, clock_synced=True, started_at_us=0, streams={})


def desired(at_us: int, revision: int, rate_hz: float = 1.0) -> DeviceEvent:
    document = encode(Desired(revision=revision, streams={"s": DesiredStream(rate_hz=rate_hz)})).decode()
    return DeviceEvent(at_us, "pi-1", DESIRED, revision=revision, document=document)


def kinds(events: list[DeviceEvent]) -> list[str]:
    return [event.event for event in events]


def test_the_first_sign_of_a_device_and_each_change_of_its_presence_become_rows():
    book = DeviceBook(10)
    assert kinds(book.presence("pi-1", said(), 1)) == [FIRST_SEEN, ONLINE]
    assert kinds(book.presence("pi-1", said(), 2)) == []
    assert kinds(book.presence("pi-1", said(online=False, reason="lost"), 3)) == [OFFLINE]
    assert kinds(book.presence("pi-1", said(boot="cd" * 16), 4)) == [ONLINE]
    assert kinds(book.presence("pi-1", said(boot="ef" * 16), 5)) == [ONLINE]
    assert kinds(book.heard(["pi-1", "pi-2"], 6)) == [FIRST_SEEN]
    assert kinds(book.reports("pi-3", reported(), 7)) == [FIRST_SEEN]
    device = book.get("pi-1")
    assert (device.first_seen_us, device.last_seen_us, device.online, device.presence_us) == (1, 6, True, 5)


def test_after_a_restart_what_the_broker_had_retained_is_no_news():
    before = DeviceBook(10)
    rows = before.presence("pi-1", said(), 1) + before.presence("pi-2", said(online=False, reason="lost"), 2)
    after = DeviceBook(10)
    after.fold(rows)
    assert after.presence("pi-1", said(), 100) == []
    assert after.presence("pi-2", said(online=False, reason="lost"), 100) == []
    assert kinds(after.presence("pi-2", said(), 101)) == [ONLINE]


@given(st.permutations(range(7)), st.lists(st.integers(0, 6), max_size=4))
def test_the_order_of_rows_and_repeats_do_not_matter(order, repeats):
    book = DeviceBook(10)
    rows = [
        *book.presence("pi-1", said(), 10),
        *book.presence("pi-1", said(online=False, reason="stopped"), 20),
        *book.heard(["pi-2"], 30),
        desired(40, 1, 1.0),
        desired(50, 2, 2.0),
        desired(60, 3, 3.0),
    ]
    assert len(rows) == 7
    folded = DeviceBook(10)
    folded.fold([rows[index] for index in [*order, *repeats]])
    device = folded.get("pi-1")
    assert (device.online, device.reason, device.first_seen_us, device.revision) == (False, "stopped", 10, 3)
    assert device.desired.streams["s"].rate_hz == 3.0
    assert folded.get("pi-2").first_seen_us == 30


def test_a_document_given_before_the_device_was_ever_seen_is_no_sign_of_it():
    book = DeviceBook(10)
    assert [device.name for device in book.fold([desired(5, 1)])] == ["pi-1"]
    assert book.get("pi-1").first_seen_us is None
    assert kinds(book.presence("pi-1", said(), 9)) == [FIRST_SEEN, ONLINE]
    assert book.fold([desired(5, 1)]) == []


def test_devices_and_their_reports_are_bounded():
    book = DeviceBook(3, reported_bytes_max=2 * len(encode(reported())))
    for number in range(5):
        book.reports(f"pi-{number}", reported(), number)
    assert [device.name for device in book] == ["pi-2", "pi-3", "pi-4"]
    assert [device.reported is not None for device in book] == [False, True, True]
    assert book.reported_bytes == 2 * len(encode(reported()))
    book.reports("pi-4", reported(), 9)
    assert book.reported_bytes == 2 * len(encode(reported()))

"""Devices are told what is committed: once, with the latest, however the broker fares; nothing grows without bound.

Mutants tried, each found here: publishing an older watermark after a newer one; losing a device that could not be told;
telling a device more than 64 watermarks; rewinds without a holdoff; a rewind kept for ever without a broker.
"""

from __future__ import annotations

import msgspec

from contract import topics
from contract.messages import Ack, Rewind, Watermark, decode
from gateway.acknowledger import LANES_MAX, REWIND_HOLDOFF_S, AckBook, Acknowledger
from gateway.ports import Lane
from tests.unit.gateway_parts import EPOCH, STREAM, Clocks, fresh_metrics, value

LANE = Lane("pi-1", EPOCH)


class Broker:
    """Takes messages while it is up."""

    def __init__(self) -> None:
        self.up = True
        self.messages: list[tuple[str, bytes, int, bool]] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        if self.up:
            self.messages.append((topic, payload, qos, retain))
        return self.up


def make() -> tuple[Acknowledger, Broker, Clocks]:
    broker, clock = Broker(), Clocks()
    return Acknowledger(broker.publish, fresh_metrics(), clock), broker, clock


def test_watermarks_of_a_device_travel_in_one_retained_document():
    acks, broker, _ = make()
    acks.acknowledge(STREAM, {LANE: 3})
    acks.acknowledge(STREAM, {LANE: 7})
    acks.acknowledge("other", {LANE: 1, Lane("pi-2", EPOCH): 0})
    assert acks.publish_waiting()
    [(topic, payload, qos, retain)] = broker.messages
    assert (topic, qos, retain) == (topics.ack("pi-1"), 1, True)
    assert decode(payload, Ack).committed == (Watermark(STREAM, EPOCH, 7), Watermark("other", EPOCH, 1))
    assert acks.publish_waiting()
    assert len(broker.messages) == 1


def test_a_device_that_could_not_be_told_is_told_the_latest_when_the_broker_is_back():
    acks, broker, _ = make()
    broker.up = False
    acks.acknowledge(STREAM, {LANE: 3})
    acks.acknowledge(STREAM, {Lane("pi-2", EPOCH): 5})
    assert not acks.publish_waiting()
    acks.acknowledge(STREAM, {LANE: 9})
    broker.up = True
    assert acks.publish_waiting()
    told = [(topic, decode(payload, Ack).committed[0].seq) for topic, payload, _, _ in broker.messages]
    assert told == [(topics.ack("pi-1"), 9), (topics.ack("pi-2"), 5)]


def test_a_device_whose_document_the_broker_refused_is_told_though_nothing_new_happens():
    acks, broker, _ = make()
    broker.up = False
    acks.acknowledge(STREAM, {LANE: 3})
    assert not acks.publish_waiting()
    broker.up = True
    assert acks.publish_waiting()
    assert len(broker.messages) == 1


def test_a_document_holds_the_64_most_recent_watermarks():
    book = AckBook()
    epochs = [f"{number:032x}" for number in range(LANES_MAX + 6)]
    for epoch in epochs:
        book.note(STREAM, Lane("pi-1", epoch), 1)
    book.note(STREAM, Lane("pi-1", epochs[10]), 2)
    _, document = book.next_ack()
    assert len(document.committed) == LANES_MAX
    assert document.committed[-1] == Watermark(STREAM, epochs[10], 2)
    assert {mark.epoch for mark in document.committed} == set(epochs[6:])


def test_devices_and_rewinds_are_bounded():
    book = AckBook(devices_max=3, rewinds_max=2)
    for number in range(5):
        book.note(STREAM, Lane(f"pi-{number}", EPOCH), 1)
    assert book.waiting == 3
    assert book.watermarks("pi-0") == ()
    assert [book.rewind(STREAM, Lane(f"pi-{number}", EPOCH), 1, 0.0) for number in range(3)] == [True, True, None]
    assert book.waiting_rewinds == 2
    book = AckBook(watermarks_max=10)
    for number in range(5):
        for epoch in range(4):
            book.note(STREAM, Lane(f"pi-{number}", f"{epoch:032x}"), 1)
    assert book.watermarks_known == 8
    assert [len(book.watermarks(f"pi-{number}")) for number in range(5)] == [0, 0, 0, 4, 4]


def test_a_lane_is_asked_to_rewind_once_in_a_while_and_lanes_do_not_share_the_pause():
    acks, broker, clock = make()
    metrics = acks._metrics
    acks.rewind(STREAM, LANE, 4)
    acks.rewind(STREAM, LANE, 4)
    acks.rewind(STREAM, Lane("pi-2", EPOCH), 1)
    clock.pass_s(REWIND_HOLDOFF_S)
    acks.rewind(STREAM, LANE, 5)
    assert acks.publish_waiting()
    sent = [(topic, decode(payload, Rewind).expected, qos, retain) for topic, payload, qos, retain in broker.messages]
    assert sent == [
        (topics.rewind("pi-1"), 4, 0, False),
        (topics.rewind("pi-2"), 1, 0, False),
        (topics.rewind("pi-1"), 5, 0, False),
    ]
    assert value(metrics, "rewinds_total") == 3
    assert value(metrics, "rewinds_held_back_total") == 1


def test_rewinds_do_not_wait_for_a_broker_that_is_away():
    acks, broker, _ = make()
    broker.up = False
    acks.rewind(STREAM, LANE, 4)
    acks.publish_waiting()
    broker.up = True
    acks.publish_waiting()
    assert broker.messages == []


def test_what_waits_is_published_when_stopping():
    acks, broker, _ = make()
    acks.start()
    acks.acknowledge(STREAM, {LANE: 3})
    assert acks.close(10)
    assert [msgspec.json.decode(payload)["committed"][0]["seq"] for _, payload, _, _ in broker.messages] == [3]

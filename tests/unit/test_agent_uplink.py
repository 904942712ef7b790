"""The uplink's thread over a broker that only records, and a buffer in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from contract import topics
from contract.codec import decode_body, unseal
from contract.limits import DEFAULT_LIMITS
from contract.messages import Presence, Rewind, decode, encode
from edge_agent import uplink as uplink_module
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import StreamCaps, WhenFull
from edge_agent.events import Kind
from edge_agent.transport import LossCause, Lost, PublishRefused, Ready, Received
from edge_agent.uplink import SHORT_CONNECTIONS_MAX
from tests.unit.uplink_bench import CLOCK, DEADLINE_S, READY, Bench, ack, body, fill, live, new_buffer, wait_until

Benches = Callable[..., Bench]


@pytest.fixture
def bench() -> Iterator[Benches]:
    made: list[Bench] = []

    def make(buffer: MemoryBuffer, **settings: Any) -> Bench:
        made.append(Bench(buffer, **settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()
        assert one.failure is None


def test_nothing_is_sent_before_the_connection_is_ready_and_retained_acks_were_seen(bench: Benches) -> None:
    """Mutants tried: pumping as soon as there is a connection."""
    buffer = new_buffer()
    epoch = fill(buffer, 5)
    buffer.reopen()
    one = bench(buffer)
    connection = one.start()
    connection.say(ack("s", epoch, 3))
    wait_until(lambda: buffer.floor("s", epoch) == 4, "the retained ack is followed")
    assert connection.published == []
    connection.say(READY)
    wait_until(lambda: connection.batches(), "the rest is sent")
    assert connection.batches()[0] == ("s", 4)


def test_an_envelope_says_what_is_sent_and_what_the_buffer_still_holds_at_that_moment(bench: Benches) -> None:
    """Mutants tried: floor taken from the batch that was chosen, not from the buffer."""
    buffer = new_buffer()
    one = bench(buffer)
    connection = one.start_ready()
    epoch = fill(buffer, 2)
    one.uplink.stored(new_lane=True)
    wait_until(lambda: len(connection.batches()) == 2, "both are sent")
    topic, payload, retain = connection.published[-1]
    assert (topic, retain) == (topics.up("pi-1", "s"), False)
    envelope, content = unseal(payload)
    assert (envelope.device, envelope.stream, envelope.epoch) == ("pi-1", "s", epoch)
    assert (envelope.seq, envelope.floor, envelope.rows, envelope.clock) == (2, 1, 3, CLOCK)
    assert decode_body(content, envelope, DEFAULT_LIMITS).num_rows == 3
    connection.say(ack("s", epoch, 1))
    wait_until(lambda: buffer.floor("s", epoch) == 2, "acknowledged")
    connection.say(Received(topics.rewind("pi-1"), encode(Rewind(stream="s", epoch=epoch, expected=2))))
    wait_until(lambda: len(connection.batches()) == 3, "sent again")
    assert unseal(connection.published[-1][1]).envelope.floor == 2


class ThinningBuffer(MemoryBuffer):
    """Thins the batch after it was chosen and before it is fetched, as a full buffer may."""

    def fetch(self, stream: str, epoch: str, seq: int) -> Any:
        self.between()
        return super().fetch(stream, epoch, seq)

    def between(self) -> None:
        """What happens in between."""


def test_a_batch_thinned_or_evicted_after_it_was_chosen_is_never_sent_with_the_old_envelope(bench: Benches) -> None:
    size = len(body(400))
    caps = StreamCaps(bytes_max=size + 1, age_max_s=1e9, when_full=WhenFull.THIN, thin_keep_every=2)
    buffer = ThinningBuffer({"s": caps}, 1 << 30)
    buffer.append("s", body(400), 400, CLOCK)
    acted: list[bool] = []

    def between() -> None:
        if not acted:
            acted.append(True)
            buffer.append("s", body(3), 3, CLOCK)

    buffer.between = between  # type: ignore[method-assign]
    one = bench(buffer)
    connection = one.start_ready()
    wait_until(lambda: connection.batches(), "sent")
    envelope, content = unseal(connection.published[1][1])
    assert 3 < envelope.rows < 400
    assert decode_body(content, envelope, DEFAULT_LIMITS).num_rows == envelope.rows


def test_what_was_not_acknowledged_is_sent_again_on_the_next_connection(bench: Benches) -> None:
    buffer = new_buffer()
    one = bench(buffer)
    first = one.start_ready()
    epoch = fill(buffer, 3)
    one.uplink.stored(new_lane=True)
    wait_until(lambda: len(first.batches()) == 3, "sent")
    first.say(ack("s", epoch, 1), Lost(LossCause.LOST, "gone"))
    second = one.transport.attempt(1)
    assert first.abandoned
    second.say(READY)
    wait_until(lambda: len(second.batches()) == 2, "sent again")
    assert second.batches() == [("s", 2), ("s", 3)]
    assert one.metrics.resent_batches._value.get() == 2


def test_the_last_words_of_a_connection_given_up_change_nothing(bench: Benches) -> None:
    one = bench(new_buffer())
    first = one.start_ready()
    first.say(Lost(LossCause.LOST, "gone"))
    second = one.transport.attempt(1)
    second.say(READY)
    wait_until(lambda: one.uplink.state.connected, "connected again")
    first.say(Lost(LossCause.LOST, "really"), PublishRefused(1, "late"))
    second.say(Received(topics.desired("pi-1"), b"marker"))
    wait_until(lambda: one.desired, "the marker arrives")
    assert len(one.transport.attempts) == 2
    assert one.events == []


def test_presence_and_reported_state_are_told_on_every_connection_and_the_will_tells_a_loss(bench: Benches) -> None:
    one = bench(new_buffer())
    one.uplink.publish_reported(b"reported")
    first = one.start_ready()
    wait_until(lambda: len(first.published) == 2, "told")
    presence = decode(first.published[0][1], Presence)
    assert (presence.online, presence.reason, first.published[0][2]) == (True, "started", True)
    assert first.published[1] == (topics.reported("pi-1"), b"reported", True)
    will = decode(first.will.payload, Presence)
    assert (first.will.topic, will.online, will.reason) == (topics.status("pi-1"), False, "lost")
    first.say(Lost(LossCause.LOST, "gone"))
    second = one.transport.attempt(1)
    second.say(READY)
    wait_until(lambda: len(second.published) == 2, "told again")


def test_a_restored_buffer_moves_its_fresh_batches_to_a_new_epoch(bench: Benches) -> None:
    """The lake is ahead of the buffer: the new batches would have numbers that the lake has given already.

    Mutants tried: the ack believed; the outcome of the ack ignored.
    """
    buffer = new_buffer()
    old = fill(buffer, 3)
    buffer.reopen()
    fill(buffer, 2)
    one = bench(buffer)
    connection = one.start_ready(ack("s", old, 9))
    wait_until(lambda: len(connection.batches()) == 2, "the fresh ones are sent")
    assert connection.batches() == [("s", 1), ("s", 2)]
    assert live(buffer) != old
    assert one.kinds() == [Kind.BUFFER_RESTORED]
    assert (one.events[0].stream, one.events[0].epoch, one.events[0].last_seq) == ("s", old, 9)


def test_an_inherited_epoch_goes_on_only_if_the_retained_ack_proves_that_the_lake_is_not_ahead(bench: Benches) -> None:
    """A buffer restored to a moment when all was acknowledged would give its next batch a number that is taken.

    Mutants tried: epochs never left; a retained ack below the last seq taken as proof.
    """
    for retained, goes_on in ((3, True), (2, False), (None, False)):
        buffer = new_buffer()
        old = fill(buffer, 3)
        buffer.acknowledge("s", old, 3)
        buffer.reopen()
        fill(buffer, 1)
        one = bench(buffer)
        connection = one.start_ready(*([] if retained is None else [ack("s", old, retained)]))
        wait_until(connection.batches, "sent")
        assert connection.batches() == [("s", 4 if goes_on else 1)]
        assert (live(buffer) == old) is goes_on
        assert one.kinds() == ([] if goes_on else [Kind.EPOCH_OPENED])


def test_an_inherited_epoch_that_still_holds_batches_goes_on_with_one_of_them(bench: Benches) -> None:
    buffer = new_buffer()
    old = fill(buffer, 3)
    buffer.reopen()
    fill(buffer, 1)
    one = bench(buffer)
    connection = one.start_ready()
    wait_until(lambda: connection.batches(), "the first is sent")
    assert connection.batches() == [("s", 1)]
    connection.say(ack("s", old, 1))
    wait_until(lambda: len(connection.batches()) == 4, "the rest follows the first ack")
    assert live(buffer) == old


def test_a_full_outgoing_queue_delays_batches_and_loses_none(bench: Benches) -> None:
    buffer = new_buffer()
    one = bench(buffer)
    connection = one.start_ready()
    wait_until(lambda: connection.published, "presence")
    connection.room = 1
    fill(buffer, 3)
    one.uplink.stored(new_lane=True)
    wait_until(lambda: len(connection.batches()) == 1, "one has room")
    connection.make_room(10)
    wait_until(lambda: len(connection.batches()) == 3, "the others follow")
    assert connection.batches() == [("s", 1), ("s", 2), ("s", 3)]


def test_a_batch_too_large_for_the_broker_does_not_hold_up_other_streams(bench: Benches) -> None:
    buffer = new_buffer()
    buffer.append("s", body(5000), 5000, CLOCK)
    one = bench(buffer)
    connection = one.start()
    connection.say(Ready(1_000))
    wait_until(lambda: Kind.PAYLOAD_TOO_LARGE in one.kinds(), "reported")
    fill(buffer, 1, "t")
    one.uplink.stored(new_lane=True)
    wait_until(lambda: connection.batches() == [("t", 1)], "the other stream is sent")
    assert buffer.floor("s", live(buffer)) == 1


def test_a_batch_too_large_for_the_broker_takes_no_room_in_the_window(bench: Benches) -> None:
    """Mutants tried: its bytes counted as on the way until the ack timeout."""
    buffer = new_buffer()
    buffer.append("s", bytes(100_000), 1, CLOCK)
    one = bench(buffer, window_bytes_max=64 * 1024, ack_timeout_s=3_000.0, ack_timeout_max_s=3_000.0)
    connection = one.start()
    connection.say(Ready(1_000))
    wait_until(lambda: Kind.PAYLOAD_TOO_LARGE in one.kinds(), "reported")
    fill(buffer, 2, "t")
    one.uplink.stored(new_lane=True)
    wait_until(lambda: connection.batches() == [("t", 1), ("t", 2)], "the other stream is sent")


def test_another_client_with_this_name_is_noticed_by_its_presence(bench: Benches) -> None:
    """Most brokers end the older connection without a word.

    Mutants tried: presences of this very process taken for another's.
    """
    one = bench(new_buffer())
    first = one.start()
    other = Presence(online=True, reason="started", at_us=1, agent="test 1", boot="cd" * 16)
    status = topics.status("pi-1")
    # What is retained from before this process is its own, or its predecessor's.
    first.say(Received(status, encode(other)), READY)
    wait_until(lambda: first.published, "presence")
    first.say(Received(status, first.published[0][1]), Received(status, first.will.payload))
    first.say(Lost(LossCause.LOST, "the connection broke"))
    second = one.transport.attempt(1)
    assert one.events == []
    second.say(Received(status, encode(other)), READY)
    wait_until(lambda: one.events, "noticed")
    assert one.kinds() == [Kind.TAKEN_OVER]
    assert one.events[0].detail["boot"] == "cd" * 16


def test_connections_that_break_at_once_again_and_again_are_taken_for_a_second_device(bench: Benches) -> None:
    """Some brokers give no other sign.

    Mutants tried: counted also where the broker was away in between; three in a row enough.
    """
    one = bench(new_buffer(), reconnect_base_s=0.01, reconnect_max_s=0.01)
    broke = Lost(LossCause.LOST, "the connection broke")
    first = one.start()
    for number in range(SHORT_CONNECTIONS_MAX - 1):
        attempt = first if number == 0 else one.transport.attempt(number)
        attempt.say(READY, broke)
    one.transport.attempt(3).say(Lost(LossCause.UNREACHABLE, "the broker restarts"))
    for number in range(4, 4 + SHORT_CONNECTIONS_MAX - 1):
        one.transport.attempt(number).say(READY, broke)
    one.transport.attempt(7).say(READY, Received(topics.desired("pi-1"), b"marker"))
    wait_until(lambda: one.desired, "the marker arrives")
    assert one.events == []
    one.transport.attempt(7).say(broke)
    wait_until(lambda: one.events, "noticed")
    assert one.kinds() == [Kind.TAKEN_OVER]
    assert one.events[0].detail == {"by": "suspicion", "short_connections": 4}


def test_a_presence_of_before_days_without_a_network_is_still_known_as_its_own(bench: Benches) -> None:
    """The will that the broker published meanwhile is what is found on the way back.

    Mutants tried: the presences of the last good connection not kept apart.
    """
    one = bench(new_buffer(), reconnect_base_s=0.01, reconnect_max_s=0.01)
    first = one.start_ready()
    wait_until(lambda: first.published, "presence")
    first.say(Lost(LossCause.LOST, "the connection broke"))
    for number in range(1, 300):
        one.transport.attempt(number).say(Lost(LossCause.UNREACHABLE, "no network"))
    last = one.transport.attempt(300)
    last.say(Received(topics.status("pi-1"), first.will.payload), READY, Received(topics.desired("pi-1"), b"marker"))
    wait_until(lambda: one.desired, "the marker arrives")
    assert one.events == []


def test_a_stopping_agent_sends_what_it_holds_says_goodbye_and_only_then_ends(bench: Benches) -> None:
    buffer = new_buffer()
    one = bench(buffer)
    connection = one.start_ready()
    epoch = fill(buffer, 2)
    one.uplink.stored(new_lane=True)
    one.uplink.drain(DEADLINE_S)
    wait_until(lambda: len(connection.batches()) == 2, "sent")
    assert one.thread.is_alive()
    connection.say(ack("s", epoch, 2))
    one.thread.join(DEADLINE_S)
    assert not one.thread.is_alive()
    topic, payload, retain = connection.published[-1]
    presence = decode(payload, Presence)
    assert (topic, presence.online, presence.reason, retain) == (topics.status("pi-1"), False, "stopped", True)
    assert connection.closed


def test_a_stopping_agent_without_a_connection_ends_at_once(bench: Benches) -> None:
    buffer = new_buffer()
    fill(buffer, 2)
    one = bench(buffer, reconnect_base_s=60.0, reconnect_max_s=60.0)
    one.start().say(Lost(LossCause.UNREACHABLE, "no network"))
    wait_until(lambda: one.uplink.state.last_loss, "lost")
    one.uplink.drain(600.0)
    one.thread.join(DEADLINE_S)
    assert not one.thread.is_alive()
    assert len(buffer.lanes()) == 1


def test_damaged_control_messages_are_counted_and_change_nothing(bench: Benches) -> None:
    one = bench(new_buffer())
    connection = one.start_ready()
    connection.say(
        Received(topics.ack("pi-1"), b"{"),
        Received(topics.ack("pi-1"), b'{"v":9,"committed":[]}'),
        Received(topics.rewind("pi-1"), b"\xff"),
        Received(topics.desired("pi-1"), b"marker"),
    )
    wait_until(lambda: one.desired == [b"marker"], "the message behind them arrives")
    assert one.metrics.control_refused.labels("ack")._value.get() == 2
    assert one.metrics.control_refused.labels("rewind")._value.get() == 1


def test_a_mistake_in_the_uplink_ends_its_thread_without_a_goodbye(bench: Benches) -> None:
    """Who watches the threads ends the process then, and the broker sends the last will."""
    one = bench(new_buffer())

    def broken(payload: bytes) -> None:
        raise RuntimeError("mistake")

    one.uplink._desired = broken
    connection = one.start_ready()
    connection.say(Received(topics.desired("pi-1"), b""))
    one.thread.join(DEADLINE_S)
    assert isinstance(one.failure, RuntimeError)
    assert connection.abandoned
    assert not connection.closed
    one.failure = None


def test_what_was_sent_and_then_evicted_is_not_remembered(bench: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gateway for days, each round of sending would add to what waits for its ack.

    Before: nothing was forgotten but what is acknowledged.
    """
    monkeypatch.setattr(uplink_module, "SPLIT_S", 0.01)
    size = len(body())
    buffer = new_buffer(bytes_max=3 * size)
    one = bench(buffer)
    connection = one.start_ready()
    epoch = fill(buffer, 3)
    one.uplink.stored(new_lane=True)
    wait_until(lambda: len(connection.batches()) == 3, "sent")
    fill(buffer, 2)
    one.uplink.stored(new_lane=False)
    wait_until(lambda: list(one.uplink._first_sent["s", epoch])[:1] == [3], "the evicted ones are forgotten")


def test_what_has_not_reached_the_broker_yet_is_not_sent_again(bench: Benches) -> None:
    """A line slower than `ack_timeout_s` for a batch would else carry the same batches for ever.

    Before: ack timeouts counted from the handing over.
    """
    buffer = new_buffer()
    one = bench(buffer, ack_timeout_s=0.1, ack_timeout_max_s=0.1)
    connection = one.start_ready()
    wait_until(lambda: connection.published, "presence")
    connection.unanswered = 2
    fill(buffer, 2)
    one.uplink.stored(new_lane=True)
    wait_until(lambda: len(connection.batches()) == 2, "sent")
    (lane,) = one.uplink._sender._lanes.values()
    first_s = lane.deadline_s
    assert first_s is not None
    wait_until(lambda: (lane.deadline_s or 0.0) > first_s + 0.3, "several timeouts have passed")
    assert connection.batches() == [("s", 1), ("s", 2)]
    assert one.metrics.ack_timeouts._value.get() == 0
    connection.unanswered = 0
    wait_until(lambda: len(connection.batches()) == 4, "sent again")
    assert connection.batches()[2:] == [("s", 1), ("s", 2)]

"""Packets as the gateway's listening connection takes them apart, against the codec that wrote them.

Mutants tried, each found here: the packet id read with QoS 0; properties taken for payload; a length of one byte only.
"""

from __future__ import annotations

import mqtt5
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.intake import Malformed, packet_size, published

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=50)
TOPICS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0#+"), min_size=1, max_size=50)
"""Wildcards are for filters: the codec writes no such topic."""


@st.composite
def publishes(draw: st.DrawFn) -> mqtt5.PublishPacket:
    qos = draw(st.sampled_from([mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE, mqtt5.QoS.EXACTLY_ONCE]))
    return mqtt5.PublishPacket(
        draw(TOPICS),
        draw(st.binary(max_size=300)),
        qos=qos,
        packet_id=draw(st.integers(1, 65_535)) if int(qos) else None,
        retain=draw(st.booleans()),
        content_type=draw(st.none() | TEXT),
        user_properties=draw(st.lists(st.tuples(TEXT, TEXT), max_size=5)),
    )


@given(publishes(), st.binary(max_size=20))
def test_what_was_published_is_read(packet: mqtt5.PublishPacket, more: bytes) -> None:
    data = packet.write()
    head = packet_size(memoryview(data + more))
    assert head is not None
    start, size = head
    assert size == len(data)
    found = published(memoryview(data), start)
    assert found == (packet.topic.encode(), packet.payload, packet.packet_id)


@given(publishes(), st.data())
def test_what_is_cut_is_waited_for_or_refused(packet: mqtt5.PublishPacket, data: st.DataObject) -> None:
    whole = packet.write()
    cut = memoryview(whole)[: data.draw(st.integers(0, len(whole) - 1))]
    head = packet_size(cut)
    assert head is None or head[1] == len(whole)


@given(st.binary(min_size=1, max_size=60))
def test_any_bytes_give_a_message_or_a_reason(rest: bytes) -> None:
    packet = bytes((0x32, len(rest))) + rest
    try:
        found = published(memoryview(packet), 2)
    except Malformed:
        return
    assert len(found.topic) + len(found.payload) <= len(rest)


@pytest.mark.parametrize("length", [0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_lengths_are_read_at_their_borders(length: int) -> None:
    """MQTT 5.0, table 1-1."""
    data, left = [0x30], length
    while True:
        left, digit = divmod(left, 128)
        data.append(digit | (0x80 if left else 0))
        if not left:
            break
    assert packet_size(memoryview(bytes(data))) == (len(data), len(data) + length)

"""Whatever arrives as a desired document: it is applied, ignored or refused, whole, and never breaks the agent."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from contract.desired import RATE_HZ_MAX, RATE_HZ_MIN
from contract.messages import Refusal, encode
from edge_agent.remote_config import REASON_CHARS_MAX, Applied, Ignored, apply, in_force
from edge_agent.sampling.settings import Burst, Interval, Stream, Trigger
from edge_agent.settings import StreamSettings

STREAMS = {
    "a": StreamSettings(driver="host", sampling=Interval(rate_hz=10.0)),
    "b": StreamSettings(driver="host", sampling=Stream(), max_batch_rows=7),
    "c": StreamSettings(driver="host", sampling=Burst(trigger=(Trigger(field="x", above=1.0),), rate_hz=0.0)),
}
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 0.05, 1e-9, 65_536, 65_537, 3600.0, 10_000, -1]), st.none()
)
MEMBERS = st.dictionaries(
    st.sampled_from(["enabled", "rate_hz", "max_batch_rows", "max_batch_age_s", "rate", "driver"]),
    st.one_of(NUMBERS, st.booleans(), st.text(max_size=5)),
    max_size=4,
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "v": st.sampled_from([1, 1, 1, 1, 2, "1"]),
        "revision": st.one_of(st.integers(1, 9), st.integers(), NUMBERS),
        "streams": st.dictionaries(st.sampled_from(["a", "b", "c", "d", "headwater.events"]), MEMBERS, max_size=3),
        "extra": st.just(1),
    },
)


@given(
    st.one_of(st.binary(max_size=200), DOCUMENTS.map(lambda document: json.dumps(document).encode())), st.integers(0, 9)
)
@example(b"[" * 100_000, 0)
@example(b'{"v":1,"revision":' + b"9" * 5_000 + b"}", 0)
def test_any_bytes_are_applied_ignored_or_refused(payload: bytes, revision: int) -> None:
    verdict = apply(revision, payload, STREAMS)
    if isinstance(verdict, Refusal):
        assert 0 < len(verdict.reason) <= REASON_CHARS_MAX
        json.loads(encode(verdict))
    elif isinstance(verdict, Applied):
        check_in_force(verdict)
        assert verdict.desired.revision > revision
        assert apply(verdict.desired.revision, payload, STREAMS) == Ignored()
    else:
        assert verdict == Ignored()


def check_in_force(applied: Applied) -> None:
    """Everything in force is within what the device's own file would be held to."""
    wanted: dict[str, Any] = dict(applied.desired.streams)
    assert wanted.keys() <= STREAMS.keys()
    for name, settings in STREAMS.items():
        force = in_force(settings, wanted.get(name))
        assert 1 <= force.max_batch_rows <= 65_536
        assert 0.05 <= force.max_batch_age_s <= 3600
        assert force.rate_hz is None or RATE_HZ_MIN <= force.rate_hz <= RATE_HZ_MAX
        assert (force.rate_hz is None) is (name != "a")

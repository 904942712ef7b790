"""A real agent over a real broker: metadata that expired, was taken back or is of stolen keys changes nothing.

Each trouble ends REJECTED with its reason told, and the old model goes on answering; the rest is in
`test_trust_device.py` and `test_models_agent.py`. Mutants tried: see the former.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from contract.models import DeviceState
from lake.trust import rotation
from lake.trust.keys import generate_key
from lake.trust.repository import TIMESTAMP_PATH, TrustRepository
from tests.integration import test_models_agent
from tests.integration.models_bench import manifest_of, model
from tests.integration.test_models_agent import CONFIG, Device, device_of

__all__ = ["device_of"]
_DAY_US = 86_400_000_000


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_expired_withheld_and_stolen_signatures_are_refused_and_the_old_model_answers(
    device_of: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing here hangs, and a busy machine takes its time.
    monkeypatch.setattr(test_models_agent, "CONFIG", CONFIG.replace("probe_timeout_s = 5.0", "probe_timeout_s = 60.0"))
    device = device_of("distrustful")
    house = device.house
    device.commit(house.release(model(), version=1))
    second = house.release(model(threshold=1.0), version=2)
    device.commit(second)
    newest = house.store.get(TIMESTAMP_PATH)

    def refused(sequence: int, why: str, *, still: int) -> None:
        told = device.wait(DeviceState.REJECTED, sequence)
        assert why in told.order.reason
        assert told.active == still
        device.answers(still)

    # Nobody has signed for a month, and what the gateway serves is new to the device.
    now_us, house.repository = (
        house.now_us,
        TrustRepository(house.store, anchor=house.anchor.read_bytes(), now_us=lambda: now_us() - 30 * _DAY_US),
    )
    refused(device.order(house.release(model(threshold=2.0), version=3)).sequence, "expired_metadata", still=2)
    # An older state of the lake, that was true once.
    house.repository = TrustRepository(house.store, anchor=house.anchor.read_bytes(), now_us=now_us)
    house.repository.publish([house.online], force=True)
    device.commit(house.release(model(threshold=3.0), version=4))
    good = house.store.get(TIMESTAMP_PATH)
    house.store.put(TIMESTAMP_PATH, newest)
    refused(device.order(manifest_of(model(threshold=4.0), version=5)).sequence, "rollback", still=4)
    house.store.put(TIMESTAMP_PATH, good)
    # The key was stolen and taken back: the thief's order is refused, the new key's is followed.
    stolen, house.online = house.online, generate_key()
    rotation.rotate_online(house.repository, [house.root], None, house.online)
    sixth = house.release(model(threshold=5.0), version=6)
    refused(device.order(sixth, key=stolen).sequence, "bad_signature", still=4)
    assert device.wait(DeviceState.COMMITTED, device.order(sixth).sequence).active == 6

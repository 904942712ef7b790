"""Work beside the event loop, when the system gives no thread.

Mutants tried, each made a test here fail: the slot of work that never began is kept.
"""

from __future__ import annotations

import threading

import pytest

from contract.errors import TemporaryError
from gateway.inference import Inference
from gateway.offload import in_thread
from gateway.settings import InferenceSettings
from tests.unit.gateway_parts import fresh_metrics


def refused(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def test_a_thread_that_cannot_start_is_told_and_its_slot_is_free_again(monkeypatch):
    settings = InferenceSettings(workers=1)
    inference = Inference(settings, None, fresh_metrics())
    with monkeypatch.context() as system:
        system.setattr(threading.Thread, "start", refused)
        for _ in range(3):
            with pytest.raises(TemporaryError, match="no thread could be started"):
                await inference._work(lambda: 1)
        with pytest.raises(TemporaryError):
            await in_thread(lambda: 1, "test")
    assert await inference._work(lambda: 2) == 2

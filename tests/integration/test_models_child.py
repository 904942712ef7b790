"""The probing child, for real: models of every character end in it, and the agent's side says why."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract.errors import TemporaryError
from contract.models import Artifact, Cost, Probe
from edge_agent.models.child import ProbeRequest
from edge_agent.models.parent import CancelledError, probe_model
from tests.integration.models_bench import known_answers, manifest_of, model


def probed(tmp_path: Path, data: bytes, *, deadline_s: float = 60.0, known: bytes | None = None, **changes: Any) -> str:
    manifest = manifest_of(data, **changes)
    (tmp_path / "model").write_bytes(data)
    if known is not None:
        (tmp_path / "known").write_bytes(known)
        artifact = Artifact(sha256="0" * 64, size=len(known))
        manifest = msgspec.structs.replace(manifest, probe=Probe(artifact=artifact, score_tolerance=0.0))
    request = ProbeRequest(
        model=str(tmp_path / "model"),
        manifest=manifest,
        known=str(tmp_path / "known") if known is not None else "",
        deadline_s=deadline_s,
    )
    return probe_model(request, threading.Event())


def test_a_good_model_passes_and_says_nothing(tmp_path: Path) -> None:
    data = model()
    assert probed(tmp_path, data, known=known_answers(data, manifest_of(data))) == ""


@pytest.mark.parametrize("wrong", ["score", "label", "features", "nan_count"])
def test_an_answer_that_is_not_the_trainers_is_named(tmp_path: Path, wrong: str) -> None:
    data = model()
    why = probed(tmp_path, data, known=known_answers(data, manifest_of(data), wrong=wrong))
    assert f"window 0 of the probe: {wrong} is" in why


def test_a_model_that_hangs_is_ended_at_the_deadline(tmp_path: Path) -> None:
    began_s = time.monotonic()
    why = probed(tmp_path, model(character="hangs"), deadline_s=4.0)
    assert "hung" in why
    assert time.monotonic() - began_s < 10


def test_a_model_that_eats_memory_is_stopped_by_the_limit(tmp_path: Path) -> None:
    assert "memory" in probed(tmp_path, model(character="eats_memory"))


def test_a_model_that_is_too_slow_is_found_by_its_cpu_time(tmp_path: Path) -> None:
    limits = Cost(memory_bytes_max=400 << 20, latency_ms_p99_max=1.0)
    assert "too slow" in probed(tmp_path, model(character="slow"), limits=limits)


def test_a_model_that_says_nan_of_sound_windows_is_refused(tmp_path: Path) -> None:
    data = model(character="nan")
    assert "its score is NaN" in probed(tmp_path, data, known=known_answers(data, manifest_of(data)))


def test_a_model_that_fails_is_refused_with_the_runtimes_words(tmp_path: Path) -> None:
    assert "Gather" in probed(tmp_path, model(character="fails"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not a model", "not an ONNX model"),
        (model(rows=9), "the model's window is"),
        (model(opset=23), "opset ai.onnx is 23"),
        (model(channels=3), "the model's window is"),
    ],
)
def test_what_is_not_the_promised_model_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in probed(tmp_path, data)


def test_a_file_changed_after_its_download_is_not_tried(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(model(threshold=1.0))
    manifest = manifest_of(model())
    request = ProbeRequest(model=str(tmp_path / "model"), manifest=manifest, known="", deadline_s=30.0)
    assert "changed on disk" in probe_model(request, threading.Event())


@pytest.mark.parametrize("what", [(subprocess, "Popen"), (os, "memfd_create")])
def test_a_device_that_can_start_no_process_now_has_tried_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: tuple[Any, str]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(*what, refused)
    with pytest.raises(TemporaryError, match="no more processes"):
        probed(tmp_path, model())


def test_nobody_waits_for_a_child_that_is_not_wanted_any_more(tmp_path: Path) -> None:
    data = model(character="hangs")
    (tmp_path / "model").write_bytes(data)
    request = ProbeRequest(model=str(tmp_path / "model"), manifest=manifest_of(data), known="", deadline_s=60.0)
    cancel = threading.Event()
    threading.Timer(1.0, cancel.set).start()
    began_s = time.monotonic()
    with pytest.raises(CancelledError):
        probe_model(request, cancel)
    assert time.monotonic() - began_s < 5


def test_a_child_that_crashes_is_told_from_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ONNX file is known to crash the runtime, so the crash is the module's."""
    (tmp_path / "onnxruntime.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    why = probed(tmp_path, model())
    assert "SIGSEGV" in why

"""The child that works out accuracy: what it answers, and what becomes of a gateway whose child does not."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from contract.errors import ConfigurationError, HeadwaterError
from gateway import judging
from gateway.judging import Answer, Question, answered, ask
from lake.errors import StoreUnavailableError
from lake.monitoring.policy import LabelSource
from lake.store import Store, StoreSettings


@pytest.fixture
def question(tmp_path) -> Question:
    settings = StoreSettings(url=(tmp_path / "lake").as_uri(), fsync=False)
    Store(settings).put("raw/nothing/x", b"")
    labels = LabelSource(stream="exercise")
    return Question(store=settings, model="wear", labels=labels, stream="watch", since_us=0, rows_max=1_000)


def asked(question: Question, **more) -> Answer | None:
    return ask(question, **{"beat": lambda: None, "stopping": lambda: False, "timeout_s": 60.0, **more})


def test_no_labels_yet_is_no_trouble(question):
    assert asked(question) == Answer()


def test_what_is_wrong_with_the_labels_is_told_with_its_name(question):
    wrong = msgspec.structs.replace(question, labels=LabelSource(sql="SELECT 1 AS x"))
    with pytest.raises(ConfigurationError, match="_device"):
        asked(wrong)


def test_a_store_that_is_away_is_told_as_passing(question):
    away = StoreSettings(
        url="s3://lake/x", endpoint="http://127.0.0.1:9", access_key="k", secret_key="s", allow_http=True, timeout_s=2.0
    )
    with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:9"):
        asked(msgspec.structs.replace(question, store=away))


@pytest.fixture
def sleeper(monkeypatch):
    """A child that never answers."""
    children = []

    def start(argv, **more):
        children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **more))
        return children[-1]

    monkeypatch.setattr(judging, "subprocess", Subprocess(start))
    yield children
    assert [child.poll() is not None for child in children] == [True]


class Subprocess:
    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self, start) -> None:
        self.Popen = start


def test_a_child_that_takes_too_long_is_ended_with_a_remedy(question, sleeper):
    beats = []
    with pytest.raises(ConfigurationError, match=r"not worked out within 1\.2 s; lower accuracy_hours"):
        asked(question, timeout_s=1.2, beat=lambda: beats.append(1))
    assert len(beats) >= 2


def test_a_gateway_that_stops_does_not_wait_for_it(question, sleeper):
    assert asked(question, stopping=lambda: True) is None


def test_a_child_that_dies_is_told_with_its_last_words(question, monkeypatch):
    monkeypatch.setattr(judging.sys, "executable", "/bin/false")
    with pytest.raises(HeadwaterError, match="ended with 1"):
        asked(question)


def test_credentials_are_not_in_its_arguments(question, monkeypatch):
    seen = []

    def start(argv, **more):
        seen.extend(argv)
        return subprocess.Popen(argv, **more)

    monkeypatch.setattr(judging, "subprocess", Subprocess(start))
    secret = msgspec.structs.replace(question.store, access_key="key", secret_key="hush")
    asked(msgspec.structs.replace(question, store=secret))
    assert "hush" not in " ".join(seen)


def test_an_answer_survives_its_way(question):
    answer = answered(question)
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer

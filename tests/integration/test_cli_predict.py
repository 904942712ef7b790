"""`headwater predict` as it is typed: what it answers, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.gateway_parts import ROOT
from tests.integration.predict_parts import Fleet, open_store
from tests.integration.release_parts import release
from tests.unit import onnx_models
from tests.unit.inference_parts import manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    found = open_store(tmp_path_factory.mktemp("predict"))
    release(found, manifest(stride=3), onnx_models.classifier())
    release(found, manifest("draft"), onnx_models.classifier(), approved=False)
    hangs = manifest("deaf", stream="nowhere", classes=(), features=())
    release(found, hangs, onnx_models.hanging())
    Fleet(found).send("pi-1", 1, [4, 100])
    return found


def headwater(store, *arguments):
    ended = subprocess.run(
        (sys.executable, "-m", "headwater", *arguments, "--lake", store.url),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_a_history_is_scored_and_read_back(store):
    status, out, err = headwater(store, "predict", "shaker", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["model"], found["version"], found["stream"]) == ("shaker", 1, "vibration")
    assert (found["table"], found["devices"], found["rows"]) == ("predictions/shaker", 1, 104)
    status, out, _ = headwater(store, "lake", "sql", 'SELECT count(*) AS n FROM "predictions/shaker"', "--json")
    assert (status, json.loads(out)) == (0, {"n": found["windows"]})
    status, out, _ = headwater(store, "lake", "sql", "SHOW ALL TABLES", "--json")
    assert "predictions/shaker" in out
    status, out, _ = headwater(store, "predict", "shaker@1", "--json")
    assert (status, json.loads(out)["windows"]) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("nothing",), 2, "release list"),
        (("draft",), 2, "no approved release"),
        (("shaker@9",), 2, "release list"),
        (("shaker", "--since", "yesterday"), 2, "--since 'yesterday'"),
        (("shaker", "--since", "2026-01-02T00:00:00", "--until", "2026-01-01T00:00:00"), 2, "is not before --until"),
        (("shaker", "--stream", "other"), 2, "lake streams"),
        (("deaf",), 2, "no stream 'nowhere'"),
    ],
)
def test_what_cannot_be_scored_is_one_line_with_a_remedy(store, arguments, status, said):
    found, out, err = headwater(store, "predict", *arguments)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert said in err

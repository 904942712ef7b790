"""`[models]` in agent.toml, and what an agent without it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from contract.errors import ConfigurationError
from edge_agent.settings import load_settings

ROOT = Path(__file__).parents[2]
HEAD = 'device = "pi-1"\n{tags}\n[broker]\nurl = "mqtt://broker"\n'


def settings_of(tmp_path: Path, models: str, tags: str = ""):
    (tmp_path / "root.json").write_text("{}")
    (tmp_path / "factory").mkdir(exist_ok=True)
    path = tmp_path / "agent.toml"
    path.write_text(HEAD.format(tags=tags) + models)
    return load_settings(path)


def test_paths_count_from_the_folder_of_the_file_and_the_address_ends_with_a_slash(tmp_path: Path) -> None:
    models = settings_of(
        tmp_path, '[models]\nurl = "http://g:1/models"\nroot = "root.json"\nfactory = "factory"\n'
    ).models
    assert models is not None
    assert (models.url, models.root) == ("http://g:1/models/", str(tmp_path / "root.json"))
    assert (models.factory, models.folder) == (str(tmp_path / "factory"), str(tmp_path / "models"))


@pytest.mark.parametrize(
    ("models", "tags", "words"),
    [
        ('[models]\nurl = "http://g/"\n', "", "url and root belong together"),
        ('[models]\nroot = "root.json"\n', "", "url and root belong together"),
        ("[models]\n", "", "neither url nor factory"),
        ('[models]\nurl = "g:8080"\nroot = "root.json"\n', "", "is no web address"),
        ('[models]\nurl = "http://g/"\nroot = "gone.json"\n', "", "is not a file"),
        ('[models]\nfactory = "gone"\n', "", "is not a folder"),
        ('[models]\nfactory = "factory"\nbytes_max = 5\n', "", "bytes_max"),
        ('[models]\nfactory = "factory"\nstream = "x"\n', "", "unknown key"),
        ("", 'tags = ["Site A"]', "tags"),
        ('[streams."predictions.mine"]\ndriver = "host"\n', "", "reserved"),
    ],
)
def test_what_cannot_work_is_refused_with_its_remedy(tmp_path: Path, models: str, tags: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        settings_of(tmp_path, models, tags)


@pytest.mark.parametrize("models", ["", '[models]\nfactory = "factory"\n'])
def test_an_agent_loads_only_what_its_sensors_and_models_need(tmp_path: Path, models: str) -> None:
    settings_of(tmp_path, '[streams.host]\ndriver = "host"\n' + models)
    code = (
        "import signal, sys, threading\n"
        "from pathlib import Path\n"
        "from edge_agent.lean import spare_memory\n"
        f"config = Path({str(tmp_path / 'agent.toml')!r})\n"
        "spare_memory(config)\n"
        "from edge_agent.app import run_agent\n"
        "from edge_agent.settings import load_settings\n"
        "threading.Timer(1.0, lambda: signal.raise_signal(signal.SIGTERM)).start()\n"
        "code = run_agent(load_settings(config))\n"
        "names = ('onnxruntime', 'numpy', 'tuf', 'urllib3', 'onnx', 'pyarrow.compute', 'edge_agent.models.runner')\n"
        "print(code, *[name for name in names if sys.modules.get(name)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = done.stdout.split()
    expected = ["0"] if not models else ["0", "onnxruntime", "numpy", "edge_agent.models.runner"]
    assert loaded == expected, done.stderr

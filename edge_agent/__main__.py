"""`python -m edge_agent --config agent.toml`: the agent without the command line's packages, for small devices."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

EXIT_CONFIGURATION = 2


def main() -> int:
    """Run the agent; the exit code: see `docs/agent.md`."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent", description="Run the Headwater agent.")
    parser.add_argument("--config", type=Path, required=True, help="the agent.toml")
    config = parser.parse_args().config
    _spare_memory()
    from contract.errors import ConfigurationError
    from edge_agent.app import run_agent
    from edge_agent.settings import load_settings

    try:
        return run_agent(load_settings(config))
    except ConfigurationError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_CONFIGURATION


def _spare_memory() -> None:
    """What has to be said before the libraries are loaded: 10 MB of an agent.

    Arrow's own heap is for larger work than batches. And structlog loads rich where it is installed, for tracebacks
    that an agent never prints.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if "rich" in sys.modules:
        return
    sys.modules["rich"] = cast(ModuleType, None)  # makes `import rich` fail
    try:
        import structlog  # noqa: F401 - imported now for what it loads
    finally:
        del sys.modules["rich"]


if __name__ == "__main__":
    sys.exit(main())

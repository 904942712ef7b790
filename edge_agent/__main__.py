"""`python -m edge_agent --config agent.toml`: the agent without the command line's packages, for small devices."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_agent.lean import spare_memory

EXIT_CONFIGURATION = 2


def main() -> int:
    """Run the agent; the exit code: see `docs/agent.md`."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent", description="Run the Headwater agent.")
    parser.add_argument("--config", type=Path, required=True, help="the agent.toml")
    config = parser.parse_args().config
    spare_memory(config)
    from contract.errors import ConfigurationError
    from edge_agent.app import run_agent
    from edge_agent.settings import load_settings

    try:
        return run_agent(load_settings(config))
    except ConfigurationError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_CONFIGURATION


if __name__ == "__main__":
    sys.exit(main())

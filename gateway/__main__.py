"""`python -m gateway --config gateway.toml`: one gateway process. Exit codes: 0 stopped, 1 died, 2 misconfigured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.errors import ConfigurationError
from gateway.app import run_gateway
from gateway.settings import load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="gateway", description="The gateway between broker and lake.")
    parser.add_argument("--config", type=Path, required=True, help="gateway.toml; see docs/gateway.md")
    try:
        return run_gateway(load_settings(parser.parse_args(arguments).config))
    except ConfigurationError as error:
        sys.stderr.write(f"gateway: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())

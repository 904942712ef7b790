"""The process of an agent: `headwater agent run` becomes this one, which has nothing of the command line in memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_INTERRUPTED = 130
"""`headwater.exits.Exit.INTERRUPTED`, which may not be imported yet when it is needed."""


def main() -> None:
    """Read the settings, run the agent to its end, and end the process with its exit status."""
    try:
        _run()
    except KeyboardInterrupt:
        # Before the agent runs, which hears signals itself.
        sys.exit(_INTERRUPTED)


def _run() -> None:
    from contract.errors import ConfigurationError, HeadwaterError
    from headwater.exits import exit_of

    parser = argparse.ArgumentParser(prog="headwater agent run")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--json-logs", action="store_true")
    arguments = parser.parse_args()
    try:
        from edge_agent.lean import spare_memory

        spare_memory(arguments.config)  # before anything loads structlog or pyarrow
        import msgspec

        from edge_agent.app import run_agent
        from edge_agent.settings import load_settings

        settings = load_settings(arguments.config)
        if arguments.json_logs:
            settings = msgspec.structs.replace(settings, log=msgspec.structs.replace(settings.log, format="json"))
        sys.exit(run_agent(settings))
    except HeadwaterError as error:
        # What shows only when parts are made, such as a driver's options, does not know the file it comes from.
        known = not isinstance(error, ConfigurationError) or str(arguments.config) in str(error)
        sys.stderr.write(f"error: {error}\n" if known else f"error: {arguments.config}: {error}\n")
        sys.exit(exit_of(error))


if __name__ == "__main__":
    main()

"""Logs of the command line: structured lines on stderr, quiet unless asked."""

from __future__ import annotations

import logging
import sys


def configure(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send the logs of this process to stderr: warnings; with `verbose` its lifecycle too, with `quiet` errors only."""
    import structlog  # with it comes rich: a quarter of a second, which `--help` need not wait

    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )

"""Logs of the command line: structured lines on stderr, quiet unless asked."""

from __future__ import annotations

import logging
import sys


def configure(*, verbose: bool = False, json: bool = False) -> None:
    """Send the logs of this process to stderr: warnings, or with `verbose` its lifecycle; for people, or as JSON."""
    import structlog  # with it comes rich: a quarter of a second, which `--help` need not wait

    shown: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            shown,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO if verbose else logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

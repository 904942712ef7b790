"""What all tests share: one seed for everything that is drawn at random, and no deadlines on a busy machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# Two busy cores prove nothing about speed: examples have no deadline, and slow drawing is no failure. A failing example
# is printed as a blob that replays it.
settings.register_profile("headwater", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("headwater"), max_examples=5_000)
settings.load_profile("headwater")

# A shell without job control starts what goes to the background with Ctrl-C ignored, and every child inherits that:
# tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=1,
        help="seed of the simulated worlds and of Hypothesis; the same seed replays the same run (default: 1)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Hypothesis reads its option when it is configured, which is after this.
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(config.getoption("--seed"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('--seed')}"


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """A test that configures logging, onto a stream that ends with it, leaves nothing of that to the next one."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, from `--seed`."""
    return int(request.config.getoption("--seed"))

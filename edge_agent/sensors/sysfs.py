"""Small reads and writes of sysfs attributes: one value per file, text, a newline at its end."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from edge_agent.sensors.port import SensorConfigError, SensorError

_NUMBER_BYTES_MAX = 4096
"""sysfs gives at most a page."""


def read_text(path: Path) -> str:
    """The text of an attribute, without white space around it.

    Raises:
        OSError: as the kernel or the driver reports it.
    """
    with path.open("rb") as file:
        return file.read(_NUMBER_BYTES_MAX).decode("utf-8", "replace").strip()


def read_number(path: Path) -> float | None:
    """The number of an attribute, or None where there is none to be had now: no answer, no such file, or no number."""
    try:
        return float(read_text(path))
    except (OSError, ValueError):
        # A channel that is switched off, unplugged or faulty answers ENODATA, EIO, EAGAIN, …; its neighbours go on.
        return None


def write_text(path: Path, text: str, driver: str) -> None:
    """Write an attribute.

    Raises:
        SensorConfigError: it may not be written, or the driver refuses the value.
        SensorError: it cannot be written now.
    """
    try:
        # Not created: an attribute that the kernel does not have must show as missing.
        with path.open("r+b", buffering=0) as file:
            file.write(text.encode())
    except PermissionError as error:
        raise SensorConfigError(
            f"driver {driver!r}: {path} may not be written; give the agent's user that right (a udev rule)"
        ) from error
    except FileNotFoundError as error:
        raise SensorConfigError(f"driver {driver!r}: there is no {path}; the device has no such setting") from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise SensorConfigError(
                f"driver {driver!r}: {path} is read-only for this process; under systemd the unit has to say "
                "ProtectKernelTunables=false (docs/sensors.md)"
            ) from error
        if error.errno in _REFUSALS:
            raise SensorConfigError(
                f"driver {driver!r}: {path} refuses {text!r} ({error.strerror}); choose another value"
            ) from error
        raise SensorError(f"driver {driver!r}: {path} cannot be written now: {error}") from error


_REFUSALS = frozenset({errno.EINVAL, errno.ERANGE})


def slug(text: str) -> str:
    """A label as part of a field name: lower case, `a-z0-9_` only."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")

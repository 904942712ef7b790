"""Where a one-machine stack keeps its things, and how other commands find it.

The data folder is `--data`, else `$HEADWATER_DATA`, else `headwater-data` in the current folder: in sight, and gone
with `rm -r`. In it `stack.json` says where everything of the running, or last, stack is. So `headwater lake sql` and
the others need no address on the machine where `headwater up` runs:

* the lake is `--lake`, else `$HEADWATER_LAKE`, else the one of the data folder's stack;
* the broker is `--broker`, else `$HEADWATER_BROKER`, else the one of the stack.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import msgspec

from contract.errors import ConfigurationError
from headwater.stack.folder import is_held

DATA_DEFAULT = "headwater-data"
DATA_VARIABLE, LAKE_VARIABLE, BROKER_VARIABLE = "HEADWATER_DATA", "HEADWATER_LAKE", "HEADWATER_BROKER"
RECORD_BYTES_MAX = 4 * 1024 * 1024


class DevicePlace(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a stack."""

    name: str
    config: str
    """Its agent.toml."""
    socket: str
    """Its status socket."""
    buffer: str
    """Its buffer's file."""


class LakePlace(msgspec.Struct, frozen=True, kw_only=True):
    """The lake of a stack; keys are not in it."""

    url: str
    endpoint: str | None = None
    region: str | None = None
    embedded: bool = False
    """Whether the stack's own object store serves it."""


class StackRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`stack.json`: where everything of a stack is."""

    v: int = 1
    pid: int
    """The process that supervises it; it runs while it holds the folder's lock."""
    broker: str
    broker_kind: str
    """`iotcore`, `mosquitto` or `external`."""
    lake: LakePlace
    http: str
    devices: tuple[DevicePlace, ...]
    logs: str


def data_folder(option: str | None, environment: Mapping[str, str]) -> Path:
    """The data folder: absolute, not yet made."""
    return Path(option or environment.get(DATA_VARIABLE) or DATA_DEFAULT).expanduser().absolute()


def data_option(folder: Path) -> str:
    """What to add to a command that shall find this folder from here, for a shell; nothing where it is the default."""
    return "" if folder == data_folder(None, {}) else f" --data {shlex.quote(str(folder))}"


def is_stopped(folder: Path) -> str:
    """That the stack of a folder is stopped, and what to type; empty while it runs."""
    return "" if is_held(folder) else f"the stack over {folder} is stopped; start it: headwater up{data_option(folder)}"


def record_path(folder: Path) -> Path:
    """Where a folder's record is."""
    return folder / "stack.json"


def read_record(folder: Path) -> StackRecord | None:
    """The record of the folder's running or last stack; None where there was none yet.

    Raises:
        ConfigurationError: when it cannot be read.
    """
    path = record_path(folder)
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(RECORD_BYTES_MAX), type=StackRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}); start `headwater up` once more over this folder, or choose another"
        ) from error


def find_record(option: str | None, environment: Mapping[str, str], wanted: str) -> tuple[Path, StackRecord]:
    """The record that a command falls back on.

    Args:
        option: `--data`.
        environment: the process environment.
        wanted: the option that would have made it unnecessary, for the message.

    Raises:
        ConfigurationError: there is none.
    """
    folder = data_folder(option, environment)
    record = read_record(folder)
    if record is None:
        raise ConfigurationError(
            f"no {wanted} was given, and {folder} holds no stack; give {wanted}, or --data with the folder of a stack, "
            "or start one with: headwater up"
        )
    return folder, record


def find_broker(
    option: str | None, data: str | None, environment: Mapping[str, str], *, wanted: str = "--broker"
) -> str:
    """The broker's URL that a command shall use.

    Raises:
        ConfigurationError: none was given, and there is no stack.
    """
    if given := option or environment.get(BROKER_VARIABLE):
        return given
    return find_record(data, environment, wanted)[1].broker

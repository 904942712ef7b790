"""Which folder of keys a command means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from headwater.place import data_folder
from lake.trust.keys import PASSPHRASE_VARIABLE, KeyFolder

KEYS_VARIABLE = "HEADWATER_KEYS"
KEYS_DEFAULT = "~/.config/headwater/keys"


def find_keys(option: str | None, data: str | None, lake: str | None, environment: Mapping[str, str]) -> KeyFolder:
    """`--keys`, else `$HEADWATER_KEYS`, else `keys` in the data folder of a stack, else the folder in the home folder.

    Args:
        option: `--keys`.
        data: `--data`.
        lake: `--lake`: a lake that was named is not that of a stack.
        environment: the process environment; also has the passphrase.
    """
    passphrase = environment.get(PASSPHRASE_VARIABLE, "").encode() or None
    given = option or environment.get(KEYS_VARIABLE)
    if given:
        return KeyFolder(Path(given).expanduser().absolute(), passphrase)
    of_stack = data_folder(data, environment) / "keys"
    if lake is None and of_stack.is_dir():
        return KeyFolder(of_stack, passphrase)
    return KeyFolder(Path(KEYS_DEFAULT).expanduser(), passphrase)

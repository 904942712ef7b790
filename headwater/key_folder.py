"""Which folder of keys a command means, and what belongs into a new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from contract.errors import ConfigurationError
from headwater.place import data_folder
from lake.store import Store
from lake.trust.keys import PASSPHRASE_VARIABLE, ROOT_KEYS_MAX, KeyFolder
from lake.trust.repository import TrustRepository

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


def make_keys(folder: KeyFolder, store: Store, *, root_keys: int = 1, threshold: int = 1) -> TrustRepository:
    """Make the keys and the lake's repository, or find that they are there.

    Args:
        folder: of the keys; `root.json`, the trust anchor for devices, is written there too.
        store: where the lake is.
        root_keys: how many.
        threshold: how many of them a change of keys needs.

    Raises:
        ConfigurationError: the lake belongs to other keys, or the folder cannot be written.
        StoreUnavailableError: the store did not answer; call again.
    """
    if not 1 <= root_keys <= ROOT_KEYS_MAX:
        raise ConfigurationError(f"--root-keys {root_keys}; choose 1 to {ROOT_KEYS_MAX}")
    roots = [folder.make("root" if number == 1 else f"root-{number}") for number in range(1, root_keys + 1)]
    repository = TrustRepository(store, anchor=folder.anchor())
    anchor = repository.initialise(roots, folder.make("targets"), folder.make("online"), threshold=threshold)
    if folder.anchor() is None:
        folder.write_anchor(anchor)
    return TrustRepository(store, anchor=folder.anchor())

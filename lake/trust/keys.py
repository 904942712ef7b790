"""Private keys in files: Ed25519, PKCS8 PEM, mode 0600, encrypted where there is a passphrase.

A key folder holds `root.pem` (more of them: `root-2.pem` …), `targets.pem` and `online.pem`, and `root.json`, the trust
anchor, which is public. Root and targets are for people and belong off the machines that serve; a gateway gets
`online.pem` alone.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner

from contract.errors import ConfigurationError

ROOT, TARGETS, ONLINE = "root", "targets", "online"
ROLES = (ROOT, TARGETS, ONLINE)
PASSPHRASE_VARIABLE = "HEADWATER_KEY_PASSPHRASE"
KEY_BYTES_MAX = 64 * 1024
ROOT_KEYS_MAX = 9
_EXTRA_ROOT = re.compile(r"root-[2-9]\.pem", re.ASCII)


def generate_key() -> CryptoSigner:
    """A new key pair."""
    return CryptoSigner(Ed25519PrivateKey.generate())


def write_key(path: Path, key: CryptoSigner, passphrase: bytes | None = None) -> None:
    """Write a private key; after it returns no power cut takes it away.

    Raises:
        ConfigurationError: there is a file already, or it cannot be written.
    """
    protection = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    pem = key._private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.touch(0o600, exist_ok=False)
        try:
            with draft.open("wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            path.hardlink_to(draft)  # unlike a rename, it replaces nothing
        finally:
            draft.unlink()
        sync_folder(path.parent)
    except FileExistsError as error:
        raise ConfigurationError(f"key {path} exists already; move it away, or use it") from error
    except OSError as error:
        raise ConfigurationError(f"key {path} cannot be written ({error}); choose another folder") from error


def read_key(path: Path, passphrase: bytes | None = None) -> CryptoSigner:
    """Read a private key.

    Raises:
        ConfigurationError: it is not there, open to others, no such key, or the passphrase is wrong.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read(KEY_BYTES_MAX)
    except OSError as error:
        raise ConfigurationError(
            f"key {path} cannot be read ({error}); make keys with `headwater keys init`, or name their folder"
        ) from error
    if mode & 0o027:
        raise ConfigurationError(f"key {path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
    try:
        private = load_pem_private_key(pem, passphrase)
    except TypeError:
        # An encrypted key without a passphrase, or the other way round.
        if passphrase:
            return read_key(path)
        raise ConfigurationError(f"key {path} is encrypted; set {PASSPHRASE_VARIABLE} to its passphrase") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(
            f"key {path} cannot be read: wrong passphrase, or no PKCS8 PEM ({error}); check {PASSPHRASE_VARIABLE}"
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigurationError(f"key {path} is not Ed25519; make keys with: headwater keys init")
    return CryptoSigner(private)


class KeyFolder:
    """A folder of keys. Nothing is read before it is asked for.

    Args:
        path: the folder.
        passphrase: for keys that are encrypted, and those that are made.
    """

    def __init__(self, path: Path, passphrase: bytes | None = None) -> None:
        self.path = path
        self._passphrase = passphrase

    @property
    def anchor_path(self) -> Path:
        """The trust anchor: root.json, public."""
        return self.path / "root.json"

    def file(self, role: str) -> Path:
        """Where a role's key is."""
        return self.path / f"{role}.pem"

    def has(self, role: str) -> bool:
        """Whether there is a file for a role's key."""
        return self.file(role).exists()

    def read(self, role: str) -> CryptoSigner:
        """The key of a role, as `read_key`."""
        return read_key(self.file(role), self._passphrase)

    def read_if_any(self, role: str) -> CryptoSigner | None:
        """The key of a role; None where its file is not here, as `read_key` otherwise."""
        return self.read(role) if self.has(role) else None

    def read_roots(self) -> list[CryptoSigner]:
        """All root keys that are here, at least one, as `read_key`."""
        extra = sorted(file for file in self.path.glob("root-*.pem") if _EXTRA_ROOT.fullmatch(file.name))
        return [self.read(ROOT), *(read_key(file, self._passphrase) for file in extra)]

    def make(self, name: str) -> CryptoSigner:
        """The key in `<name>.pem`: that which is there, else a new one."""
        path = self.path / f"{name}.pem"
        if not path.exists():
            # A gateway starts unattended: nobody could tell it the passphrase of its key.
            write_key(path, generate_key(), None if name.startswith(ONLINE) else self._passphrase)
        return read_key(path, self._passphrase)

    def adopt(self, role: str) -> None:
        """`<role>.next.pem` becomes the role's key; the old one stays as `<role>.retired.pem` until it is deleted.

        Raises:
            ConfigurationError: the files cannot be renamed.
        """
        coming, current = self.path / f"{role}.next.pem", self.file(role)
        try:
            if current.exists():
                retired = self.path / f"{role}.retired.pem"
                retired.unlink(missing_ok=True)
                retired.hardlink_to(current)  # at no moment is the role without a key
            coming.replace(current)
            sync_folder(self.path)
        except OSError as error:
            raise ConfigurationError(f"key {coming} cannot be renamed to {current} ({error}); do it by hand") from error

    def anchor(self) -> bytes | None:
        """The trust anchor; None where there is none.

        Raises:
            ConfigurationError: it cannot be read.
        """
        try:
            return self.anchor_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigurationError(f"{self.anchor_path} cannot be read ({error})") from error

    def write_anchor(self, root: bytes) -> None:
        """Keep the trust anchor beside the keys.

        Raises:
            ConfigurationError: it cannot be written.
        """
        draft = self.path / ".root.json.part"
        try:
            with draft.open("wb") as file:
                file.write(root)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.anchor_path)
            sync_folder(self.path)
        except OSError as error:
            raise ConfigurationError(f"{self.anchor_path} cannot be written ({error}); free space") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

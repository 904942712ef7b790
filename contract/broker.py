"""Where the broker is, and how one proves there who one is: written alike in `agent.toml` and `gateway.toml`."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from contract.errors import ConfigurationError
from contract.settings import check_range


class BrokerAddress(NamedTuple):
    """A broker's URL, taken apart."""

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Read `mqtt://host[:port]` or `mqtts://host[:port]`.

        Raises:
            ValueError: naming the URL and the form.
        """
        form = "write mqtt://host:1883 or mqtts://host:8883"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url = {url!r}: {error}; {form}") from error
        if parts.username is not None or parts.password is not None:
            # Not shown: it holds a secret.
            raise ValueError("url carries a username or password; use username and password_file")
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError(f"url = {url!r} is not the address of a broker; {form}")
        try:
            parts.hostname.encode("idna")
        except UnicodeError as error:
            raise ValueError(f"url = {url!r}: the host's name is not one; {form}") from error
        tls = parts.scheme == "mqtts"
        return cls(parts.hostname, port or (8883 if tls else 1883), tls)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a `[broker]` table says on either side; each adds its own keys."""

    url: str
    """`mqtt://host[:1883]` or `mqtts://host[:8883]`."""
    username: str = ""
    password_file: str = ""
    """Read again at each connection attempt, so that a new password needs no restart."""
    ca_file: str = ""
    """Certificates that may have signed the broker's; empty takes those of the system."""
    cert_file: str = ""
    key_file: str = ""
    keepalive_s: int = 30
    connect_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        address = BrokerAddress.parse(self.url)
        check_range("keepalive_s", self.keepalive_s, 5, 3600)
        check_range("connect_timeout_s", self.connect_timeout_s, 0.5, 120)
        if self.password_file and not self.username:
            raise ValueError(f"password_file = {self.password_file!r} stands without a username; add username")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError(f"cert_file = {self.cert_file!r} and key_file = {self.key_file!r}; give both, or neither")
        if not address.tls and (self.ca_file or self.cert_file):
            raise ValueError(f"url = {self.url!r} is without TLS, but ca_file or cert_file is given; write mqtts://")

    def read_password(self) -> str | None:
        """What stands in `password_file`, its line end taken off; None where none is named.

        Raises:
            ConfigurationError: it cannot be read.
        """
        if not self.password_file:
            return None
        try:
            return Path(self.password_file).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"[broker] password_file = {self.password_file!r} cannot be read ({error}); "
                "write the password into it, readable for the user that this runs as"
            ) from error

    def tls_context(self) -> ssl.SSLContext:
        """Server name and chain are always checked; there is no switch to turn it off.

        Raises:
            ConfigurationError: a file is missing or not what it should be.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"[broker] ca_file = {self.ca_file!r}, cert_file = {self.cert_file!r}, key_file = {self.key_file!r}: "
                f"{type(error).__name__}: {error}; give readable PEM files that belong together"
            ) from error
        return context

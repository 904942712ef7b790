"""Releases that the gateway has in memory to score with: loaded when asked for, the one used longest ago goes first.

Nothing here trusts what is asked for: only releases that the registry holds as APPROVED are loaded, and their bytes
must have the hash that the manifest names (see `lake.scoring`).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from contract.inference import Unanswered
from contract.models import Manifest
from gateway.metrics import GatewayMetrics
from lake.releases import ReleaseBook, Releases, ReleaseState
from lake.scoring import Scorer

APPROVED_FOR_S = 5.0
"""For so long what the registry said is believed: a release that was retired may be asked a moment longer."""


class Key(NamedTuple):
    """A release."""

    model: str
    version: int


class _Loading:
    """A release that one thread loads, and others wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.scorer: Scorer | None = None
        self.failure: Exception | None = None


class ModelCache:
    """Scorers by release, bounded in number and in bytes of their ONNX files. Safe to share between threads.

    Args:
        releases: the registry; called by one thread at a time.
        models_max: how many at most.
        bytes_max: of their files together; one that is larger is refused.
        metrics: counts loads and what was given up.
        clock_s: monotonic seconds.
    """

    def __init__(
        self,
        releases: Callable[[], Releases],
        models_max: int,
        bytes_max: int,
        metrics: GatewayMetrics,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._releases, self._models_max, self._bytes_max = releases, models_max, bytes_max
        self._metrics, self._clock_s = metrics, clock_s
        self._lock = threading.Lock()
        self._scorers: OrderedDict[Key, Scorer] = OrderedDict()
        self._loading: dict[Key, _Loading] = {}
        self._looking = threading.Lock()
        self._looked_s: float | None = None
        self._known = ReleaseBook()
        metrics.watch("inference_models", "Models in memory", lambda: len(self._scorers), models_max)
        metrics.watch("inference_model_bytes", "Bytes of their ONNX files", lambda: self.bytes, bytes_max)

    @property
    def bytes(self) -> int:
        """Of the ONNX files of the models in memory."""
        with self._lock:
            return sum(scorer.manifest.artifact.size for scorer in self._scorers.values())

    def look(self) -> None:
        """See which releases there are, unless that was done a moment ago.

        Raises:
            StoreUnavailableError: the lake did not answer.
        """
        self._book()

    def approved(self, model: str) -> list[Manifest]:
        """Manifests of the approved releases of a model, newest first; never none.

        Raises:
            Unanswered: 404, there is no such model.
            StoreUnavailableError: the lake did not answer.
        """
        found = [release.manifest for release in self._book().of_model(model) if release.state is ReleaseState.APPROVED]
        if not found:
            raise Unanswered(
                404, f"there is no approved release of a model {model[:80]!r}; see `headwater release list`"
            )
        return found

    def manifest(self, model: str, version: str | None) -> Manifest:
        """The release that is meant: without a version, the newest that is approved.

        Raises:
            Unanswered: 404, it is not there, or not approved.
            StoreUnavailableError: the lake did not answer.
        """
        approved = self.approved(model)
        if version is None:
            return approved[0]
        found = next((manifest for manifest in approved if str(manifest.version) == version), None)
        if found is None:
            listed = ", ".join(str(manifest.version) for manifest in approved[:20])
            raise Unanswered(404, f"version {version[:20]!r} of model {model} is not approved; choose of {listed}")
        return found

    def _book(self) -> ReleaseBook:
        with self._looking:
            now_s = self._clock_s()
            if self._looked_s is None or now_s - self._looked_s >= APPROVED_FOR_S:
                self._known = self._releases().look()
                self._looked_s = now_s
            return self._known

    def scorer(self, manifest: Manifest, deadline_s: float) -> Scorer:
        """A release to score with; loaded where it is not in memory. Of several that ask for it, one loads it.

        Args:
            manifest: of an approved release.
            deadline_s: longest wait for another thread that loads it, seconds.

        Raises:
            Unanswered: 413 it is larger than the cache; 503 it is still being loaded.
            ModelError: it cannot be loaded.
            ObjectMissingError, CorruptLakeError: the lake lacks its file, or has another.
            StoreUnavailableError: the lake did not answer.
        """
        key = Key(manifest.model, manifest.version)
        with self._lock:
            found = self._scorers.get(key)
            if found is not None:
                self._scorers.move_to_end(key)
                return found
            loading = self._loading.get(key)
            mine = loading is None
            if loading is None:
                loading = self._loading[key] = _Loading()
        if mine:
            self._load(key, manifest, loading)
        elif not loading.done.wait(deadline_s):
            raise Unanswered(503, f"model {key.model} version {key.version} is being loaded; try again in a moment")
        if loading.failure is not None:
            raise loading.failure
        assert loading.scorer is not None
        return loading.scorer

    def _load(self, key: Key, manifest: Manifest, loading: _Loading) -> None:
        try:
            if manifest.artifact.size > self._bytes_max:
                raise Unanswered(
                    413,
                    f"model {key.model} version {key.version} has {manifest.artifact.size} bytes, more than "
                    f"[inference] models_bytes_max = {self._bytes_max}; raise it",
                )
            with self._looking:
                releases = self._releases()
            loading.scorer = Scorer(releases.artifact(manifest.artifact.sha256), manifest)
            self._keep(key, loading.scorer)
            self._metrics.inference_loads.inc()
        except Exception as failure:  # noqa: BLE001 - raised again, here and for who waits
            loading.failure = failure
        finally:
            with self._lock:
                del self._loading[key]
            loading.done.set()

    def _keep(self, key: Key, scorer: Scorer) -> None:
        """Remember it, and give up what was not used for longest. Who scores with one of those holds it still."""
        with self._lock:
            self._scorers[key] = scorer
            held = sum(kept.manifest.artifact.size for kept in self._scorers.values())
            while len(self._scorers) > self._models_max or held > self._bytes_max:
                _, given_up = self._scorers.popitem(last=False)
                held -= given_up.manifest.artifact.size
                self._metrics.inference_evictions.inc()

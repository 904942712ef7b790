"""One model, watched: new predictions in, figures and findings out. What `gateway.monitoring` does for every model."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from contract.errors import ConfigurationError
from contract.models import Manifest
from lake.errors import CorruptLakeError, ObjectMissingError
from lake.monitoring.alerts import Finding, judge
from lake.monitoring.detector import Baseline
from lake.monitoring.feed import PredictionFeed
from lake.monitoring.observe import Bounds, Figures, Observer
from lake.monitoring.policy import WatchedRecipe, recipe_of
from lake.monitoring.reference import Reference, decode_reference
from lake.releases import ReleaseBook, Releases
from lake.store import Store

RELEASES_MAX = 256
REFERENCE_BYTES_MAX = 64 * 1024 * 1024
"""References in memory, as bytes of their files: of the releases that were looked at last. Each look asks for those of
all models in turn, so a bound that they do not fit into has each of them read anew at each look."""


class Watched(NamedTuple):
    """What a release is measured against."""

    manifest: Manifest
    recipe: WatchedRecipe
    reference: Reference | None


class Seen(NamedTuple):
    """One look at one release on one device."""

    figures: Figures
    findings: list[Finding]
    checks: int
    """Looks in a row that its policy asks for."""


class References:
    """Recipes and references of releases, read once each. Not thread-safe.

    Args:
        open_releases: gives the register, anew when credentials changed.
    """

    def __init__(self, open_releases: Callable[[], Releases]) -> None:
        self._open_releases = open_releases
        self._known: OrderedDict[tuple[str, int], Watched] = OrderedDict()
        self.book = ReleaseBook()

    def refresh(self) -> ReleaseBook:
        """The releases as of now.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        self.book = self._open_releases().look()
        return self.book

    def get(self, model: str, version: int) -> Watched | None:
        """What a release is measured against; None for one that the register does not have.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        key = model, version
        release = self.book.releases.get(key)
        if release is None:
            return None
        if key not in self._known:
            self._known[key] = self._read(release.manifest)
        self._known.move_to_end(key)
        while len(self._known) > 1 and (len(self._known) > RELEASES_MAX or self._bytes() > REFERENCE_BYTES_MAX):
            self._known.popitem(last=False)
        return self._known[key]

    def _bytes(self) -> int:
        kept = (watched.manifest.reference for watched in self._known.values() if watched.reference is not None)
        return sum(artifact.size for artifact in kept if artifact is not None)

    def _read(self, manifest: Manifest) -> Watched:
        try:
            recipe = recipe_of(manifest)
        except ConfigurationError:
            recipe = WatchedRecipe()  # watched by the defaults, rather than not at all
        reference = None
        if manifest.reference is not None:
            try:
                reference = decode_reference(self._open_releases().artifact(manifest.reference.sha256))
            except (ConfigurationError, ObjectMissingError, CorruptLakeError):
                reference = None  # no drift without it, all else is still seen
            if reference is not None and len(reference.features) != len(manifest.features):
                reference = None
        return Watched(manifest, recipe, reference)


def features_of(references: References, model: str, release: int) -> int:
    """How many features a release has. None, where the register does not have it: nothing would measure them, and it
    is the device that decides how many there are.

    Raises:
        StoreUnavailableError: the store did not answer.
    """
    watched = references.get(model, release)
    return 0 if watched is None else len(watched.manifest.features)


class ModelWatch:
    """One model on the devices of one gateway. Not thread-safe.

    Args:
        store: where the lake is.
        model: which.
        references: of all models.
        bounds: how much is looked at.
        mine: whether a device is this gateway's to watch.
    """

    def __init__(
        self, store: Store, model: str, references: References, bounds: Bounds, mine: Callable[[str], bool]
    ) -> None:
        self._store, self.model, self._references, self._bounds, self._mine = store, model, references, bounds, mine
        self._feed = PredictionFeed(store, model)
        self._asked: set[tuple[int, str]] = set()
        self.observer = Observer(bounds)

    @property
    def skipped_commits(self) -> int:
        """Commits that were too many to read."""
        return self._feed.skipped_commits

    @property
    def skipped_files(self) -> int:
        """Files, or entries of the log, that could not be read."""
        return self._feed.skipped_files

    def read(self, rows_max: int) -> int:
        """Take new rows in.

        Returns:
            How many there were, those of other gateways' devices included.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        count = 0
        for rows in self._feed.take(rows_max):
            self.observer.add(rows, self._mine, lambda release: features_of(self._references, self.model, release))
            count += len(rows)
        return count

    def look(self, budget_s: float, clock_s: Callable[[], float] = time.monotonic) -> Iterator[Seen]:
        """Measure what has new rows, those heard of longest ago first.

        Args:
            budget_s: after so long no further one is begun; it comes first at the next look. At least one is measured.
            clock_s: monotonic seconds.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        began_s = clock_s()
        # Of what was forgotten and came back the baseline is to be read again.
        self._asked = {key for key in self._asked if key in self.observer}
        for key in self.observer.fresh():
            watched = self._references.get(self.model, key[0])
            reference = watched.reference if watched is not None else None
            recipe = watched.recipe if watched is not None else WatchedRecipe()
            if reference is not None:
                self._baseline(key, reference)
            window = watched.manifest.window if watched is not None else None
            overlap = window.rows / window.stride if window is not None else 1.0
            figures = self.observer.measure(key, reference, recipe.policy.retrain.psi_max, overlap)
            limits = watched.manifest.limits if watched is not None else None
            findings = judge(
                self.model,
                figures,
                self._bounds.windows_min,
                limits.latency_ms_p99_max if limits is not None else None,
            )
            yield Seen(figures, findings, recipe.policy.retrain.checks)
            if clock_s() - began_s >= budget_s:
                return

    def _baseline(self, key: tuple[int, str], reference: Reference) -> None:
        """Find the baseline of a release on a device, or make it; the first that was made is everybody's."""
        if not self.observer.needs_baseline(key):
            return
        if key not in self._asked:
            found = stored_baseline(self._store, self.model, *key)
            self._asked.add(key)
            if found is not None:
                self.observer.set_baseline(key, found)
                return
        made = self.observer.candidate(key, reference)
        if made is not None:
            if not self._store.put_if_absent(baseline_path(self.model, *key), msgspec.json.encode(made)):
                made = stored_baseline(self._store, self.model, *key) or made
            self.observer.set_baseline(key, made)


def baseline_path(model: str, release: int, device: str) -> str:
    """Where the baseline of a release on a device is in the lake."""
    return f"monitoring/baselines/{model}/{release}/{device}.json"


def stored_baseline(store: Store, model: str, release: int, device: str) -> Baseline | None:
    """The baseline of a release on a device; None where there is none yet.

    Raises:
        StoreUnavailableError: the store did not answer.
    """
    try:
        return msgspec.json.decode(store.get(baseline_path(model, release, device)), type=Baseline)
    except (ObjectMissingError, msgspec.MsgspecError):
        return None

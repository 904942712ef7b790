"""What a release says about watching it: labels and the policy for learning again, out of the recipe in its manifest.

The recipe is the trainer's; here only these two tables of it are read, and keys of a newer trainer are passed over.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from contract.errors import ConfigurationError
from contract.models import Manifest

Count = Annotated[int, msgspec.Meta(ge=1)]


class Retrain(msgspec.Struct, frozen=True, kw_only=True):
    """When to learn again; what is not given does not trigger."""

    drift: bool = True
    """A drift alert of this model that is open."""
    psi_max: Annotated[float, msgspec.Meta(gt=0)] = 0.25
    """Beyond this population stability index a feature, or the score, has drifted."""
    checks: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 3
    """So many looks in a row must find a device drifted before an alert opens."""
    new_rows: Count | None = None
    """So many rows of the stream since the last training."""
    every_s: Annotated[float, msgspec.Meta(ge=60)] | None = None
    """So long after the release was made."""
    pause_s: Annotated[float, msgspec.Meta(ge=0)] = 3_600.0
    """Shortest time between the end of a training and the next."""
    tolerance: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How much worse than the current release, by the recipe's metric, a candidate may be on the same recent data."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What may happen without a person."""

    approve: bool = False
    rollout: bool = False
    retrain: Retrain = Retrain()


class LabelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where labels come from, as `[labels]` of the recipe says."""

    stream: str = ""
    field: str = "label"
    table: str = ""
    sql: str = ""


class WatchedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """The two tables."""

    policy: Policy = Policy()
    labels: LabelSource | None = None


def recipe_of(manifest: Manifest) -> WatchedRecipe:
    """Read the recipe that a release was made by.

    Raises:
        ConfigurationError: it is no TOML, or a value is of the wrong type.
    """
    try:
        return msgspec.toml.decode(manifest.recipe, type=WatchedRecipe)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(
            f"the recipe in release {manifest.model}@{manifest.version} cannot be read ({error}); release it anew"
        ) from error

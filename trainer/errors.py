"""What can go wrong in training. The class says what the caller can do (see `contract.errors`)."""

from __future__ import annotations

from contract.errors import ConfigurationError, HeadwaterError
from lake.errors import UnknownNameError


class RecipeError(ConfigurationError):
    """The recipe asks for what cannot be. Change it: the message names the key and the remedy."""


class StepNotReadyError(ConfigurationError):
    """A step needs what an earlier one has not made, or made from something else. Run that one first."""


class DataError(HeadwaterError):
    """The data does not allow the step: none, too much, of one class only, not labelled. The message says what to do
    about it; the same rows give the same answer."""


class NoSuchStreamError(DataError, UnknownNameError):
    """The stream that a recipe or a release names is not in the lake. Name another, or let a device send it."""


class ChecksFailedError(DataError):
    """The data checks found what must not be trained on. The report beside says what, with figures."""


class TrainingError(HeadwaterError):
    """A model could not be trained, or not be exported, or does not answer as it did in training."""


class DiskFullError(HeadwaterError):
    """The work folder has no room, or the disk refused. Make room, or choose another --work; nothing half-made
    is taken for whole."""

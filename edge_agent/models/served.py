"""The device's models as its local endpoint asks for them: `edge_agent.models.answers.Served` over the engine."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from contract.inference import Tensor, Unanswered, tensor_of
from contract.models import Manifest
from edge_agent.models.inference import BusyError, Engine, LateError
from edge_agent.models.runtime import ModelError


class ServedModels:
    """See `Served`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def models(self) -> Sequence[Manifest]:
        """See `Served.models`."""
        return list(self._engine.models().values())

    def infer(self, model: str, version: int, windows: array[float], batch: int, timeout_s: float) -> Sequence[Tensor]:
        """See `Served.infer`."""
        manifest = self._engine.models().get(model)
        if manifest is None or manifest.version != version:
            raise Unanswered(404, f"{model} version {version} answers no more on this device; ask which one does")
        shape = (batch, manifest.window.rows, len(manifest.fields))
        try:
            outputs = self._engine.infer(model, version, np.frombuffer(windows, np.float32).reshape(shape), timeout_s)
        except KeyError as error:
            raise Unanswered(404, f"{model} version {version} answers no more on this device") from error
        except BusyError as error:
            raise Unanswered(503, str(error)) from error
        except LateError as error:
            raise Unanswered(504, str(error)) from error
        except ModelError as error:
            raise Unanswered(500, str(error)) from error
        return [tensor_of(name, values) for name, values in outputs.items()]

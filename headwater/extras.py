"""What is not installed is said in one line with its remedy, instead of a traceback about a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from contract.errors import ConfigurationError

MODULES = {
    "edge": ("paho", "prometheus_client", "psutil"),
    "gateway": ("aiohttp", "deltalake", "duckdb", "mqtt5", "numpy", "obstore", "paho", "prometheus_client"),
    "simulators": ("iotcore", "mqtt5"),
    "trainer": ("matplotlib", "onnx", "optuna", "sklearn", "skl2onnx"),
}
"""Extra → top-level modules that it brings. An extra is complete when all can be found."""
INCLUDES = {"simulators": ("edge", "gateway"), "trainer": ("gateway",)}


class ExtraMissing(ConfigurationError):
    """A part of Headwater was asked for whose packages are not installed."""


def own(extra: str) -> list[str]:
    """Modules that nothing else brings: their presence shows that somebody wanted this extra.

    numpy is nobody's: pyarrow is often installed beside it.
    """
    others = {module for name, modules in MODULES.items() if name != extra for module in modules}
    return [module for module in MODULES[extra] if module not in others and module != "numpy"]


def missing(extra: str) -> list[str]:
    """Modules of an extra, and of those it includes, that are not installed. Nothing is imported."""
    wanted = [module for name in (*INCLUDES.get(extra, ()), extra) for module in MODULES[name]]
    return [module for module in dict.fromkeys(wanted) if find_spec(module) is None]


def require(extra: str, what: str) -> None:
    """Refuse now what would fail later, half way.

    Raises:
        ExtraMissing: naming what was asked for, the modules that are not there, and what to type.
    """
    if gone := missing(extra):
        raise ExtraMissing(f"{what} needs {', '.join(gone)}; run: pip install 'headwater[{extra}]'")


@contextmanager
def imports(extra: str, what: str) -> Iterator[None]:
    """Around the imports of a command: a module that is not there becomes `ExtraMissing`.

    Also catches a package that is installed only in part. A module of ours that is missing is a bug, and shows as one.
    """
    require(extra, what)
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("contract", "edge_agent", "gateway", "headwater", "lake", "simulators", "trainer"):
            raise
        raise ExtraMissing(f"{what} needs the module {error.name!r}; run: pip install 'headwater[{extra}]'") from error

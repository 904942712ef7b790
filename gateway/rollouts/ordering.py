"""From what a person writes (a TOML file, JSON, options) to a specification whose release was looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contract.errors import ConfigurationError
from contract.settings import convert
from lake.releases import Release, ReleaseBook, ReleaseState
from lake.rollout_spec import Spec, check_spec
from lake.rollouts import RolloutRefused

STAGES_DEFAULT = ("10%", "50%", "100%")
_HASHES = ("sha256", "previous_sha256")


def specified(raw: Mapping[str, Any], releases: ReleaseBook, source: str) -> Spec:
    """Check what was written, and look its releases up.

    Args:
        raw: as `Spec`, but without hashes. `version` may be left out: the newest that is approved. `stages` are tables,
            or texts such as `10%`, `tag:canary`, `device:pi-1`; `stage` is a table with what holds for each of them;
            `target` is a table, or a list of `tag:…` and `device:…`.
        releases: the registry as of now.
        source: the file's name or what else the content came from, for messages.

    Raises:
        ConfigurationError: naming key, value and remedy.
        ReleaseRefused: there is no such release.
        RolloutRefused: the release is not approved.
    """
    table = dict(raw)
    for name in _HASHES:
        if name in table:
            raise ConfigurationError(f"{source}{name} is looked up in control/releases; leave it out")
    model, version, previous = table.get("model"), table.get("version"), table.get("previous")
    if not isinstance(model, str) or not isinstance(version, int | None) or not isinstance(previous, int | None):
        raise ConfigurationError(f"{source}model, version or previous is missing or no name and numbers; correct it")
    release = _approved(releases.get(model, version))
    table |= {"version": release.version, "sha256": release.manifest.artifact.sha256}
    if previous:
        table["previous_sha256"] = _approved(releases.get(model, previous)).manifest.artifact.sha256
    each = table.pop("stage", {})
    stages = table.get("stages", list(STAGES_DEFAULT))
    if not isinstance(each, Mapping) or not isinstance(stages, list):
        raise ConfigurationError(f'{source}stages is no list, or stage no table; write stages = ["10%", "100%"]')
    table["stages"] = [dict(each) | stage_of_text(stage, source) for stage in stages]
    target = table.get("target")
    if isinstance(target, list):
        table["target"] = selection_of_texts(target, source)
    spec = convert(table, Spec, source)
    check_spec(spec)
    return spec


def stage_of_text(stage: Any, source: str) -> dict[str, Any]:
    """A stage as a table: `10%`, `tag:canary`, `device:pi-1`, or a table already.

    Raises:
        ConfigurationError: it is none of these.
    """
    if isinstance(stage, Mapping):
        return dict(stage)
    if isinstance(stage, str) and stage.endswith("%"):
        try:
            return {"percent": float(stage[:-1])}
        except ValueError:
            raise ConfigurationError(f"{source}stage {stage[:80]!r} is no percentage; write 10%") from None
    return selection_of_texts([stage], source)


def selection_of_texts(texts: Sequence[Any], source: str) -> dict[str, list[str]]:
    """`tag:…` and `device:…` as a table.

    Raises:
        ConfigurationError: something is neither.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        kind, _, name = text.partition(":") if isinstance(text, str) else ("", "", "")
        if kind not in ("tag", "device") or not name:
            raise ConfigurationError(f"{source}{str(text)[:80]!r} names no devices; write 10%, tag:NAME or device:NAME")
        found.setdefault(f"{kind}s", []).append(name)
    return found


def _approved(release: Release) -> Release:
    if release.state is not ReleaseState.APPROVED:
        remedy = "approve it first" if release.state is ReleaseState.DRAFT else "choose another, or release it anew"
        raise RolloutRefused(
            "not_approved",
            f"release {release.name} is {release.state}, and devices refuse what is not approved; {remedy}",
        )
    return release

"""What `headwater doctor` looks at, and where it finds what to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from contract.errors import ConfigurationError
from headwater import extras
from headwater.checks.broker import BrokerLogin, check_broker
from headwater.checks.findings import Finding, Verdict, failed, skipped
from headwater.checks.host import check_host
from headwater.checks.stack import check_stack
from headwater.place import BROKER_VARIABLE, LAKE_VARIABLE, data_folder, data_option, is_stopped, read_record


def examine(
    *,
    broker: str | None,
    lake: str | None,
    data: str | None,
    username: str | None,
    password_file: str | None,
    ca_file: str | None,
    environment: Mapping[str, str],
) -> list[Finding]:
    """Everything that can be looked at from here."""
    folder = data_folder(data, environment)
    findings = check_host(folder)
    record, lacks = None, f"{folder} holds no stack"
    try:
        record = read_record(folder)
    except ConfigurationError as error:
        findings.append(failed("stack.record", str(error), f"start it once more: headwater up{data_option(folder)}"))
        lacks = f"what {folder} holds cannot be read"
    named = broker or environment.get(BROKER_VARIABLE)
    url = named or (record.broker if record else None)
    if url is None:
        findings.append(skipped("broker", f"no --broker was given, and {lacks}"))
    else:
        login = BrokerLogin(url=url, username=username, password_file=password_file, ca_file=ca_file)
        own = record is not None and not named and record.broker_kind != "external"
        findings += check_broker(login, _remedy(folder, "broker") if own else "")
    if not (lake or environment.get(LAKE_VARIABLE) or record):
        findings.append(skipped("store", f"no --lake was given, and {lacks}"))
    elif extras.missing("gateway"):
        findings.append(skipped("store", "not looked at; for it run: pip install 'headwater[gateway]'"))
    else:
        findings += _store(lake, data, environment)
    elsewhere = named or lake or environment.get(LAKE_VARIABLE)
    if record is not None and not elsewhere and not is_stopped(folder):
        findings += check_stack(record)
    return findings


def _store(lake: str | None, data: str | None, environment: Mapping[str, str]) -> list[Finding]:
    from headwater.checks.store import REMEDY, check_store
    from headwater.lake_access import find_store
    from lake.credentials import require_credentials

    try:
        found = find_store(lake, data, environment)
        require_credentials(found.settings, environment)
        own = found.embedded_in
        return check_store(found.settings, _remedy(own, "store") if own is not None else REMEDY)
    except ConfigurationError as error:
        return [failed("store.open", str(error), REMEDY)]


def _remedy(folder: Path, server: str) -> str:
    """What to do where a server of a stack does not answer."""
    running = f"see why it does not answer: {folder}/logs/{server}.log; the stack over {folder} is running"
    return is_stopped(folder) or running


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """The worst of them."""
    for worst in (Verdict.FAILED, Verdict.WARNING):
        if any(finding.verdict is worst for finding in findings):
            return worst
    return Verdict.OK

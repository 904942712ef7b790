"""What `headwater doctor` looks at, and where it finds what to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from contract.errors import ConfigurationError
from headwater import extras
from headwater.checks.broker import BrokerLogin, check_broker
from headwater.checks.findings import Finding, Verdict, failed, skipped
from headwater.checks.host import check_host
from headwater.place import BROKER_VARIABLE, LAKE_VARIABLE, data_folder, read_record


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
    """Everything that can be looked at from here.

    Raises:
        ConfigurationError: the record of the data folder cannot be read.
    """
    folder = data_folder(data, environment)
    record = read_record(folder)
    findings = check_host(folder)
    url = broker or environment.get(BROKER_VARIABLE) or (record.broker if record else None)
    if url is None:
        findings.append(skipped("broker", f"no --broker was given, and {folder} holds no stack"))
    else:
        login = BrokerLogin(url=url, username=username, password_file=password_file, ca_file=ca_file)
        findings += check_broker(login)
    if not (lake or environment.get(LAKE_VARIABLE) or record):
        findings.append(skipped("store", f"no --lake was given, and {folder} holds no stack"))
    elif extras.missing("gateway"):
        findings.append(skipped("store", "not looked at; for it run: pip install 'headwater[gateway]'"))
    else:
        findings += _store(lake, data, environment)
    return findings


def _store(lake: str | None, data: str | None, environment: Mapping[str, str]) -> list[Finding]:
    from headwater.checks.store import REMEDY, check_store
    from headwater.lake_access import find_store

    try:
        return check_store(find_store(lake, data, environment).settings)
    except ConfigurationError as error:
        return [failed("store.open", str(error), REMEDY)]


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """The worst of them."""
    for worst in (Verdict.FAILED, Verdict.WARNING):
        if any(finding.verdict is worst for finding in findings):
            return worst
    return Verdict.OK

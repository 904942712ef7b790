"""Whether there are credentials for a bucket, found out at the rim and at once.

Without keys obstore and delta-rs ask the metadata service of EC2 for the role of the machine. Where there is none, that
ends after retries in a message about an address that nobody configured.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from contract.errors import ConfigurationError
from lake.store import StoreSettings

METADATA_TIMEOUT_S = 1.0
"""The service answers within milliseconds where it exists (IMDS is on the same host)."""
_METADATA = "http://169.254.169.254"
_ROLES = "/latest/meta-data/iam/security-credentials/"
_ANSWER_BYTES_MAX = 4096
_PLATFORM = (
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"),
    ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",),
    ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
)
"""Variables by which a platform (EKS, ECS, EKS Pod Identity) hands out credentials; each row is complete only whole."""


def require_credentials(settings: StoreSettings, environ: Mapping[str, str]) -> None:
    """Refuse a bucket that nothing gives credentials for: neither keys, nor the platform, nor a role of the machine.

    Asks the metadata service of EC2 (one or two requests, METADATA_TIMEOUT_S each) where nothing else is given.

    Args:
        settings: where the lake is.
        environ: the process environment, which obstore and delta-rs read too.

    Raises:
        ConfigurationError: there are none; the message says what to set.
    """
    if not settings.url.startswith("s3:"):
        return
    if settings.access_key is not None and settings.secret_key is not None:
        return
    if settings.access_key is None and settings.secret_key is None:
        anonymous = environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes")
        platform = any(all(environ.get(name) for name in names) for names in _PLATFORM)
        if anonymous or platform or _has_role(environ):
            return
    raise ConfigurationError(no_credentials(settings, environ))


def no_credentials(settings: StoreSettings, environ: Mapping[str, str] | None = None) -> str:
    """That a lake has no credentials, and what to set."""
    half = settings.access_key is not None or settings.secret_key is not None
    what = "half of the credentials is set" if half else "no credentials are set"
    text = (
        f"lake {settings.url}: {what}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for a server that is not "
        "Amazon's also AWS_ENDPOINT_URL, and AWS_REGION unless it is us-east-1"
    )
    if environ and (profile := environ.get("AWS_PROFILE")):
        export = f"aws configure export-credentials --profile '{profile}' --format env"
        text += f'; AWS_PROFILE is not read: eval "$({export})"'
    return text


def _has_role(environ: Mapping[str, str]) -> bool:
    """Whether this machine is one of EC2 and has a role."""
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    try:
        parts = urlsplit(environ.get("AWS_METADATA_ENDPOINT") or _METADATA)
        token = _ask(
            parts.hostname or "",
            parts.port,
            "PUT",
            "/latest/api/token",
            {
                "X-aws-ec2-metadata-token-ttl-seconds": "60",
            },
        )
        # Machines that only know version 1 of the service have no tokens.
        headers = {"X-aws-ec2-metadata-token": token} if token else {}
        role = _ask(parts.hostname or "", parts.port, "GET", _ROLES, headers)
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return re.fullmatch(r"[\w+=,.@-]+", role) is not None


def _ask(host: str, port: int | None, method: str, path: str, headers: Mapping[str, str]) -> str:
    """What the service says; empty where it refuses."""
    connection = http.client.HTTPConnection(host, port, timeout=METADATA_TIMEOUT_S)
    try:
        connection.request(method, path, headers=dict(headers))
        answer = connection.getresponse()
        text = answer.read(_ANSWER_BYTES_MAX).decode("ascii", "replace")
    finally:
        connection.close()
    return text.partition("\n")[0].strip() if answer.status == 200 else ""

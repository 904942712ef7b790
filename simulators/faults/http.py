"""The little of HTTP/1.1 that a proxy needs to tell one request from the next (RFC 9112): heads and body lengths.

Pure: bytes in, values out. Nothing is normalised, because signatures cover what was sent.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from contract.errors import HeadwaterError

HEAD_BYTES_MAX = 64 * 1024
HEAD_END = b"\r\n\r\n"


class NotHttp(HeadwaterError):
    """The bytes are no HTTP/1.1 message; the connection is of no further use."""


class Body(StrEnum):
    """How the end of a body is found."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until_close"


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first lines of a message."""

    first: tuple[str, str, str]
    """The three parts of the first line."""
    fields: dict[str, str]
    """Names in lower case; of a repeated field the last."""
    body: Body
    length: int = 0
    """Bytes of the body when `body` is LENGTH."""

    @property
    def last(self) -> bool:
        """Whether the connection ends after this message."""
        return self.body is Body.UNTIL_CLOSE or self.fields.get("connection", "").lower() == "close"


def request_head(data: bytes) -> Head:
    """Read the head of a request; `first` is method, target, version.

    Raises:
        NotHttp: when it is none.
    """
    first, fields = _lines(data)
    body, length = _framing(fields)
    # A request without a length has no body.
    return Head(first=first, fields=fields, body=Body.NONE if body is Body.UNTIL_CLOSE else body, length=length)


def response_head(data: bytes, method: str) -> Head:
    """Read the head of the response to a request with this method; `first` is version, status, reason.

    Raises:
        NotHttp: when it is none.
    """
    first, fields = _lines(data)
    status = first[1]
    if not (len(status) == 3 and status.isdigit()):
        raise NotHttp(f"{first!r} is no status line")
    if method == "HEAD" or status[0] == "1" or status in ("204", "304"):
        return Head(first=first, fields=fields, body=Body.NONE)
    body, length = _framing(fields)
    return Head(first=first, fields=fields, body=body, length=length)


def chunk_size(line: bytes) -> int:
    """The number in the line that begins a chunk.

    Raises:
        NotHttp: when there is none.
    """
    try:
        return int(line.split(b";", 1)[0].strip(), 16)
    except ValueError as error:
        raise NotHttp(f"{line[:100]!r} is no chunk size") from error


def _lines(data: bytes) -> tuple[tuple[str, str, str], dict[str, str]]:
    lines = data.removesuffix(HEAD_END).decode("latin-1").split("\r\n")
    parts = lines[0].split(" ", 2)
    if len(parts) == 2:
        # A status line may end after the status.
        parts.append("")
    if len(parts) != 3 or not (parts[0].startswith("HTTP/1.") or parts[2].startswith("HTTP/1.")):
        raise NotHttp(f"{lines[0][:200]!r} is no first line of HTTP/1.1")
    fields = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise NotHttp(f"{line[:200]!r} is no header field")
        fields[name.lower()] = value.strip()
    return (parts[0], parts[1], parts[2]), fields


def _framing(fields: dict[str, str]) -> tuple[Body, int]:
    if "transfer-encoding" in fields:
        if not fields["transfer-encoding"].lower().endswith("chunked"):
            raise NotHttp(f"transfer-encoding {fields['transfer-encoding']!r} has no end that can be found")
        return Body.CHUNKED, 0
    if "content-length" in fields:
        text = fields["content-length"]
        if not text.isdigit():
            raise NotHttp(f"content-length {text!r} is no number")
        return (Body.LENGTH, int(text)) if int(text) else (Body.NONE, 0)
    return Body.UNTIL_CLOSE, 0

"""The errors of Headwater: the class says what the caller can do about it.

Every message names the thing, the value and the remedy. Foreign exceptions (of pyarrow, paho, obstore, sqlite3 …) are
translated to these at the adapter that calls them.
"""

from __future__ import annotations

from enum import StrEnum


class HeadwaterError(Exception):
    """Base of every error that Headwater raises on purpose."""


class ConfigurationError(HeadwaterError):
    """A setting is wrong. Give up: only a person can mend it, and the message says how."""


class TemporaryError(HeadwaterError):
    """Something outside did not answer or refused for now. Keep what you hold and try again later."""


class Reason(StrEnum):
    """Why a payload or a batch was refused. The values are a contract: they stand in quarantine rows and metrics."""

    PAYLOAD_TOO_LARGE = "payload_too_large"
    NOT_A_PAYLOAD = "not_a_payload"
    UNKNOWN_VERSION = "unknown_version"
    BAD_ENVELOPE = "bad_envelope"
    BAD_TOPIC = "bad_topic"
    TOPIC_MISMATCH = "topic_mismatch"
    BAD_SEQ = "bad_seq"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    BODY_TOO_LARGE = "body_too_large"
    BAD_BODY = "bad_body"
    EMPTY_BATCH = "empty_batch"
    ROW_COUNT_MISMATCH = "row_count_mismatch"
    TOO_MANY_ROWS = "too_many_rows"
    TOO_MANY_FIELDS = "too_many_fields"
    BAD_FIELD_NAME = "bad_field_name"
    DUPLICATE_FIELD = "duplicate_field"
    BAD_TS = "bad_ts"
    BAD_ROW_NUMBERS = "bad_row_numbers"
    UNSUPPORTED_TYPE = "unsupported_type"
    TYPE_CONFLICT = "type_conflict"
    NAME_CONFLICT = "name_conflict"
    TABLE_TOO_WIDE = "table_too_wide"


class Rejected(HeadwaterError):
    """Input breaks the contract. Sending the same again is useless; keep the bytes aside with the reason.

    Attributes:
        reason: the machine-readable reason.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

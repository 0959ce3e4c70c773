"""How a check of a client's field ends when it fails."""

from __future__ import annotations

from runtime.errors import InvalidRequest


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raise InvalidRequest unless `ok`; a NaN fails every comparison, so it ends here too."""
    if not ok:
        name = field.rsplit(".", 1)[-1]
        raise invalid("INVALID_PARAMETER", field, f"{name} = {value} is out of range: {allowed}")


def invalid(reason: str, field: str, message: str) -> InvalidRequest:
    """The error for one field."""
    return InvalidRequest(message, reason=reason, field=field)

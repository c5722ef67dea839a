"""Which errors pass by themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stages.ground.errors import is_unreachable


class HTTPError(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} of the server")
        self.response = SimpleNamespace(status_code=status)


def caused_by(cause: Exception) -> Exception:
    error = ValueError("could not be fetched")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (caused_by(ConnectionError("name or service not known")), True),
        (caused_by(TimeoutError("timed out")), True),
        (caused_by(HTTPError(503)), True),
        (caused_by(HTTPError(429)), True),
        (caused_by(HTTPError(404)), False),
        (caused_by(HTTPError(401)), False),
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), False),
        (ValueError("no such config"), False),
    ],
)
def test_server_that_does_not_answer_passes_and_an_answer_does_not(error: Exception, passes: bool) -> None:
    assert is_unreachable(error) == passes

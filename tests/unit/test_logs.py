"""What a log line may not have, however it looks."""

import logging
from collections.abc import Iterator

import pytest

from service import logs
from service.logs import LogFormat, LogSettings

TOKEN = b"7f3a-secret"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    settings, handlers, level = logs.configured(), logging.root.handlers, logging.root.level
    yield
    logs.configure(settings)
    logging.root.handlers = handlers
    logging.root.setLevel(level)


def fail_with(resume_token: bytes) -> None:
    raise RuntimeError(f"a mistake of {len(resume_token)} bytes")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_says_where_it_failed_and_not_with_which_values(
    form: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(LogSettings("info", form))
    try:
        fail_with(TOKEN)
    except RuntimeError:
        logging.getLogger("service.test").exception("unexpected")
    told = capsys.readouterr().err
    assert "a mistake of 11 bytes" in told
    assert "in fail_with" in told
    assert TOKEN.decode() not in told

"""The log: one line a record, where it belongs, without what was said to the model."""

import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from hearthd.logs import configure_logging, describe_exception, log_incident


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    levels = {name: logging.getLogger(name).level for name in ("asyncio", "grpc")}
    yield
    root.handlers[:], root.level, logging.raiseExceptions = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def failure() -> ValueError:
    try:
        try:
            int("canary")
        except ValueError as error:
            raise ValueError("canary: my secret") from error
    except ValueError as error:
        return error


def test_a_terminal_gets_one_readable_line() -> None:
    stream = io.StringIO()
    configure_logging("info", environment={}, stream=stream)
    logging.getLogger("hearthd.server").info("listening on %s", "127.0.0.1:50051")
    logging.getLogger("hearthd.server").debug("not told")
    assert re.fullmatch(r"\d\d:\d\d:\d\d info    listening on 127\.0\.0\.1:50051\n", stream.getvalue())


def test_a_line_break_cannot_begin_another_record() -> None:
    stream = io.StringIO()
    configure_logging("info", environment={}, stream=stream)
    logging.getLogger("hearthd").warning("caller %s", "a\r\n12:00:00 info all is well")
    assert stream.getvalue().count("\n") == 1


def test_an_exception_is_told_by_type_and_place_and_never_by_its_words() -> None:
    described = describe_exception(failure())
    assert re.fullmatch(r"builtins\.ValueError at test_logs\.py:\d+ failure, from builtins\.ValueError", described)


def test_a_traceback_that_somebody_logs_has_no_words_either() -> None:
    stream = io.StringIO()
    configure_logging("debug", environment={}, stream=stream)
    try:
        raise failure()
    except ValueError:
        logging.getLogger("some.library").exception("it failed")
    assert "builtins.ValueError at" in stream.getvalue()
    assert "canary" not in stream.getvalue()
    assert "secret" not in stream.getvalue()


def test_an_incident_is_found_by_its_id(caplog: pytest.LogCaptureFixture) -> None:
    incident = log_incident("a call failed", failure())
    assert re.fullmatch(r"[0-9a-f]{12}", incident)
    assert f"a call failed, incident {incident}: builtins.ValueError at" in caplog.text
    assert "canary" not in caplog.text


def test_the_journal_gets_fields_and_no_words_of_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    journal = pytest.importorskip("systemd.journal")
    monkeypatch.setattr(journal, "send", lambda message, **fields: sent.append((message, fields)))
    with tempfile.TemporaryFile("w") as stream:
        place = os.fstat(stream.fileno())
        environment = {"JOURNAL_STREAM": f"{place.st_dev}:{place.st_ino}"}
        configure_logging("info", environment=environment, stream=stream)
        logging.getLogger("hearthd.inference.worker").error("it failed", exc_info=failure())
    ((message, fields),) = sent
    assert message.startswith("it failed (builtins.ValueError at")
    assert fields["PRIORITY"] == 3
    assert fields["SYSLOG_IDENTIFIER"] == "hearthd"
    assert fields["LOGGER"] == "hearthd.inference.worker"
    assert "canary" not in repr(sent)


def test_without_systemds_library_the_journal_still_gets_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "systemd.journal", None)
    with tempfile.TemporaryFile("w+") as stream:
        place = os.fstat(stream.fileno())
        configure_logging("info", environment={"JOURNAL_STREAM": f"{place.st_dev}:{place.st_ino}"}, stream=stream)
        logging.getLogger("hearthd").warning("hot")
        stream.seek(0)
        assert stream.read() == "<4>hot\n"


def test_an_inherited_journal_variable_is_not_believed() -> None:
    with tempfile.TemporaryFile("w+") as stream:
        configure_logging("info", environment={"JOURNAL_STREAM": "1:2"}, stream=stream)
        logging.getLogger("hearthd").info("hello")
        stream.seek(0)
        assert "info    hello" in stream.read()

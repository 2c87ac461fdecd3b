"""The command line in this process, and what it says where it refuses."""

from __future__ import annotations

import pytest

from mcsmoe.cli import main as cli


def run(*words: object) -> None:
    """Run a command of ``mcsmoe``."""
    cli.main([str(word) for word in words])


def refused(caplog: pytest.LogCaptureFixture, *words: object) -> str:
    """The one message of a command that ends with status 1."""
    caplog.clear()
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 1
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    return errors[0]

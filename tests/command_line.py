"""The command line as tests use it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qpa.cli.main import main


class Cli:
    """Run `qpa` in this process and keep what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["qpa", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err

    def refuses(self, *arguments: str | Path) -> str:
        """Check exit code 1 and a single line on stderr; return it."""
        code, out, err = self(*arguments)
        assert (code, out) == (1, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

"""The progress bar."""

import sys

import pytest

from loaders.progress import progress_bar


def test_the_bar_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("loading") as progress:
        progress(1, 2)
        progress(2, 2)
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_bytes_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("loading") as progress:
        progress(1024, 2048)
        progress(2048, 2048)
    text = capsys.readouterr().err
    assert "loading" in text
    assert "100%" in text
    assert "2.00k" in text

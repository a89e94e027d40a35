"""What compiled code prints does not reach stdout."""

from __future__ import annotations

import ctypes

import pytest

from edge_moe.native_output import native_stdout_to_stderr


def test_printf_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    print("before")
    with native_stdout_to_stderr():
        library.printf(b"from compiled code\n")
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert captured.err == "from compiled code\n"


def test_stdout_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), native_stdout_to_stderr():
        raise ValueError("no")
    print("here")
    assert capfd.readouterr().out == "here\n"

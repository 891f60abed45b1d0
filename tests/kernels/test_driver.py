"""Calls of the driver, with a library made up here."""

from types import SimpleNamespace

import pytest

from dejavu.kernels import driver


def test_an_error_is_named(monkeypatch):
    library = SimpleNamespace(cuFine=lambda *arguments: len(arguments) - 2, cuWrong=lambda: 701)
    monkeypatch.setattr(driver, "_library", lambda: library)
    driver.call("cuFine", 1, 2)
    with pytest.raises(RuntimeError, match=r"^cuWrong failed with CUDA error 701$"):
        driver.call("cuWrong")

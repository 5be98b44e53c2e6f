"""The examples in docstrings are true; each module under its one name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import moe2edge

MODULES = sorted(
    {m.name for m in pkgutil.walk_packages(moe2edge.__path__, "moe2edge.")} - {"moe2edge.__main__"}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0

"""The examples in docstrings are true; each module under its one name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import moe2edge.passes
import moe2edge.profile
import moe2edge.targets

PACKAGES = (moe2edge, moe2edge.passes, moe2edge.targets, moe2edge.profile)
MODULES = sorted(
    {m.name for p in PACKAGES for m in pkgutil.iter_modules(p.__path__, f"{p.__name__}.")}
    - {"moe2edge.__main__"}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0

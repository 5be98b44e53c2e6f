"""The examples in docstrings are true; each module under its one name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import moe2edge

MODULES = sorted(
    {m.name for m in pkgutil.walk_packages(moe2edge.__path__, "moe2edge.")} - {"moe2edge.__main__"}
)


def test_examples_in_docstrings() -> None:
    """All modules are looked at, whatever fails; pytest shows what doctest prints of it."""
    results = {name: doctest.testmod(importlib.import_module(name)) for name in MODULES}
    assert not [name for name, result in results.items() if result.failed]
    assert sum(result.attempted for result in results.values()) > 40

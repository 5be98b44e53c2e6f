"""First-class families, in the forms in which their models exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from every_family import GENERIC, check_walk_and_trimming, make_folder
from first_class import FORMS
from moe2edge.model.family import FIRST_CLASS

CASES = [(family, n, form) for family, forms in FORMS.items() for n, form in enumerate(forms)]


def test_each_first_class_family_has_its_forms() -> None:
    assert FORMS.keys() == FIRST_CLASS.keys()
    assert FORMS.keys() <= set(GENERIC)


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
@pytest.mark.parametrize(
    ("family", "form"), [(f, form) for f, _, form in CASES], ids=[f"{f}-{n}" for f, n, _ in CASES]
)
def test_a_form_is_walked_trimmed_and_read_back(
    family: str, form: dict[str, Any], tmp_path: Path
) -> None:
    check_walk_and_trimming(make_folder(tmp_path / "source", family, **form), tmp_path)

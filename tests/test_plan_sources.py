"""Models without numbers: a config alone, headers of the hub, and what is read of a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub
from moe2edge.errors import InputError
from moe2edge.storage.checkpoint import BUILTIN_FOLDER, open_checkpoint
from moe2edge.storage.hollow import open_without_numbers
from moe2edge.testing import Make

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_a_config_alone_gives_the_model_of_its_weights(
    tiny: Make, tmp_path: Path, family: str
) -> None:
    whole = tiny(family)
    shutil.copy(whole / "config.json", tmp_path / "config.json")
    for place in (tmp_path, tmp_path / "config.json"):
        with open_without_numbers(place) as (found, notes):
            assert str(found.model) == str(open_checkpoint(whole).model)
            assert notes[0].startswith("only config.json was read")
            assert found.source == str(place)


def test_numbers_of_a_folder_are_not_read(tiny: Make, tmp_path: Path) -> None:
    """A head that is stored beside the embedding counts as tied, without a look at it."""
    with open_without_numbers(tiny("qwen3_moe", tie_word_embeddings=True)) as (found, notes):
        assert found.tying == "tied"
        assert not notes
        assert found.model.rest.keys() == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve a hub with one model."""
    with FakeHub.serve(tmp_path / "on-hub", COMMIT) as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.address, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server


def test_of_weights_on_the_hub_only_headers_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(BUILTIN_FOLDER, hub.folder)
    cache = tmp_path / "cache"
    with open_without_numbers("org/some-moe", cache_dir=cache) as (found, notes):
        assert str(found.model) == str(open_checkpoint(BUILTIN_FOLDER).model)
        assert (found.source, found.revision, notes) == ("org/some-moe", COMMIT, ())
        assert (found.folder / "tokenizer.json").is_file()
    size = (hub.folder / "model.safetensors").stat().st_size
    assert 0 < hub.sent["model.safetensors"] < 150_000 < size / 100
    assert not list(cache.rglob("*.safetensors"))


def test_a_hub_that_cannot_be_reached_is_replaced_by_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    expected = "org/some-moe is not in the local cache and the hub cannot be reached"
    with (
        pytest.raises(InputError, match=expected),
        open_without_numbers("org/some-moe", cache_dir=tmp_path),
    ):
        pass

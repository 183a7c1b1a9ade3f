import shutil
from pathlib import Path

import pytest

from models.bundle import load_manifest, write_manifest
from service.catalog.catalog import Catalog, CatalogError, load_catalog
from service.errors import ModelNotFound


@pytest.fixture
def catalog(repository: Path) -> Catalog:
    return load_catalog(repository)


def test_bundles_come_by_name_then_by_version(catalog: Catalog) -> None:
    assert [tuple(bundle.manifest.key) for bundle in catalog] == [
        ("accumulator", 1),
        ("ahead", 1),
        ("bidirectional", 1),
        ("stacked", 1),
        ("text", 1),
        ("text-ahead", 1),
        ("vanilla", 1),
        ("vanilla", 2),
        ("words", 1),
    ]


def test_version_0_is_the_newest(catalog: Catalog) -> None:
    assert catalog.find("vanilla", 0).manifest.version == 2
    assert catalog.find("vanilla", 1).manifest.version == 1


def test_version_10_is_newer_than_version_9(repository: Path, tmp_path: Path) -> None:
    for version in (9, 10):
        folder = shutil.copytree(repository / "vanilla" / "1", tmp_path / "vanilla" / str(version))
        manifest = load_manifest(repository / "vanilla" / "1")
        write_manifest(folder, manifest.model_copy(update={"version": version}))
    assert load_catalog(tmp_path).find("vanilla", 0).manifest.version == 10


def test_an_unknown_name_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        catalog.find("vanila", 0)
    assert (refusal.value.field, refusal.value.metadata) == ("model", {"model": "vanila"})


def test_an_unknown_version_is_not_found_and_the_served_ones_are_named(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound, match="served: 1, 2") as refusal:
        catalog.find("vanilla", 3)
    assert refusal.value.field == "version"


def test_a_version_that_the_repository_lacks_is_not_found_and_those_there_are_named(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFound, match="there: 1, 2") as refusal:
        catalog.stored("vanilla", 3)
    assert (refusal.value.field, refusal.value.metadata) == ("version", {"model": "vanilla", "version": "3"})


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_repository_without_a_bundle_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(CatalogError, match=r"model_repository: .* holds no bundle"):
        load_catalog(tmp_path / folder)


def test_every_wrong_bundle_gets_a_sentence(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text" / "1" / "manifest.json").unlink()
    (tmp_path / "vanilla" / "2" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(CatalogError) as refusal:
        load_catalog(tmp_path)
    first, second = str(refusal.value).splitlines()
    assert "text/1: manifest.json: No such file" in first
    assert "vanilla/2: weights_sha256" in second

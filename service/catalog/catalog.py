"""Which bundles are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from models.bundle import Bundle, BundleError, load_bundle
from models.manifest import ModelKey
from service.errors import ModelNotFound


class CatalogError(ValueError):
    """The repository cannot be served; the message has a sentence for each bundle that is wrong."""


class Catalog:
    """The loaded bundles, by name and version."""

    def __init__(self, bundles: list[Bundle]) -> None:
        self._bundles = {bundle.manifest.key: bundle for bundle in bundles}

    def __iter__(self) -> Iterator[Bundle]:
        """By name, then by version."""
        return iter(self._bundles[key] for key in sorted(self._bundles))

    def find(self, name: str, version: int) -> Bundle:
        """Version 0 is the newest. Raises ModelNotFound."""
        versions = [key.version for key in self._bundles if key.name == name]
        if not versions:
            raise ModelNotFound(f"there is no model {name!r}", field="model", model=name)
        if version and version not in versions:
            served = ", ".join(map(str, sorted(versions)))
            raise ModelNotFound(
                f"model {name!r} has no version {version}; served: {served}",
                field="version",
                model=name,
                version=version,
            )
        return self._bundles[ModelKey(name, version or max(versions))]


def load_catalog(repository: Path) -> Catalog:
    """Load and verify every `<name>/<version>/` of a repository.

    Raises CatalogError if the repository has no bundle or a bundle is wrong: what is half right is not served.
    """
    folders = sorted(folder for folder in repository.glob("*/*") if folder.is_dir())
    if not folders:
        raise CatalogError(f"model_repository: {repository} holds no bundle <name>/<version>/")
    bundles, problems = [], []
    for folder in folders:
        try:
            bundles.append(load_bundle(folder))
        except BundleError as error:
            problems.append(str(error))
    if problems:
        raise CatalogError("\n".join(problems))
    return Catalog(bundles)

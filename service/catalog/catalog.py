"""Which bundles are served."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from models.bfloat16 import use_bfloat16
from models.bundle import Bundle, BundleError, load_bundle
from models.manifest import ModelKey
from service.errors import ModelNotFound

log = logging.getLogger(__name__)

VERSION = re.compile("[1-9][0-9]{0,9}")


class CatalogError(ValueError):
    """The repository cannot be served; the message has a sentence for each bundle that is wrong."""


@dataclass(frozen=True)
class Bfloat16:
    """Which models have bfloat16 weights, and how many percentage points of right predictions that may cost."""

    models: frozenset[str] = frozenset()
    max_loss_points: float = 0.0

    def load(self, folder: Path) -> Bundle:
        """Raises BundleError, also where the loss is too large or was never measured."""
        bundle = load_bundle(folder)
        if bundle.manifest.name in self.models:
            loss = use_bfloat16(bundle, self.max_loss_points)
            measured = f"{loss.points:.3f} percentage points lost over {loss.predictions:,} predictions"
            log.info("model %s/%d has bfloat16 weights: %s", *bundle.manifest.key, measured)
        return bundle


FLOAT32 = Bfloat16()


class Catalog:
    """The loaded bundles, by name and version."""

    def __init__(self, repository: Path, bundles: list[Bundle], bfloat16: Bfloat16 = FLOAT32) -> None:
        self._repository = repository
        self._bfloat16 = bfloat16
        self._bundles = {bundle.manifest.key: bundle for bundle in bundles}

    def __iter__(self) -> Iterator[Bundle]:
        """By name, then by version."""
        return iter(self._bundles[key] for key in sorted(self._bundles))

    def __contains__(self, model: object) -> bool:
        """Whether the model of that key is served."""
        return model in self._bundles

    def add(self, bundle: Bundle) -> None:
        """Serve it from now on."""
        self._bundles[bundle.manifest.key] = bundle

    def remove(self, model: ModelKey) -> Bundle:
        """Serve it no more."""
        return self._bundles.pop(model)

    def folder(self, model: ModelKey) -> Path:
        """Where the bundle of a model is, or would be."""
        return self._repository / model.name / str(model.version)

    def load(self, model: ModelKey) -> Bundle:
        """Its bundle in the repository, not yet served. Raises BundleError."""
        return self._bfloat16.load(self.folder(model))

    def stored(self, name: str, version: int) -> ModelKey:
        """A model in the repository, served or not; version 0 is the newest. Raises ModelNotFound."""
        found = [key for folder in _folders(self._repository) if (key := _key_of(folder)) and key.name == name]
        fitting = [key for key in found if version in (0, key.version)]
        if not fitting:
            if not found:
                raise ModelNotFound(f"the repository has no model {name!r}", field="model", model=name)
            there = ", ".join(str(key.version) for key in sorted(found))
            raise ModelNotFound(
                f"the repository has no version {version} of model {name!r}; there: {there}",
                field="version",
                model=name,
                version=version,
            )
        return max(fitting)

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


def load_catalog(repository: Path, only: Collection[ModelKey] | None = None, bfloat16: Bfloat16 = FLOAT32) -> Catalog:
    """Load and verify every `<name>/<version>/` of a repository, or those models only.

    Raises CatalogError if the repository has no bundle, lacks a model that shall be bfloat16, or a bundle is wrong:
    what is half right is not served.
    """
    folders = _folders(repository)
    if not folders and only is None:
        raise CatalogError(f"model_repository: {repository} holds no bundle <name>/<version>/")
    if only is not None:
        folders = [repository / name / str(version) for name, version in only]
    bundles: list[Bundle] = []
    problems: list[str] = []
    if only is None:
        unknown = sorted(bfloat16.models - {folder.parent.name for folder in folders})
        problems += [f"bfloat16_models: the repository has no model {name!r}" for name in unknown]
    for folder in folders:
        try:
            bundles.append(bfloat16.load(folder))
        except BundleError as error:
            problems.append(str(error))
    if problems:
        raise CatalogError("\n".join(problems))
    return Catalog(repository, bundles, bfloat16)


def _folders(repository: Path) -> list[Path]:
    return sorted(folder for folder in repository.glob("*/*") if folder.is_dir())


def _key_of(folder: Path) -> ModelKey | None:
    """None if the folder's name is no version."""
    return ModelKey(folder.parent.name, int(folder.name)) if VERSION.fullmatch(folder.name) else None

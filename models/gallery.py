"""docs/models.md: every bundle at a glance, as its manifest states it."""

from __future__ import annotations

import os
from pathlib import Path

from models.bundle import load_manifest
from models.manifest import Manifest, Pattern
from models.markdown import table
from models.training.card import parameters_of, streams

PATTERNS: dict[Pattern, str] = {
    "one-to-one": "One-to-one: a step in, an answer out",
    "one-to-many": "One-to-many: a beginning in, a sequence out",
    "many-to-one": "Many-to-one: a sequence in, an answer out",
    "many-to-many aligned": "Many-to-many, Tx = Ty: an answer about each step",
    "many-to-many unaligned": "Many-to-many, Tx ≠ Ty: a sequence in, one of another length out",
}


def describe_gallery(repository: Path, page: Path) -> str:
    """The page in Markdown; `page` is where it will stand, for its links."""
    folders = sorted(path.parent for path in repository.glob("*/*/manifest.json"))
    manifests = {folder: load_manifest(folder) for folder in folders}
    size_bytes = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    parts = [
        "# The models",
        "Trained networks that come with the project, by pattern. This page is written by `python -m models gallery`; "
        "each name leads to a card with data, licence, split, curves and known failures. In brackets: 95 % intervals. "
        f"{len(folders)} bundles, {size_bytes / 1e6:.1f} MB in all.",
    ]
    for pattern, title in PATTERNS.items():
        chosen = {folder: manifest for folder, manifest in manifests.items() if manifest.pattern == pattern}
        if chosen:
            parts.append(f"## {title}")
            parts += [_entry(manifest, _link(folder, page)) for folder, manifest in chosen.items()]
    return "\n\n".join(parts) + "\n"


def _link(folder: Path, page: Path) -> str:
    return os.path.relpath(folder.resolve(), page.resolve().parent)


def _entry(manifest: Manifest, link: str) -> str:
    spec, quality = manifest.network, manifest.quality
    shape = f"{spec.layers} × {spec.cell}, {spec.direction}, {spec.hidden_size} units"
    interval = " ({:.2f} to {:.2f})".format(*quality.interval_95) if quality.interval_95 else ""
    decoder = ", and a decoder with attention" if spec.decoder and spec.decoder.attention else ""
    rows = [
        ["network", f"{shape}{decoder}; {parameters_of(spec):,} parameters"],
        ["held-out data", f"**{quality.value:.2f}**{interval} {quality.metric} ({quality.items:,} items)"],
        ["streams", streams(manifest)],
        ["data", f"{manifest.data.name}; {manifest.data.licence}"],
    ]
    if manifest.repeats and len(manifest.repeats.values) > 1:
        values = ", ".join(f"{value:.2f}" for value in manifest.repeats.values)
        rows.insert(2, [manifest.repeats.over, f"mean **{manifest.repeats.mean:.2f}** ({values})"])
    return (
        f"### [{manifest.name}]({link}/README.md)\n\n{manifest.summary}\n\n{table(['', ''], rows)}\n\n"
        f"```\n{_try(manifest)}\n```\n\n![{manifest.name}: training curves]({link}/curves.png)"
    )


def _try(manifest: Manifest) -> str:
    """A line for a shell that tries it over the service."""
    if manifest.pattern == "one-to-many":
        return f"rnnserve generate {manifest.name} --seed 7"
    command = "stream" if manifest.network.streamable else "predict"
    line = f"rnnserve {command} {manifest.name} models/repository/{manifest.name}/1/{manifest.samples[0].file}"
    return f"{line} --beam 4" if manifest.network.decoder else line  # as it was measured

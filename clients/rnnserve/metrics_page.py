"""Reads a page of metrics in the Prometheus text format, of which this is all that the client needs."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_LINE = re.compile(rf'([a-zA-Z_:][\w:]*)\s*(?:\{{((?:[^"}}]|{_QUOTED})*)\}})?\s+(\S+)(?:\s+-?\d+)?\s*')
_LABEL = re.compile(rf"([a-zA-Z_]\w*)\s*=\s*({_QUOTED})")
_ESCAPED = re.compile(r'\\([\\"n])')


class Sample(NamedTuple):
    """A line of the page."""

    name: str
    labels: Mapping[str, str]
    value: float


class Page:
    """Samples, found by their names and labels."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._by_name: defaultdict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            self._by_name[sample.name].append(sample)

    def names(self) -> Iterable[str]:
        return self._by_name.keys()

    def samples(self, name: str, labels: Mapping[str, str]) -> list[Sample]:
        """Those with at least these labels."""
        return [sample for sample in self._by_name.get(name, ()) if labels.items() <= sample.labels.items()]

    def by(self, label: str, name: str, labels: Mapping[str, str]) -> dict[str, float]:
        """Their sum for each value of one more label, which is empty where they lack it."""
        sums: defaultdict[str, float] = defaultdict(float)
        for sample in self.samples(name, labels):
            sums[sample.labels.get(label, "")] += sample.value
        return dict(sums)


def parse(text: str) -> Iterator[Sample]:
    """The samples of a page. Raises ValueError for what is none."""
    for line in text.split("\n"):  # a label may hold what else `splitlines` takes for the end of one
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.lstrip())
        if found is None:
            raise ValueError(f"{line[:60]!r} is no line of a metrics page")
        name, labels, value = found.groups()
        pairs = _LABEL.findall(labels or "")
        yield Sample(name, {label: _plain(quoted[1:-1]) for label, quoted in pairs}, float(value))


def _plain(escaped: str) -> str:
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], escaped)

"""Metrics as a Prometheus has them: fetched over HTTP, parsed, a value by name and labels."""

import urllib.request
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

# None of the environment's.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Samples:
    """No sample comes twice."""

    def __init__(self, text: str) -> None:
        self.families: list[Metric] = list(text_string_to_metric_families(text))
        samples = [sample for family in self.families for sample in family.samples]
        self._values = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
        assert len(self._values) == len(samples)

    def __call__(self, name: str, /, **labels: str) -> float:
        return self._values[name, frozenset(labels.items())]

    def labels(self, name: str) -> Iterator[dict[str, str]]:
        return (dict(labels) for sample, labels in self._values if sample == name)

    def sum(self, name: str) -> float:
        return sum(value for (sample, _), value in self._values.items() if sample == name)


def fetched(url: str, accept: str = "text/plain") -> tuple[str, str]:
    """(content type, text)"""
    request = urllib.request.Request(url, headers={"Accept": accept})
    with _opener.open(request, timeout=30) as response:
        return response.headers["Content-Type"], response.read().decode()


def scraped(url: str) -> Samples:
    return Samples(fetched(url)[1])

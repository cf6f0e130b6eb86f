"""Families of Prometheus metrics as rows of a table: a name, a sentence, and how to read it.

Knows neither who has metrics nor how they are served.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeAlias, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from protos import histogram_pb2
from services.histogram import BOUNDS, Histogram

Subject = TypeVar("Subject")

# What a family has of one subject: a sample, one a value of the family's own label, or none.
Samples: TypeAlias = float | Mapping[str, float] | None


# Who has metrics, each with the values of their labels.
Subjects: TypeAlias = Sequence[tuple[tuple[str, ...], Subject]]

# Those at 1, 2 and 5 times a power of ten: Prometheus keeps a series of each bucket.
_BUCKETS = [i for i, bound in enumerate(BOUNDS) if f"{bound:.1e}"[:3] in ("1.0", "2.0", "5.0")]


@dataclass(frozen=True, slots=True)
class SampleFamily(Generic[Subject]):
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    help: str
    read: Callable[[Subject], Samples]
    label: str = ""

    def metric(self, labels: tuple[str, ...], subjects: Subjects[Subject]) -> Metric:
        names = (*labels, self.label) if self.label else labels
        metric = self.kind(self.name, self.help, labels=names)
        for values, subject in subjects:
            read = self.read(subject)
            if isinstance(read, Mapping):
                for key, number in read.items():
                    metric.add_metric((*values, key), number)
            elif read is not None:
                metric.add_metric(values, read)
        return metric


@dataclass(frozen=True, slots=True)
class HistogramFamily(Generic[Subject]):
    name: str
    help: str
    read: Callable[[Subject], histogram_pb2.Histogram]

    def metric(self, labels: tuple[str, ...], subjects: Subjects[Subject]) -> Metric:
        metric = HistogramMetricFamily(self.name, self.help, labels=labels)
        for values, subject in subjects:
            told = Histogram.from_wire(self.read(subject))
            metric.add_metric(values, _buckets(told), told.sum_seconds)
        return metric


Family: TypeAlias = SampleFamily[Subject] | HistogramFamily[Subject]


def gauge(
    name: str, help: str, read: Callable[[Subject], Samples], label: str = ""
) -> Family[Subject]:
    return SampleFamily(GaugeMetricFamily, name, help, read, label)


def counter(
    name: str, help: str, read: Callable[[Subject], Samples], label: str = ""
) -> Family[Subject]:
    return SampleFamily(CounterMetricFamily, name, help, read, label)


def histogram(
    name: str, help: str, read: Callable[[Subject], histogram_pb2.Histogram]
) -> Family[Subject]:
    return HistogramFamily(name, help, read)


def families(
    families: Sequence[Family[Subject]], labels: tuple[str, ...], subjects: Subjects[Subject]
) -> Iterator[Metric]:
    return (family.metric(labels, subjects) for family in families)


def _buckets(told: Histogram) -> Sequence[tuple[str, float]]:
    """(upper bound, how many are not above it), as Prometheus has them."""
    counted = list(accumulate(told.counts))
    return [(str(BOUNDS[i]), counted[i]) for i in _BUCKETS] + [("+Inf", counted[-1])]

"""What a server counts: for Prometheus at ``/metrics``, and as plain values for the page and notebooks at ``/stats``.

With several workers each writes its counts to files in the folder that ``PROMETHEUS_MULTIPROC_DIR`` names, and whoever
is asked adds those of all up. The client library looks for the variable when it is imported.
"""

import math
import os
from collections.abc import Iterable
from typing import Any

import prometheus_client as prometheus
from prometheus_client import multiprocess

from companion.serve.batching import BatchReport

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST

SIZES = [2**power for power in range(13)]
SECONDS = [base * 10.0**power for power in range(-4, 2) for base in (1, 2, 5)]

CAUSES = {
    400: "bad_item",
    401: "token",
    408: "slow_body",
    413: "too_large",
    415: "unsupported_type",
    422: "bad_form",
    499: "hung_up",
    500: "model_failed",
    503: "queue_full",
    504: "deadline",
}
"""Status → why a request had no answer, where whoever refused it does not say it more exactly."""


class Counted:
    """The metrics of a process, for all its models."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        every: Any = {"registry": self.registry, "namespace": "companion"}
        model = ["model"]
        self.requests = prometheus.Counter("requests", "Requests, by status.", ["model", "status"], **every)
        self.rejected = prometheus.Counter("rejected", "Requests without answer.", ["model", "cause"], **every)
        self.connections = prometheus.Counter(
            "cut_connections", "Connections that the server closed, by cause.", ["cause"], **every
        )
        self.batch = prometheus.Histogram("batch_size", "Items in a call of the model.", model, buckets=SIZES, **every)
        self.waited = prometheus.Histogram(
            "queue_seconds", "Waiting of an item, since it was read.", model, buckets=SECONDS, **every
        )
        self.model = prometheus.Histogram("model_seconds", "A call of the model.", model, buckets=SECONDS, **every)
        self.latency = prometheus.Histogram(
            "answer_seconds", "From the queueing of an item to its answer.", model, buckets=SECONDS, **every
        )
        self.failed = prometheus.Counter("failed_items", "Items that had no answer.", model, **every)
        self.reloads = prometheus.Counter("reloads", "Reloads of a model's file.", ["model", "outcome"], **every)
        self.depth = prometheus.Gauge(
            "queue_items", "Items that wait for the model.", model, multiprocess_mode="livesum", **every
        )
        self.ready = prometheus.Gauge("ready_workers", "Processes that answer.", multiprocess_mode="livesum", **every)

    def all_workers(self) -> prometheus.CollectorRegistry:
        """This process's metrics, or the sums of all workers' if there are several."""
        if FOLDER not in os.environ:
            return self.registry
        registry = prometheus.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return registry

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return prometheus.generate_latest(self.all_workers())

    def stats(self) -> dict[str, Any]:
        """Plain values, of all workers: what was counted since the start. The difference of two is what came between.

        Returns:
            ``workers``; ``cut_connections`` by cause; and for each of the ``models`` ``requests`` by status,
            ``rejected`` by cause, ``reloads`` by outcome, ``failed_items``, ``queue_items`` (now), and the histograms
            ``batch_size``, ``queue_seconds``, ``model_seconds`` and ``answer_seconds``, each with ``count``, ``sum``
            and ``buckets`` [[upper bound, how many above the bound before], …]; the last has None for no bound.
        """
        models: dict[str, dict[str, Any]] = {}
        found: dict[str, Any] = {"workers": 0, "cut_connections": {}, "models": models}
        for metric in self.all_workers().collect():
            name = metric.name.removeprefix("companion_")
            for sample in metric.samples:
                labels, value = sample.labels, _plain(sample.value)
                if name == "ready_workers":
                    found["workers"] = value
                elif name == "cut_connections" and sample.name.endswith("_total"):
                    found[name][labels["cause"]] = value
                elif "model" in labels and not sample.name.endswith("_created"):
                    _put(models.setdefault(labels["model"], {}), name, metric.type, sample.name, labels, value)
        for each in models.values():
            for histogram in each.values():
                if isinstance(histogram, dict) and "buckets" in histogram:
                    histogram["buckets"] = _apart(histogram["buckets"])
        return found


def _put(model: dict[str, Any], name: str, kind: str, sample: str, labels: dict[str, str], value: float) -> None:
    by = next((labels[key] for key in ("status", "cause", "outcome") if key in labels), None)
    if by is not None:
        model.setdefault(name, {})[by] = value
    elif kind != "histogram":
        model[name] = value
    elif sample.endswith("_bucket"):
        model.setdefault(name, {}).setdefault("buckets", []).append((float(labels["le"]), value))
    else:
        model.setdefault(name, {})[sample.rpartition("_")[2]] = value


def _apart(cumulative: Iterable[tuple[float, float]]) -> list[list[float | None]]:
    apart: list[list[float | None]] = []
    before = 0.0
    for bound, count in sorted(cumulative):
        apart.append([None if math.isinf(bound) else bound, count - before])
        before = count
    return apart


def _plain(value: float) -> float:
    return int(value) if value.is_integer() else value


def forget(process: int, folder: str) -> None:
    """A worker that is gone has no queue any more; what it counted stays."""
    multiprocess.mark_process_dead(process, folder)


class ModelCounts:
    """The metrics of one model, looked up once."""

    def __init__(self, counted: Counted, model: str) -> None:
        self._requests: dict[int, Any] = {}
        self._rejected: dict[str, Any] = {}
        self._counted, self._name = counted, model
        self._batch, self._waited = counted.batch.labels(model), counted.waited.labels(model)
        self._model, self._latency = counted.model.labels(model), counted.latency.labels(model)
        self._failed, self.depth = counted.failed.labels(model), counted.depth.labels(model)

    def request(self, status: int, cause: str | None = None) -> None:
        """A request ended, with this status and, if it had no answer, for this cause."""
        if (counter := self._requests.get(status)) is None:
            counter = self._requests[status] = self._counted.requests.labels(self._name, status)
        counter.inc()
        if status != 200:
            cause = cause or CAUSES[status]
            if (counter := self._rejected.get(cause)) is None:
                counter = self._rejected[cause] = self._counted.rejected.labels(self._name, cause)
            counter.inc()

    def batch(self, report: BatchReport) -> None:
        self._batch.observe(report.size)
        self._model.observe(report.seconds)
        if report.failed:
            self._failed.inc(report.failed)
        for waited in report.waited:
            self._waited.observe(waited)
            self._latency.observe(waited + report.seconds)

    def reload(self, outcome: str) -> None:
        """``done`` or ``failed``."""
        self._counted.reloads.labels(self._name, outcome).inc()

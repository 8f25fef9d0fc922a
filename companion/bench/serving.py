"""A server of images under load: one by one, in threads, and in batches by every policy; and what a simulation
foretells of it (2.3.2)."""

import io
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from companion import models
from companion.bench import servers, told
from companion.bench.runner import Bench, Cell
from companion.bench.servers import Running
from companion.bench.told import Told
from companion.metrics.results import Row, Value, summarize

NETWORK = "simple_cnn"
SIDE = 32  # pixels
IMAGES = 64
CONNECTIONS = (1, 8, 32, 128)
ROUNDS = 5
SECONDS = 3.0  # of each server in each round
PLAIN = ("blank", "synchronous", "threads")
POLICIES = (("idle", 2), ("hold", 2), ("hold", 100), ("fixed", 2), ("fixed", 10), ("fixed", 100))  # and the wait in ms

TOLD = "what the simulation is told"


def pictures(number: int = IMAGES, side: int = SIDE) -> list[bytes]:
    """PNG files of random pixels."""
    from PIL import Image

    files = []
    for pixels in np.random.default_rng(0).integers(0, 256, (number, side, side, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


@dataclass(frozen=True)
class _Seen:
    """A server under load, once. Seconds; the last three are processor time for each request."""

    throughput: float
    p50: float
    p99: float
    failures: int
    batch: float
    """Mean size; not a number if it makes none."""
    cpu: float
    loop: float
    generator: float


def _put(server: Running, requests: Sequence[Any], connections: int, *, batches: bool) -> _Seen:
    from companion.serve.load import load

    def counters() -> np.ndarray:
        sizes = [server.metric("batch_size_sum"), server.metric("batch_size_count")] if batches else [math.nan] * 2
        return np.array([*sizes, server.cpu(), server.loop(), time.process_time()])

    before = counters()
    found = load(server.url, requests, concurrency=connections, seconds=SECONDS)
    items, calls, *spent = (counters() - before).tolist()
    each = [seconds / max(1, len(found.latencies)) for seconds in spent]
    failures = sum(found.failures.values())
    batch = items / calls if calls else math.nan
    return _Seen(found.throughput, found.latency(50), found.latency(99), failures, batch, *each)


def _row(name: str, connections: int, seen: Sequence[_Seen]) -> Row:
    values: dict[str, Value] = {
        "requests per second": summarize([each.throughput for each in seen], "1/s"),
        "p50": summarize([1e3 * each.p50 for each in seen], "ms"),
        "p99": summarize([1e3 * each.p99 for each in seen], "ms"),
        "wrong or missing": sum(each.failures for each in seen),
    }
    for column, value in (("CPU ms per request", _middle(seen, "cpu", 1e3)), ("mean batch", _middle(seen, "batch"))):
        if not math.isnan(value):
            values[column] = round(value, 3)
    return Row({"server": name, "connections": connections}, values)


def _middle(seen: Sequence[_Seen], name: str, scale: float = 1.0) -> float:
    return scale * median(getattr(each, name) for each in seen)


def _foretold(known: Told, row: Row, policy: str, wait: float, connections: int) -> Row:
    """The row, with what the simulation says, and by how many per cent that is off what was seen."""
    found = known.simulate(clients=connections, policy=policy, max_wait_ms=wait, seconds=SECONDS)
    flat = row.flat()
    values: dict[str, Value] = {}
    for name, value in (("requests per second", found.throughput), ("p50", 1e3 * found.latency())):
        values[f"foretold {name}"] = round(value, 2)
        values[f"{name} off by %"] = round(100 * (value / float(flat[name]) - 1), 1)
    values["foretold mean batch"] = round(float(found.batch_sizes.mean()), 2)
    return replace(row, values=row.values | values)


def _told_row(known: Told, connections: int) -> Row:
    times = {"http": known.http, "away": known.away, "generator": known.generator, "wake": known.wake}
    values: dict[str, Value] = {f"{name} in ms": round(1e3 * value, 4) for name, value in times.items()}
    values |= {"shared": round(known.shared, 2)}
    values |= {f"call of {size} in ms": round(1e3 * seconds, 3) for size, seconds in known.costs.items()}
    return Row({"server": TOLD, "connections": connections}, values)


def _measure(connections: int) -> list[Row]:
    from companion.serve.load import Request, alone

    images = pictures()
    anything = [Request(image, "image/png") for image in images]
    policies = {f"batches, {policy}, {wait} ms": (policy, wait) for policy, wait in POLICIES}
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / f"{NETWORK}.safetensors"
        models.save(models.create(NETWORK, seed=0), model)
        starts = {"plain": servers.plain(model)}
        for name, (policy, wait) in policies.items():
            starts[name] = servers.batching(model, "--policy", policy, "--max-wait-ms", str(wait))
        there = stack.enter_context(servers.together(starts))
        plain = there.pop("plain")
        there = {name: plain.at(name) for name in PLAIN} | there
        checked = alone(there["synchronous"].url, anything)

        def put(name: str, connections: int) -> _Seen:
            requests = anything if name == "blank" else checked
            return _put(there[name], requests, connections, batches=name in policies)

        for name in there:
            put(name, connections)  # so that all are warm
        first = next(iter(policies))
        seen: dict[str, list[_Seen]] = {name: [] for name in there}
        apart, nothing, costs = [], [], []
        for _ in range(ROUNDS):
            for name in there:
                seen[name].append(put(name, connections))
            # What the simulation is told comes from runs of their own.
            apart.append(put(first, connections))
            nothing.append(put("blank", 1))
            costs.append(
                told.call_costs(there[first], lambda size: told.form(images[:size]), SECONDS / len(told.SIZES))
            )
        rows = {name: _row(name, connections, each) for name, each in seen.items()}
        if math.isnan(apart[0].cpu):  # not Linux
            return list(rows.values())
        known = Told(
            {size: median(each[size] for each in costs) for size in told.SIZES},
            http=_middle(apart, "loop"),
            away=max(0.0, median(1 / each.throughput - each.cpu - each.generator for each in nothing)),
            generator=_middle(apart, "generator"),
            wake=median(told.hand_over() for _ in range(ROUNDS)),
            shared=told.shared(servers.classifier(model), images[:16]),
        )
    for name, (policy, wait) in policies.items():
        rows[name] = _foretold(known, rows[name], policy, wait, connections)
    return [*rows.values(), _told_row(known, connections)]


def _cells() -> Iterator[Cell]:
    torch.set_num_threads(1)
    for connections in CONNECTIONS:
        yield Cell(f"{connections} connections", partial(_measure, connections))


BENCH = Bench(
    "serving",
    "simple_cnn behind HTTP, images of 32×32, one thread: requests a second and latencies by connections, for one call "
    "an image, for batches by every policy, and as a simulation foretells them.",
    _cells,
    settings={"threads": 1, "seed": 0, "seconds": SECONDS, "rounds": ROUNDS, "pixels a side": SIDE, "images": IMAGES},
    packages=("torch", "uvicorn", "httptools", "uvloop"),
)

"""The Pareto front against its definition."""

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import CompanionError
from companion.metrics.results import Measured, Row
from companion.metrics.trade_offs import pareto_front

NETWORKS = [
    {"name": "small", "accuracy": 90, "latency": 1.0, "bytes": 100},
    {"name": "large", "accuracy": 95, "latency": 9.0, "bytes": 900},
    {"name": "worse than small", "accuracy": 89, "latency": 1.0, "bytes": 100},
    {"name": "between", "accuracy": 92, "latency": 3.0, "bytes": 400},
    {"name": "slow but tiny", "accuracy": 90, "latency": 9.5, "bytes": 10},
]


def names(points):
    return [point["name"] for point in points]


def test_by_hand():
    front = pareto_front(NETWORKS, maximize=["accuracy"], minimize=["latency"])
    assert names(front) == ["small", "large", "between"]
    front = pareto_front(NETWORKS, maximize=["accuracy"], minimize=["latency", "bytes"])
    assert names(front) == ["small", "large", "between", "slow but tiny"]
    assert names(pareto_front(NETWORKS, minimize="bytes")) == ["slow but tiny"]
    assert names(pareto_front(NETWORKS, maximize="accuracy")) == ["large"]


def test_the_points_themselves_come_back_and_equal_ones_all():
    twin = dict(NETWORKS[1])
    front = pareto_front([NETWORKS[1], *NETWORKS, twin], maximize="accuracy", minimize="latency")
    assert [point for point in front if point["name"] == "large"] == [NETWORKS[1]] * 3
    assert front[-1] is twin
    assert pareto_front([], minimize="x") == []


def test_objects_and_rows_of_records():
    @dataclass
    class Point:
        throughput: float
        energy: np.float32

    points = [Point(1, np.float32(2)), Point(2, np.float32(1)), Point(2, np.float32(3))]
    assert pareto_front(points, maximize="throughput", minimize="energy") == [points[1]]
    rows = [Row({"batch": i}, {"latency": Measured(i, i, i, 3, "ms"), "size": 10 - i}) for i in (1, 2)]
    assert len(pareto_front([row.flat() for row in rows], minimize=["latency", "size"])) == 2


def test_numbers_of_other_kinds_and_sizes():
    points = [{"x": 10**400}, {"x": 2**53}, {"x": 2**53 + 1}]
    assert pareto_front(points, maximize="x") == points[:1]
    assert pareto_front(points, minimize="x") == points[1:2]
    assert pareto_front(points[1:], maximize="x") == points[2:]
    points = [{"x": Decimal("1.5")}, {"x": Measured(1.25, 1, 2, 3, "ms")}, {"x": np.uint8(3)}]
    assert pareto_front(points, minimize="x") == points[1:2]
    assert pareto_front(points, maximize="x") == points[2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name what is to be made large (maximize=) or small (minimize=)."),
        ({"maximize": "accuracy", "minimize": ["accuracy"]}, "'accuracy' cannot be maximized and minimized at once."),
        ({"minimize": "energy"}, "point 0 has no 'energy'."),
        ({"minimize": "name"}, "'name' of point 0 is 'small', which is no number."),
    ],
)
def test_objectives_that_make_no_sense(options, message):
    with pytest.raises(CompanionError) as caught:
        pareto_front(NETWORKS, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [float("nan"), None, np.float64("nan")])
def test_a_point_without_a_number_is_refused(value):
    with pytest.raises(CompanionError, match=r"'x' of point 1 is .* which is no number"):
        pareto_front([{"x": 1}, {"x": value}], minimize="x")


# Few different values, so that ties and equal points are common.
POINTS = st.lists(st.fixed_dictionaries(dict.fromkeys("abc", st.integers(0, 5))), max_size=25)


def dominates(p, q):
    """By the definition, a to be large, b and c small."""
    no_worse = p["a"] >= q["a"] and p["b"] <= q["b"] and p["c"] <= q["c"]
    return no_worse and (p["a"] > q["a"] or p["b"] < q["b"] or p["c"] < q["c"])


def front_of(points):
    return pareto_front(points, maximize=["a"], minimize=["b", "c"])


@settings(deadline=None)  # a busy machine is no defect
@given(POINTS)
def test_nothing_in_the_front_is_dominated_and_all_else_is_by_the_front(points):
    front = front_of(points)
    for point in points:
        inside = any(point is one for one in front)
        assert inside != any(dominates(other, point) for other in front)
        assert inside != any(dominates(other, point) for other in points)
    assert front == [point for point in points if point in front]  # in their order


@settings(deadline=None)  # a busy machine is no defect
@given(POINTS, st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(points, random):
    shuffled = random.sample(points, len(points))
    assert sorted(map(id, front_of(shuffled))) == sorted(map(id, front_of(points)))


@settings(deadline=None)  # a busy machine is no defect
@given(POINTS)
def test_scales_do_not_matter(points):
    """Seconds or milliseconds, errors or logits: anything that keeps the order."""
    scaled = [{"a": p["a"] ** 3 - 7, "b": 2.0 ** p["b"], "c": -1 / (1 + p["c"])} for p in points]
    chosen = {id(p) for p in front_of(points)}
    assert [p for p, s in zip(points, scaled, strict=True) if id(p) in chosen] == front_of(points)
    assert front_of(scaled) == [s for p, s in zip(points, scaled, strict=True) if id(p) in chosen]


@settings(deadline=None)  # a busy machine is no defect
@given(POINTS)
def test_less_of_the_negative_is_more(points):
    turned = [{"a": -p["a"], "b": -p["b"], "c": p["c"]} for p in points]
    chosen = {id(p) for p in front_of(points)}
    front = pareto_front(turned, minimize=["a", "c"], maximize="b")
    assert front == [t for p, t in zip(points, turned, strict=True) if id(p) in chosen]

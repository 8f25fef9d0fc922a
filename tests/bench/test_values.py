from companion.bench.values import speed_up
from companion.metrics import Ratio


def test_a_ratio_of_times_becomes_a_speed_up_and_its_ends_change_places():
    assert speed_up(Ratio(0.5, 0.4, 0.8)) == {"speed-up": 2.0, "at least": 1.25, "at most": 2.5}
    assert speed_up(None) == {"speed-up": 1.0, "at least": 1.0, "at most": 1.0}

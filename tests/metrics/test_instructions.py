import shutil

import pytest

from companion import CompanionError, metrics


def test_bad_input_is_one_sentence(monkeypatch):
    with pytest.raises(CompanionError, match="number is 0"):
        metrics.count_instructions("pass", number=0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompanionError, match="needs Valgrind"):
        metrics.count_instructions("pass")


@pytest.mark.stress
@pytest.mark.timeout(900)  # the process that imports torch is simulated
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="Valgrind is not installed")
def test_a_loop_costs_its_instructions():
    # 1,000 turns of a Python loop, each of some tens to hundreds of instructions, and no more than that.
    assert 10_000 < metrics.count_instructions("for _ in range(1000): pass", number=10) < 1_000_000

"""What a run of prepare says took most of its time."""

import pytest

from covergenre.stages.prepare import _bottleneck


@pytest.mark.parametrize(
    ("seconds", "facts"),
    [
        ({"reading": 20, "decoding": 70, "writing": 10}, ["decoding 70%", "CPU cores"]),
        ({"reading": 70, "decoding": 20, "writing": 10}, ["reading 70%", "--download-concurrency"]),
        ({"reading": 10, "decoding": 20, "writing": 70}, ["writing 70%", "store"]),
    ],
)
def test_slowest_part_and_its_remedy_are_named(seconds: dict[str, float], facts: list[str]) -> None:
    line = _bottleneck(seconds)
    assert "\n" not in line and all(fact in line for fact in facts), line


def test_short_runs_measure_the_start_of_their_tasks() -> None:
    assert _bottleneck({}) == _bottleneck({"reading": 2.0, "decoding": 0.1}) == ""

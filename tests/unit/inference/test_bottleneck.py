"""What a run says limited its rate."""

import pytest

from covergenre.inference.bottleneck import bottleneck


@pytest.mark.parametrize(
    ("seconds", "gpus", "facts"),
    [
        # Two GPUs for 100 s each; 8 cores decoded meanwhile.
        ({"model": 138, "wait": 62, "decode": 700, "fetch": 100}, 2, ["31%", "4 more CPU cores"]),
        ({"model": 199, "wait": 1, "decode": 700}, 2, ["the model", "100%", "2 GPUs"]),
        ({"model": 100, "wait": 100, "fetch": 900, "decode": 20}, 2, ["50%", "--download-con"]),
        ({"model": 50, "wait": 50, "fetch": 90, "decode": 20}, 0, ["50%", "--download-con"]),
        ({"model": 70, "wait": 20, "fetch": 5, "decode": 25}, 0, ["model 70%", "decoding 25%"]),
        ({"model": 50, "wait": 1, "write_wait": 50, "write": 99}, 0, ["50%", "--part-rows"]),
    ],
)
def test_it_names_the_slowest_part_and_the_remedy(
    seconds: dict[str, float], gpus: int, facts: list[str]
) -> None:
    line = bottleneck(seconds, workers=gpus or 1, use_gpu=gpus > 0)
    assert "\n" not in line and all(fact in line for fact in facts), line


def test_nothing_measured_is_nothing_said() -> None:
    assert bottleneck({}, workers=1, use_gpu=False) == ""

"""What evaluate tells the user at the end."""

import numpy as np
import pytest

from covergenre.metrics import multilabel_metrics, nan_to_none
from covergenre.stages.evaluate import Evaluated

TRUTH = np.array([[1, 0, 0], [0, 1, 0]] * 20)


@pytest.mark.parametrize(
    ("scores", "no_skill"),
    [(TRUTH, False), (1 - TRUTH, True), (0 * TRUTH, True)],
    ids=["right", "wrong", "constant"],
)
def test_summary_names_the_genres_left_out_and_a_model_without_skill(
    scores: np.ndarray, no_skill: bool
) -> None:
    metrics = nan_to_none(multilabel_metrics(TRUTH, scores, ["Folk", "Jazz", "Polka"]))
    said = Evaluated("out", "test", metrics).summary()
    assert "40 albums of the test split" in said
    assert "macro over 2 of 3 genres, without Polka (no album or every album has it)" in said
    assert ("no better than chance on the test split" in said) == no_skill


def test_summary_of_a_single_album_is_singular() -> None:
    metrics = nan_to_none(multilabel_metrics(TRUTH[:1], TRUTH[:1], ["Folk", "Jazz", "Polka"]))
    said = Evaluated("out", "test", metrics).summary()
    assert "  1 album of the test split\n" in said
    assert "macro over 0 of 3 genres, without Folk, Jazz and Polka" in said
    assert "in the test split" in said

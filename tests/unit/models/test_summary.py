import pytest

from covergenre.errors import ConfigError, ModelError
from covergenre.models.summary import layer_table
from covergenre.registry import MODELS


def rows(table: str) -> list[list[str]]:
    """Cells of each layer: they are at least two spaces apart."""
    lines = table.split("\n")
    body = lines[3 : max(i for i, line in enumerate(lines) if set(line) == {"="})]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in body]


def test_vgg16_is_figure_4_of_the_paper() -> None:
    table = layer_table("vgg16", 20)
    cells = rows(table)
    assert cells[:4] == [
        ["input", "(None, 3, 224, 224)", "0", "-"],
        ["features.0 (Conv2d)", "(None, 64, 224, 224)", "1,792", "no"],
        ["features.2 (Conv2d)", "(None, 64, 224, 224)", "36,928", "no"],
        ["features.4 (MaxPool2d)", "(None, 64, 112, 112)", "0", "-"],
    ]
    assert cells[-4:] == [
        ["flat features", "(None, 25088)", "0", "-"],
        ["head.0 (Linear)", "(None, 4096)", "102,764,544", "yes"],
        ["head.2 (Linear)", "(None, 4096)", "16,781,312", "yes"],
        ["head.4 (Linear)", "(None, 20)", "81,940", "yes"],
    ]
    convolutions = [row for row in cells if "Conv2d" in row[0]]
    assert [row[3] for row in convolutions] == ["no"] * 8 + ["yes"] * 5
    assert table.split("\n")[-3:] == [
        "Total params: 134,342,484",
        "Trainable params: 131,426,836",
        "Non-trainable (frozen) params: 2,915,648",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_rows_add_up_to_the_totals(name: str) -> None:
    table = layer_table(name, 3, "1")
    cells = rows(table)
    counts = dict.fromkeys(("yes", "no", "-"), 0)
    for _, _, count, answer in cells:
        counts[answer] += int(count.replace(",", ""))
    assert counts["-"] == 0
    assert table.split("\n")[-3:] == [
        f"Total params: {counts['yes'] + counts['no']:,}",
        f"Trainable params: {counts['yes']:,}",
        f"Non-trainable (frozen) params: {counts['no']:,}",
    ]
    assert len({row[0] for row in cells}) == len(cells)
    assert cells[-1][1] == "(None, 3)"


def test_layers_are_in_order_of_execution() -> None:
    names = [row[0] for row in rows(layer_table("resnet18", 3))]
    assert names[:4] == ["input", "conv1 (Conv2d)", "bn1 (BatchNorm2d)", "maxpool (MaxPool2d)"]
    assert names[-2:] == ["flat features", "head (Linear)"]
    assert "head.3 (BatchDropout)" in [row[0] for row in rows(layer_table("baseline", 3))]


def test_columns_are_aligned() -> None:
    lines = layer_table("tiny", 3).split("\n")
    start = lines[1].index("Output shape")
    assert all(line[start] == "(" for line in lines[3:-4])
    assert len({len(line) for line in lines if set(line) == {"="}}) == 1


def test_side_and_freezing_are_settings() -> None:
    table = layer_table("vgg16", 20, "none", side=64)
    assert ["features.30 (MaxPool2d)", "(None, 512, 2, 2)", "0", "-"] in rows(table)
    assert table.endswith("Non-trainable (frozen) params: 0")


def test_invalid_arguments_are_errors() -> None:
    with pytest.raises(ConfigError) as caught:
        layer_table("baseline", 3, side=32)
    assert caught.value.code == "side_too_small" and "32" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        layer_table("vgg16", 3, "14")
    assert caught.value.code == "freeze"
    with pytest.raises(ModelError, match="'vgg'"):
        layer_table("vgg", 3)

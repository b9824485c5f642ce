"""quote: a sample is scored here; the estimates follow from its rate."""

from pathlib import Path
from typing import Any

import pytest

from covergenre.cluster.prices import MachineGroup, read_machine_groups, read_prices
from covergenre.config import QuoteConfig
from covergenre.errors import ConfigError, StorageError
from covergenre.stages import quote as stage
from covergenre.stages.quote import Measured, SampleReader, _estimates, quote

ROOT = Path(__file__).parents[3]
PRICES = """
machines:
  big: {on_demand: 2.0, spot: 0.5, covers_per_second: {tiny: 50}}
  small: {on_demand: 0.25}
storage: {get_per_1000: 0.4, put_per_1000: 5, gb_month: 23}
"""
MEASURED = Measured(512, 10.0, 5.0, "bottleneck: none", 1000.0, 1.0)


@pytest.fixture
def prices(tmp_path: Path) -> str:
    (tmp_path / "prices.yaml").write_text(PRICES)
    return str(tmp_path / "prices.yaml")


def config(**settings: Any) -> QuoteConfig:
    return QuoteConfig(**({"model": "m", "catalog": "c"} | settings))


def test_sample_of_a_catalog_is_scored_and_priced(
    untrained_model: str, synthetic_catalog: Path, prices: str, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    found = quote(
        config(
            model=untrained_model,
            catalog=str(synthetic_catalog),
            prices=prices,
            machine="small",
            sample_rows=20,
            batch_size=8,
            within="1m",
        )
    )
    assert found.rows == 150 and found.measured.rows == 24
    assert found.measured.covers_per_second > 0 and found.measured.bottleneck
    (own,) = found.estimates
    assert own.on_demand == pytest.approx(0.25 * (own.seconds or 0) / 3600)
    assert "150 rows" in found.summary() and "x this machine" in found.summary()
    assert sorted(tmp_path.iterdir()) == before


def test_sample_is_spread_over_the_catalog(synthetic_catalog: Path) -> None:
    reader = SampleReader(stage._reader(config(catalog=str(synthetic_catalog))), 50, 10)
    (sample,) = reader.parts()
    assert reader.rows == 150
    assert sample["row"].to_pylist() == list(range(50))
    ids = sample["album_id"].to_pylist()
    assert len(set(ids)) == 50 and ids == sorted(ids)
    assert ids[0] < "synthetic-00050" or ids[-1] >= "synthetic-00100"


def test_estimates_scale_with_machines_and_leave_out_what_was_not_measured(prices: str) -> None:
    groups = [MachineGroup("big", 4, True), MachineGroup("small", 2, False)]
    settings = config(within="1h")
    found = _estimates(settings, read_prices(prices), groups, 720_000, "tiny", MEASURED)
    own, big, small = found
    assert own.albums_per_hour == 36_000 and own.on_demand is None
    assert own.seconds == pytest.approx(72_005)
    assert big.albums_per_hour == 4 * 180_000
    assert big.seconds == pytest.approx(3605)
    assert big.on_demand == pytest.approx(4 * 2.0 * 3605 / 3600)
    assert big.spot == pytest.approx(4 * 0.5 * 3605 / 3600)
    assert big.needed == 5  # four are 5 s late
    assert small.albums_per_hour is None and small.count == 2
    (measured, *_) = _estimates(
        config(machine="small"), read_prices(prices), groups, 720_000, "other", MEASURED
    )
    assert measured.on_demand == pytest.approx(0.25 * 72_005 / 3600)


def test_machines_of_the_cluster_files() -> None:
    groups = read_machine_groups(str(ROOT / "cluster.yaml"))
    assert groups == [MachineGroup("g6.2xlarge", 8, True), MachineGroup("c6i.4xlarge", 16, False)]
    assert {group.type for group in groups} <= read_prices(None).machines.keys()
    local = read_machine_groups(str(ROOT / "clusters/on-premises.yaml"))
    assert local == [MachineGroup("local", 3, False)]


@pytest.mark.parametrize(
    ("text", "code", "fact"),
    [
        ("machines: [", "not_yaml", "prices.yaml"),
        (PRICES.replace("2.0", "much"), "invalid", "machines.big.on_demand"),
        (PRICES.replace("spot", "spott"), "invalid", "machines.big.spott"),
        ("machines: {}", "invalid", "storage"),
    ],
)
def test_invalid_prices_are_one_line(text: str, code: str, fact: str, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        quote(config(prices=str(tmp_path / "prices.yaml")))
    assert caught.value.code == code and fact in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "code", "fact"),
    [
        ({"machine": "smal"}, "no_price", "small"),
        ({"cluster": "prices.yaml"}, "no_cluster_file", "provider.type"),
        ({"within": "8"}, "invalid", "8h"),
        ({"within": "0h"}, "invalid", "8h"),
    ],
)
def test_mistakes_name_the_flag_or_the_file(
    settings: dict[str, str], code: str, fact: str, prices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(prices).parent)
    with pytest.raises(ConfigError) as caught:
        quote(config(prices=prices, **settings))
    assert caught.value.code == code and fact in str(caught.value)


def test_missing_files_are_not_found(prices: str, tmp_path: Path) -> None:
    for settings in ({"prices": "none.yaml"}, {"prices": prices, "cluster": "none.yaml"}):
        with pytest.raises(StorageError) as caught:
            quote(config(**settings))
        assert caught.value.code == "not_found"

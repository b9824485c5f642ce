"""quote: estimate time and cost of scoring a catalog, by scoring a sample of it on this machine.

The sample is blocks of consecutive rows, spread at random over the catalog, because covers in
Parquet files are read a row group at a time. It is scored as `score` does without Ray, into a
temporary directory. The rate is measured once the covers that were loaded while the model started
have been scored.
"""

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covergenre import schema
from covergenre.cluster.prices import (
    MachineGroup,
    Prices,
    check_machine_type,
    read_machine_groups,
    read_prices,
)
from covergenre.cluster.workers import available_cores
from covergenre.config import QuoteConfig, duration_seconds
from covergenre.data import dataset
from covergenre.data.catalog import CatalogReader
from covergenre.data.covers import DatasetReader, Source
from covergenre.data.http_proxies import check_proxies
from covergenre.data.plan import ROWS, RowReader, write_plan
from covergenre.formatting import plural
from covergenre.inference import local_scoring, outcomes
from covergenre.inference.batches import Seconds, add_seconds
from covergenre.inference.bottleneck import bottleneck
from covergenre.inference.parts import default_part_rows, pending_ranges
from covergenre.io import storage
from covergenre.models.bundle import Bundle, check_weights, device_of, read_bundle
from covergenre.progress import Progress

_COLUMNS = (*ROWS.names, "title", "artist", schema.ID)


@dataclass(frozen=True)
class Measured:
    """The sample, scored."""

    rows: int
    covers_per_second: float
    start_seconds: float
    """Until the first batch was scored."""
    bottleneck: str
    label_bytes: float
    """Per row."""
    gets_per_row: float
    """GET requests to S3 for covers. Those in Parquet files need fewer and are not counted."""


@dataclass(frozen=True)
class Estimate:
    """For a group of machines. None: not measured, or no price."""

    machine: str
    count: int
    albums_per_hour: float | None = None
    seconds: float | None = None
    on_demand: float | None = None
    spot: float | None = None
    needed: int | None = None
    """Machines for the time that was asked for."""


@dataclass(frozen=True)
class Quote:
    """The estimates for a catalog."""

    catalog: str
    rows: int
    model: str
    measured: Measured
    estimates: list[Estimate]
    requests: float
    """US dollars: reading covers and writing labels on S3."""
    month: float
    """US dollars: storing the labels on S3 for a month."""
    within: str | None

    def summary(self) -> str:
        """The text that the command prints."""
        measured = self.measured
        head = ("machine", "machines", "albums/hour", "time", "on demand", "spot")
        table = [head, *map(_cells, self.estimates)]
        widths = [max(len(row[at]) for row in table) for at in range(len(head))]
        lines = [
            f"quote for {self.rows:,} rows of {self.catalog} with {self.model}",
            f"  measured here ({plural(available_cores(), 'core')}): {measured.rows:,} rows,"
            f" {measured.covers_per_second:,.1f} covers/s after a start of"
            f" {measured.start_seconds:.0f} s; {measured.bottleneck}",
            *("  " + "  ".join(map(_aligned, row, widths)).rstrip() for row in table),
            f"  on S3: ${self.requests:,.2f} for requests, ${self.month:,.2f} a month for labels",
        ]
        if self.within is not None:
            lines += [
                f"  within {self.within}: {e.needed:,} x {e.machine}"
                for e in self.estimates
                if e.needed is not None
            ]
        if any(e.albums_per_hour is None for e in self.estimates):
            lines.append(
                "  not measured: run quote on such a machine and add its covers/s to the table of"
                " prices (--prices)"
            )
        return "\n".join(lines)


def _cells(estimate: Estimate) -> tuple[str, ...]:
    rate = estimate.albums_per_hour
    return (
        estimate.machine,
        f"{estimate.count:,}",
        "not measured" if rate is None else f"{rate:,.0f}",
        "-" if estimate.seconds is None else _duration(estimate.seconds),
        *("-" if cost is None else f"${cost:,.2f}" for cost in (estimate.on_demand, estimate.spot)),
    )


def _aligned(cell: str, width: int) -> str:
    return cell.ljust(width) if cell[:1].isalpha() else cell.rjust(width)


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def quote(config: QuoteConfig, *, verbose: bool = False) -> Quote:
    """Estimate time and cost. Raises UserError for an invalid setting or input."""
    prices = read_prices(config.prices)
    groups = read_machine_groups(storage.absolute(config.cluster)) if config.cluster else []
    if config.machine is not None:
        check_machine_type(config.machine, prices)
    bundle = read_bundle(config.model)
    check_weights(bundle)
    with tempfile.TemporaryDirectory() as folder:
        sample = SampleReader(_reader(config), config.sample_rows, config.batch_size)
        measured = _measure(config, bundle, sample, Path(folder))
    rows = sample.rows
    parts = -(-rows // default_part_rows(rows))
    return Quote(
        config.catalog,
        rows,
        bundle.model,
        measured,
        _estimates(config, prices, groups, rows, bundle.model, measured),
        rows * measured.gets_per_row / 1000 * prices.storage.get_per_1000
        + 2 * parts / 1000 * prices.storage.put_per_1000,
        rows * measured.label_bytes / 1e9 * prices.storage.gb_month,
        config.within,
    )


def _reader(config: QuoteConfig) -> RowReader:
    uri = storage.absolute(config.catalog)
    if dataset.is_dataset(uri):
        return DatasetReader(dataset.read_manifest(uri), schema.SPLITS, _COLUMNS)
    return CatalogReader(uri, config, _COLUMNS)


class SampleReader:
    """Random blocks of another reader's rows; see plan.RowReader. Its memory does not grow with the
    rows."""

    def __init__(self, reader: RowReader, rows: int, block: int) -> None:
        """rows: of the sample. block: consecutive rows of it."""
        self._reader = reader
        self._blocks, self._block = -(-rows // block), block
        self.rows = 0
        """Of the other reader, once all have been read."""
        self.key: dict[str, Any] = {}
        self.identity: str | None = "sample"

    def parts(self) -> Iterator[pa.Table]:
        """The sample as one table."""
        random = np.random.default_rng(0)
        kept: list[tuple[float, int, pa.Table]] = []
        with Progress("catalog", None, "rows") as progress:
            for part in self._reader.parts():
                starts = range(0, part.num_rows, self._block)
                keys = random.random(len(starts))
                # The blocks with the smallest keys of all.
                for at in np.argsort(keys)[: self._blocks].tolist():
                    block = part.slice(starts[at], self._block)
                    kept.append((float(keys[at]), self.rows + starts[at], block))
                kept = sorted(kept, key=lambda block: block[0])[: self._blocks]
                self.rows += part.num_rows
                progress.advance(part.num_rows)
        tables = [block for _, _, block in sorted(kept, key=lambda block: block[1])]
        table = pa.concat_tables(tables, promote_options="permissive")
        at = table.column_names.index("row")
        yield table.set_column(at, "row", pa.array(np.arange(table.num_rows)))

    def source(self) -> Source:
        """That of the other reader."""
        return self._reader.source()

    def summary(self) -> dict[str, Any]:
        """Empty."""
        return {}


def _measure(config: QuoteConfig, bundle: Bundle, sample: SampleReader, folder: Path) -> Measured:
    plan = write_plan(str(folder / "plan"), sample).with_settings(config)
    check_proxies(plan.web_schemes)
    device = device_of(bundle, config.device)
    covers = plan.read(0, plan.rows)["cover"].drop_null().to_pylist()
    (folder / "labels").mkdir()
    began = time.monotonic()
    first: float | None = None
    times: list[tuple[float, int]] = []
    seconds: Seconds = {}
    size = rows = 0
    reports = local_scoring.score_parts_locally(
        plan,
        pending_ranges(plan.rows, config.batch_size, np.empty(0, np.int64)),
        bundle,
        partial(_write, folder / "labels", bundle),
        batch_size=config.batch_size,
        device=device,
    )
    with Progress("quote", plan.rows, "covers") as progress:
        for report in reports:
            now = time.monotonic()
            first = first if first is not None else now
            rows += report.rows
            times.append((now, rows))
            progress.advance(report.rows)
            add_seconds(seconds, report.seconds)
            size += sum(counts["bytes"] for _, counts in report.parts)
    use_gpu = local_scoring.uses_gpu(device)
    return Measured(
        rows,
        _rate(times, began),
        (first or began) - began,
        bottleneck(seconds, workers=1, use_gpu=use_gpu),
        size / rows,
        sum(bool(re.match("s3[an]?://", cover, re.IGNORECASE)) for cover in covers) / rows,
    )


def _rate(times: list[tuple[float, int]], began: float) -> float:
    """Rows per second, once a third is done: the first were loaded while the model started."""
    total = times[-1][1]
    start = next(at for at, (_, rows) in enumerate(times) if rows >= total / 3)
    (first, before), (last, rows) = times[start], times[-1]
    if rows == before:  # too few reports
        return rows / (last - began)
    return (rows - before) / (last - first)


def _write(
    folder: Path, bundle: Bundle, part: int, rows: pa.Table, scores: NDArray[np.float32]
) -> dict[str, int]:
    data = dataset.to_parquet(outcomes.labels(rows, scores, bundle))
    storage.put(str(folder / f"{part}.parquet"), data)
    return {"bytes": data.size}


def _estimates(
    config: QuoteConfig,
    prices: Prices,
    groups: list[MachineGroup],
    rows: int,
    model: str,
    measured: Measured,
) -> list[Estimate]:
    """This machine first, then the groups of the cluster file."""
    here_type = config.machine
    rates = {
        name: machine.covers_per_second.get(model) for name, machine in prices.machines.items()
    }
    if here_type is not None:
        rates[here_type] = measured.covers_per_second
    limit = None if config.within is None else duration_seconds(config.within)

    def estimate(name: str, count: int, kind: str | None, rate: float | None) -> Estimate:
        if not rate or not count:
            return Estimate(name, count)
        start = measured.start_seconds
        seconds = rows / rate / count + start
        price = prices.machines.get(kind or "")
        hours = seconds / 3600 * count
        needed = None
        if limit is not None and limit > start:
            needed = int(np.ceil(rows / rate / (limit - start)))
        return Estimate(
            name,
            count,
            3600 * rate * count,
            seconds,
            None if price is None or price.on_demand is None else price.on_demand * hours,
            None if price is None or price.spot is None else price.spot * hours,
            needed,
        )

    own = estimate("this machine", 1, here_type, measured.covers_per_second)
    return [own, *(estimate(g.type, g.count, g.type, rates.get(g.type)) for g in groups)]

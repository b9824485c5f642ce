"""All decisions about a dataset that need no cover: its plan, genres, splits and shards."""

import hashlib
import json
import logging
from dataclasses import dataclass

from covergenre.config import PrepareConfig
from covergenre.data import shards
from covergenre.data.catalog import CatalogReader
from covergenre.data.genre_map import load_genre_map
from covergenre.data.genres import Selection, name_warnings, select
from covergenre.data.plan import Plan, open_plan
from covergenre.data.shards import Assignment, PlanCounts
from covergenre.data.splits import SplitAssigner
from covergenre.errors import ConfigError
from covergenre.io import storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetPlan:
    """All decisions about a dataset that need no cover."""

    plan: Plan
    selection: Selection
    assignment: Assignment


@dataclass(frozen=True)
class PrepareInputs:
    """The catalog, not read yet, and the genre map."""

    reader: CatalogReader
    genre_map: dict[str, str | None]

    def identity(self, catalog_identity: str) -> dict[str, str]:
        """For the run record."""
        identity = {"catalog": catalog_identity}
        if self.genre_map:
            text = json.dumps(self.genre_map)
            identity["genre_map"] = hashlib.sha256(text.encode()).hexdigest()
        return identity


def read_inputs(config: PrepareConfig) -> PrepareInputs:
    """Find the files of the catalog, and read the genre map."""
    genre_map = load_genre_map(storage.absolute(config.genre_map)) if config.genre_map else {}
    return PrepareInputs(CatalogReader(config.catalog, config), genre_map)


def plan_dataset(
    folder: str, config: PrepareConfig, inputs: PrepareInputs, *, reuse: bool
) -> DatasetPlan:
    """Read the catalog, select genres, assign splits, and cut each split into shards.

    Memory does not grow with the catalog.

    folder: of the plan; with `reuse`, a complete plan in it is used instead of the catalog.
    """
    genre_map = inputs.genre_map
    plan = open_plan(folder, inputs.reader, reuse=reuse)
    for note in plan.summary["notes"]:
        logger.info(note)
    counts = shards.count_rows(plan, genre_map)
    if genre_map:
        unused = [name for name, rows in counts.mapped.items() if not rows]
        logger.info(
            f"genre map: {len(genre_map) - len(unused)} of {len(genre_map)} names occur in the"
            f" catalog{'; not found: ' if unused else ''}{', '.join(unused[:5])}"
            f"{', ...' if len(unused) > 5 else ''}"
        )
    selection = select(
        counts.genres,
        counts.labelled,
        top=config.top_genres,
        min_share=config.min_share,
        explicit=config.genres,
    )
    for warning in name_warnings(selection.counts):
        logger.warning(f"warning: {warning}")
    split_from = _split_source(config, counts)
    assignment = shards.assign_rows(
        plan,
        genre_map=genre_map,
        selected=selection.genres,
        require_all=config.genre_match == "all",
        splits=SplitAssigner(
            group_by=config.group_by,
            fractions=config.split_fractions,
            seed=config.split_seed,
            split_from=split_from,
        ),
        shard_rows=config.shard_rows,
    )
    if split_from == "catalog":
        logger.info("splits: the catalog's own")
    elif config.group_by != "album_id":
        logger.info(
            f"splits: by {config.group_by}; {assignment.without_group:,} rows have none and are"
            " assigned by album_id"
        )
    return DatasetPlan(plan.with_settings(config), selection, assignment)


def _split_source(config: PrepareConfig, counts: PlanCounts) -> str:
    """ "hash" or "catalog". Raises ConfigError where the settings do not fit the catalog."""
    has_own = counts.values["split"] > 0
    if has_own and config.split_from == "auto" and config.group_by != "album_id":
        raise ConfigError(
            f"--group-by {config.group_by}: the catalog has a split column; choose with"
            " --split-from hash or --split-from catalog",
            code="ambiguous_split",
        )
    if config.split_from == "catalog" or (config.split_from == "auto" and has_own):
        if not has_own:
            raise ConfigError(
                "--split-from catalog: the catalog has no splits (--split-column)",
                code="no_catalog_split",
            )
        return "catalog"
    if config.group_by != "album_id" and not counts.values[config.group_by]:
        raise ConfigError(
            f"--group-by {config.group_by}: the column has no values in the catalog"
            f" (--{config.group_by}-column)",
            code="no_group",
        )
    return "hash"

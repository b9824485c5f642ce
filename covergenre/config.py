"""Settings of the stages: one immutable pydantic model per stage.

The same class defines the command's flags and their help texts, the keys of its --config file, and
the settings that are saved with the result. Values are validated here, whatever their source.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from covergenre.config_errors import config_error
from covergenre.errors import ConfigError, did_you_mean
from covergenre.genre_text import MISSING_VALUES, clean_name
from covergenre.registry import MODELS, model_spec


def _split_commas(value: Any) -> Any:
    """Splits text like a line of CSV: a quoted name may contain a comma (`"R&B, Soul",Jazz`)."""
    if not isinstance(value, str):
        return value
    values = (part.strip() for part in next(csv.reader([value], skipinitialspace=True), []))
    return tuple(value for value in values if value)


Positive = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Column = Annotated[str, Field(pattern=r"\S")]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
PathOrUri = Annotated[
    str,
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
    Field(min_length=1),
]

# Settings that do not change the result: a run can be resumed with other values of them, such as on
# another machine.
_EXECUTION_SETTINGS = {
    *("workers", "cpus_per_worker", "device", "download_concurrency", "shared_filesystem"),
    *("checkpoint_every", "resume", "max_rejected", "contact", "cache_features"),
}
# Not part of the fingerprint: the run record has hashes of the contents of these paths.
PATH_SETTINGS = {"out", "covers", "genre_map", "weights", "cluster", "prices"}
# Catalog settings that score accepts but does not use; its help does not show them.
PREPARE_ONLY = {"genres_column", "genres_separator", "split_column", "group_column"}


class StageConfig(BaseModel):
    """Base of the settings of all stages."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # freeze=4 in Python
    )

    def __init__(self, **settings: Any) -> None:
        """Raises ConfigError for the first invalid setting."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise config_error(error, type(self), {}) from None

    shared_filesystem: bool = Field(
        False,
        description="assume that local paths are on a file system shared by all machines of the"
        " cluster",
    )

    def fingerprint(self) -> str:
        """sha256 of the settings that can change the result."""
        values = self.model_dump(mode="json", include=self.result_settings())
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def result_settings(self) -> set[str]:
        """Names of the settings that can change the result, except paths."""
        fields = type(self).model_fields
        arguments = {name for name, field in fields.items() if field.json_schema_extra}
        return set(fields) - _EXECUTION_SETTINGS - PATH_SETTINGS - arguments

    def saved(self) -> dict[str, Any]:
        """All settings as JSON values, to save with a result; secrets in URLs are redacted."""
        from covergenre.io.urls import redacted

        values = self.model_dump(mode="json")
        return {name: redacted(v) if isinstance(v, str) else v for name, v in values.items()}


def argument(help_text: str) -> Any:
    """A required setting that is a positional argument on the command line."""
    return Field(description=help_text, json_schema_extra={"argument": True})


class CatalogSettings(StageConfig):
    """Settings for reading a catalog, shared by prepare and score."""

    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "mumu"] = Field(
        "auto", description="format of the catalog; auto: detected from the file name and header"
    )
    id_column: Column = Field("album_id", description="column with the album id, text or number")
    cover_column: Column = Field("cover", description="column with the path or URL of the cover")
    image_column: Column = Field("image", description="column with the image bytes (Parquet)")
    genres_column: Column = Field("genres", description="column with the genres")
    title_column: Column = Field("title", description="column with the title")
    artist_column: Column = Field("artist", description="column with the artist")
    split_column: Column = Field(
        "split", description="column with the split (train, dev or test), for --split-from"
    )
    group_column: Column = Field("group", description="column with the group, for --group-by group")
    genres_separator: str | None = Field(
        None,
        min_length=1,
        description="separator of genres in text  [default: |, or a comma for mumu]",
    )
    missing_values: Names = Field(
        MISSING_VALUES,
        description="values that are treated as missing, comma-separated; case is ignored",
    )
    covers: PathOrUri | None = Field(
        None,
        description="base directory for relative cover paths  [default: the directory of the"
        " catalog]",
    )
    download_concurrency: Positive = Field(
        16,
        description="maximum number of parallel downloads per task (for http(s): per task and"
        " host)",
    )
    allow_private_addresses: bool = Field(
        False, description="allow http(s) URLs of covers on private networks and on this machine"
    )
    contact: str | None = Field(
        None,
        description="your URL or email address, sent in the User-Agent header when covers are"
        " downloaded; some hosts refuse anonymous clients",
    )

    @field_validator("contact")
    @classmethod
    def _check_contact(cls, contact: str | None) -> str | None:
        if contact is None:
            return None
        if not re.fullmatch(r"[ -~]+", contact) or not contact.strip():
            raise ValueError("expected a URL or email address, in printable ASCII")
        return contact.strip()

    def needed_columns(self) -> set[str]:
        """Optional columns that these settings require, such as "artist"."""
        return set()


class PrepareConfig(CatalogSettings):
    """Settings of prepare."""

    catalog: PathOrUri = argument(
        "file, directory or glob of CSV, TSV, JSON Lines or Parquet files"
    )
    out: PathOrUri = Field(
        description="output directory of the dataset: new, or that of the run to resume"
    )
    genre_map: PathOrUri | None = Field(
        None,
        description="CSV, YAML or JSON file that maps old genre names to new ones; applied before"
        " genres are selected",
    )
    top_genres: Positive = Field(20, description="keep the N most common genres")
    min_share: float = Field(
        0.01, ge=0, le=1, description="drop genres with a smaller share of the albums with genres"
    )
    genres: Names = Field(
        (),
        description="use exactly these genres, comma-separated (quote names that contain a comma)",
    )
    genre_match: Literal["any", "all"] = Field(
        "any", description="keep an album if any, or only if all, of its genres are selected"
    )
    split_from: Literal["auto", "hash", "catalog"] = Field(
        "auto",
        description="source of the split; hash: a hash of --group-by; catalog: the split column;"
        " auto: the split column if there is one, else hash",
    )
    group_by: Literal["album_id", "artist", "group"] = Field(
        "album_id", description="key of the hash: albums with the same key are in the same split"
    )
    split_fractions: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="fractions of train, dev and test"
    )
    split_seed: int = Field(0, description="seed of the hash split")
    max_side: Positive = Field(
        300, description="longest side in pixels; larger covers are re-encoded at this size"
    )
    keep_original: bool = Field(
        False, description="store all covers unchanged, without re-encoding"
    )
    shard_rows: Positive = Field(1024, description="albums per shard")
    workers: Positive | None = Field(
        None, description="number of parallel tasks  [default: the CPUs of the cluster]"
    )

    @field_validator("genres", mode="before")
    @classmethod
    def _check_genres(cls, value: Any) -> Any:
        if isinstance(value, str) and not _split_commas(value):
            raise ValueError("expected a comma-separated list")
        return value

    @field_validator("genres")
    @classmethod
    def _normalize_genres(cls, genres: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(clean_name(name) for name in genres)

    def needed_columns(self) -> set[str]:
        return {self.group_by} | ({"split"} if self.split_from == "catalog" else set())

    @field_validator("split_fractions", mode="before")
    @classmethod
    def _check_number_of_fractions(cls, value: Any) -> Any:
        values = _split_commas(value)
        if isinstance(values, list | tuple) and len(values) != 3:
            raise ValueError("expected 3 fractions: of train, dev and test")
        return values

    @field_validator("split_fractions")
    @classmethod
    def _check_sum_of_fractions(
        cls, fractions: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError("the fractions must not be negative, and must sum to 1")
        return fractions


Device = Literal["auto", "cpu", "gpu"]
_DEVICE = "device of the workers; auto: GPUs if the cluster has any, else CPUs"
_CPUS = "CPUs to reserve per worker; below 1 leaves CPUs for decoding covers"


class TrainConfig(StageConfig):
    """Settings of train. None means the default of the chosen model; see `resolved`."""

    dataset: PathOrUri = argument("dataset directory written by prepare")
    out: PathOrUri = Field(
        description="output directory of the model: new, or that of the run to --resume"
    )
    model: str = Field("vgg16", description=f"architecture: {', '.join(MODELS)}")
    weights: PathOrUri | None = Field(
        None,
        description="initial weights of the backbone: imagenet, none, or a safetensors or PyTorch"
        " file  [default: imagenet if available for the model, else none]",
    )
    allow_partial_weights: bool = Field(
        False,
        description="accept a weights file with missing tensors; those stay randomly initialized"
        " and are listed",
    )
    freeze: str | None = Field(
        None,
        description="layers to freeze: paper, none, all, or N for the first N convolutions"
        "  [default: paper for vgg16, none for others]",
    )
    batch_norm: Literal["auto", "train"] = Field(
        "auto",
        description="mode of the batch norm layers; auto: keep pretrained ones in eval mode; train:"
        " train them",
    )
    epochs: Positive | None = Field(
        None, description="number of epochs  [default: depends on the model]"
    )
    max_steps: Positive | None = Field(
        None, description="stop after this many optimizer steps, even in the middle of an epoch"
    )
    batch_size: Positive = Field(
        32, description="global batch size: albums per step, summed over all workers"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="initial learning rate of Adam  [default: depends on the model]"
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="learning-rate schedule; cosine decays to 0 over all steps"
    )
    l2: float | None = Field(
        None, ge=0, description="L2 penalty on the weights  [default: depends on the model]"
    )
    augment: Literal["none", "color", "light"] | None = Field(
        None,
        description="data augmentation; color: random brightness and saturation; light: flips and"
        " crops too  [default: depends on the model]",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="arithmetic precision of training and of later inference"
    )
    cache_features: bool = Field(
        False,
        description="compute the output of the frozen first layers once and keep it in"
        " OUT.training/features; needs --augment none",
    )
    microbatch: Positive | None = Field(
        None,
        description="maximum number of albums per forward pass of a worker; larger batches are"
        " computed in parts whose gradients are accumulated, which needs less memory"
        "  [default: the whole batch]",
    )
    workers: str | None = Field(
        None,
        description="number of worker processes, or MIN:MAX to adapt it as machines leave and join"
        " the cluster  [default: one per GPU, or one on CPU]",
    )
    cpus_per_worker: float = Field(0.5, gt=0, description=_CPUS)
    device: Device = Field("auto", description=_DEVICE)
    checkpoint_every: Positive | None = Field(
        None, description="save a checkpoint every N steps, in addition to the one after each epoch"
    )
    resume: bool = Field(False, description="resume the interrupted run in --out, if there is one")
    seed: Seed = Field(0, description="seed of initial weights, sample order and augmentation")
    shuffle_window: Positive = Field(
        8,
        description="number of shards that are shuffled together; larger values shuffle more"
        " thoroughly but need more memory",
    )

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, workers: str | None, info: ValidationInfo) -> str | None:
        if workers is None:
            return None
        match = re.fullmatch(r"([1-9][0-9]*)(?::([1-9][0-9]*))?", workers)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise ValueError("expected a number or MIN:MAX")
        batch_size = info.data.get("batch_size")  # missing if batch_size is invalid
        if batch_size is not None and int(match[1]) > batch_size:
            raise ValueError(
                f"each worker needs at least one album per step, and --batch-size is"
                f" {batch_size}; use fewer workers or a larger --batch-size"
            )
        return workers

    def worker_range(self) -> tuple[int, int] | None:
        """(min, max) number of workers; None for the default: one per GPU, or one on CPU.

        The maximum is at most --batch-size, because each worker needs an album in each step.
        """
        if self.workers is None:
            return None
        low, _, high = self.workers.partition(":")
        return int(low), min(int(high or low), self.batch_size)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during training."""
        low, high = self.worker_range() or (1, 1)
        return low < high

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: str) -> str:
        if model not in MODELS:
            raise ValueError(f"unknown model{did_you_mean(model, MODELS)}")
        return model

    @field_validator("freeze")
    @classmethod
    def _check_freeze(cls, freeze: str | None) -> str | None:
        words = ("paper", "none", "all")
        if freeze is not None and freeze not in words and not freeze.isdecimal():
            raise ValueError(f"expected paper, none, all or a number{did_you_mean(freeze, words)}")
        return freeze

    def resolved(self) -> "TrainConfig":
        """A copy with the defaults of the chosen model filled in."""
        spec = model_spec(self.model)
        given = self.model_dump(exclude_none=True)
        defaults = {
            "weights": "imagenet" if spec.imagenet else "none",
            "freeze": spec.freeze,
            "epochs": spec.epochs,
            "learning_rate": spec.learning_rate,
            "l2": spec.l2,
            "augment": spec.augment,
        }
        return TrainConfig.model_validate(defaults | given)


class InferenceSettings(StageConfig):
    """Settings of the workers that run a model, shared by evaluate and score."""

    batch_size: Positive = Field(64, description="covers per forward pass")
    workers: Positive | None = Field(
        None,
        description="number of worker processes; with a number, small jobs use Ray, too"
        "  [default: one per GPU, or one on CPU]",
    )
    cpus_per_worker: float = Field(0.5, gt=0, description=_CPUS)
    device: Device = Field("auto", description=_DEVICE)


class EvaluateConfig(InferenceSettings):
    """Settings of evaluate."""

    model: PathOrUri = argument("model directory written by train")
    dataset: PathOrUri = argument("dataset directory written by prepare")
    out: PathOrUri = Field(
        description="output directory of the metrics: new, or that of the run to resume"
    )
    split: Literal["train", "dev", "test"] = Field("test", description="split to evaluate on")


class ScoreConfig(CatalogSettings, InferenceSettings):
    """Settings of score."""

    model: PathOrUri = argument("model directory written by train")
    catalog: PathOrUri = argument(
        "catalog (as for prepare) or dataset directory written by prepare"
    )
    out: PathOrUri = Field(
        description="output directory of the labels: new, or that of the run to resume"
    )
    part_rows: Positive | None = Field(
        None,
        description="rows per output part, the unit in which labels are written  [default: 64 to"
        " 1,024, by the number of rows]",
    )
    carry: Names = Field(
        (), description="columns of the catalog to copy to the labels, comma-separated"
    )
    max_rejected: float | None = Field(
        None,
        ge=0,
        le=1,
        description="fail with exit code 3 if a larger share of the rows (without duplicates) is"
        " rejected  [default: fail if all rows are rejected, unless the only reason is that the"
        " covers are not images (not_an_image)]",
    )

    @field_validator("carry")
    @classmethod
    def _check_carry(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Column names must differ in more than case: DuckDB, Spark and Delta ignore it."""
        from covergenre.schema import LABELS

        used = {name.casefold(): name for name in LABELS.names}
        for name in names:
            if (taken := used.get(name.casefold())) is not None:
                raise ValueError(
                    f"{name!r} would be a second column {taken!r} in the labels; remove it"
                )
            used[name.casefold()] = name
        return names


class QuantizeConfig(StageConfig):
    """Settings of quantize."""

    model: PathOrUri = argument("model directory written by train")
    dataset: PathOrUri = argument("dataset directory written by prepare, with the same genres")
    out: PathOrUri = Field(description="output directory of the int8 model: new or empty")
    dev_covers: Positive = Field(300, description="covers of the dev split to calibrate with")


class QuoteConfig(CatalogSettings):
    """Settings of quote."""

    model: PathOrUri = argument("model directory written by train")
    catalog: PathOrUri = argument(
        "catalog (as for prepare) or dataset directory written by prepare"
    )
    cluster: PathOrUri | None = Field(
        None, description="Ray cluster file: also estimate for its machines"
    )
    within: str | None = Field(
        None, description="a time such as 8h or 90m: also print how many machines it takes"
    )
    machine: str | None = Field(
        None,
        min_length=1,
        description="type of this machine in the table of prices, such as g6.2xlarge",
    )
    prices: PathOrUri | None = Field(
        None, description="YAML file with prices  [default: the one that comes with covergenre]"
    )
    sample_rows: Positive = Field(1024, description="rows to score, at random from the catalog")
    batch_size: Positive = Field(64, description="covers per forward pass")
    device: Device = Field("auto", description=_DEVICE)

    @field_validator("within")
    @classmethod
    def _check_within(cls, within: str | None) -> str | None:
        if within is not None and duration_seconds(within) is None:
            raise ValueError("expected a time such as 8h, 90m or 1.5d")
        return within


def duration_seconds(text: str) -> float | None:
    """Seconds of a duration such as 8h, 90m or 1.5d; None if it is not one."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([dhm])", text.strip())
    if match is None or not float(match[1]):
        return None
    return float(match[1]) * {"d": 86400, "h": 3600, "m": 60}[match[2]]


Stage = TypeVar("Stage", bound=StageConfig)


def parse(stage: type[Stage], flags: Mapping[str, Any], file: str | None = None) -> Stage:
    """Settings from flags and a YAML file; flags override the file.

    Raises ConfigError, whose message names the flag, or the file and the line.
    """
    if file == "":
        raise ConfigError("--config: is empty; expected the path of a YAML file", code="invalid")
    values, lines = _read_file(file) if file is not None else ({}, {})
    for key in values:
        if key not in stage.model_fields:
            near = did_you_mean(key, stage.model_fields)
            raise ConfigError(
                f"{file} line {lines[key]}: unknown setting {key!r}{near}", code="unknown"
            )
    settings = stage.__new__(stage)
    try:
        # Not StageConfig.__init__: its errors contain the names of the Python API.
        BaseModel.__init__(settings, **(values | dict(flags)))
    except ValidationError as error:
        shown = {
            name: name.upper() if field.json_schema_extra else flag(name)
            for name, field in stage.model_fields.items()
        }
        in_file = {n: f"{file} line {line}: {n}" for n, line in lines.items() if n not in flags}
        raise config_error(error, stage, shown | in_file) from error
    return settings


def _read_file(file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings in a file, and the line of each."""
    from covergenre.config_file import read_settings
    from covergenre.io import storage

    return read_settings(storage.read_bytes(file), file)


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")

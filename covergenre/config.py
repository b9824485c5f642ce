"""One frozen, validated settings object a stage. Flags and YAML files are both made of these.

The same class gives the command's flags (with their help), the keys of its --config file, and
what is saved with the result. A value is checked once, here, wherever it came from.
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

from covergenre.errors import ConfigError, did_you_mean
from covergenre.genre_text import MISSING_VALUES, clean_name
from covergenre.registry import MODELS, model_spec

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Place = Annotated[
    str,
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
    Field(min_length=1),
]

# Where a stage runs and how wide. They change how fast a result comes, never the result itself,
# so that a job may be taken up again on another machine.
_HOW_FIELDS = {
    *("workers", "cpus_per_worker", "device", "download_concurrency", "shared_filesystem"),
    *("checkpoint_every", "resume", "max_rejected", "contact"),
}
# Known by what they hold, which is among the inputs of a run, and not by where it lies.
_PLACES = {"out", "covers", "genre_map", "weights"}


class StageConfig(BaseModel):
    """What every stage's settings share."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # `freeze: 4` in a file
    )

    def __init__(self, **settings: Any) -> None:
        """Raises ConfigError, in one line, for the first setting that is not valid."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise _config_error(error, type(self), {}) from None

    shared_filesystem: bool = Field(
        False, description="all machines of the cluster see the local paths that are given"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_not_blank(cls, value: Any, info: ValidationInfo) -> Any:
        """Columns and numbers of workers; other settings have limits of their own."""
        is_checked = info.field_name == "workers" or str(info.field_name).endswith("_column")
        if is_checked and isinstance(value, str) and not value.strip():
            raise ValueError("is empty")
        return value

    def fingerprint(self) -> str:
        """sha256 over all settings that can change the result.

        What goes in is known by its content, not by where it lies: see places.claim.
        """
        values = self.model_dump(mode="json", include=self.deciding())
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def deciding(self) -> set[str]:
        """Names of the settings that can change the result."""
        fields = type(self).model_fields
        arguments = {name for name, field in fields.items() if field.json_schema_extra}
        return set(fields) - _HOW_FIELDS - _PLACES - arguments

    def saved(self) -> dict[str, Any]:
        """All settings, as they are kept beside a result: without the secret of an address."""
        from covergenre.io.urls import redacted

        values = self.model_dump(mode="json")
        return {name: redacted(v) if isinstance(v, str) else v for name, v in values.items()}


def argument(help_text: str) -> Any:
    """A required setting that the command line takes by position."""
    return Field(description=help_text, json_schema_extra={"argument": True})


class CatalogSettings(StageConfig):
    """How to read a catalog; shared by prepare and score."""

    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "mumu"] = Field(
        "auto", description="format of the catalog; auto goes by the file's name"
    )
    id_column: str = Field("album_id", description="column of the album's id, text or a number")
    cover_column: str = Field("cover", description="column of the cover's path or URI")
    image_column: str = Field("image", description="column of the cover's bytes, in Parquet")
    genres_column: str = Field("genres", description="column of the genres")
    title_column: str = Field("title", description="column of the title")
    artist_column: str = Field("artist", description="column of the artist")
    split_column: str = Field("split", description="column of the catalog's own split")
    group_column: str = Field("group", description="column of what must share a split")
    genres_separator: str | None = Field(
        None,
        min_length=1,
        description="what separates genres written as text  [default: |, for mumu a comma]",
    )
    missing_values: tuple[str, ...] = Field(
        MISSING_VALUES,
        description="texts that stand for a missing value, comma-separated, in any case",
    )
    covers: Place | None = Field(
        None, description="folder that relative covers start from  [default: the catalog's]"
    )
    download_concurrency: Positive = Field(
        16, description="covers that a task downloads at a time (from each host, with http)"
    )
    allow_private_addresses: bool = Field(
        False, description="let http covers be in a private network or on this machine"
    )
    contact: str | None = Field(
        None,
        description="your URL or mail address, sent to the hosts of http covers in User-Agent (some"
        " refuse programs that do not say whose they are)",
    )

    @field_validator("contact")
    @classmethod
    def _contact_fits_a_header(cls, contact: str | None) -> str | None:
        if contact is None:
            return None
        if not re.fullmatch(r"[ -~]+", contact) or not contact.strip():
            raise ValueError("give a URL or mail address in printable ASCII, on one line")
        return contact.strip()

    def needed_columns(self) -> set[str]:
        """Optional columns of a catalog that these settings use, such as "artist"."""
        return set()

    @field_validator("missing_values", mode="before")
    @classmethod
    def _words_are_a_list(cls, value: Any) -> Any:
        return _comma_separated(value) if isinstance(value, str) else value


def _comma_separated(text: str) -> tuple[str, ...]:
    """One line of CSV, so that a name may have a comma: `"R&B, Soul",Jazz`."""
    values = (part.strip() for part in next(csv.reader([text], skipinitialspace=True), []))
    return tuple(value for value in values if value)


class PrepareConfig(CatalogSettings):
    """Settings of prepare: a catalog becomes a dataset."""

    catalog: Place = argument("CSV, TSV, JSON Lines or Parquet: a file, a folder or a glob")
    out: Place = Field(description="folder of the dataset, new or left by this same command")
    genre_map: Place | None = Field(
        None, description="file of raw genre names and their new names, applied before selection"
    )
    top_genres: Positive = Field(20, description="how many of the most common genres to keep")
    min_share: float = Field(
        0.01, ge=0, le=1, description="least share of the labelled albums a kept genre is on"
    )
    genres: tuple[str, ...] = Field(
        (),
        description="exactly these genres, comma-separated (as CSV: quote a name that has a comma)",
    )
    genre_match: Literal["any", "all"] = Field(
        "any", description="keep an album if any of its genres is selected, or only if all are"
    )
    split_from: Literal["auto", "hash", "catalog"] = Field(
        "auto", description="hash a stable key, or take the catalog's split column if it has one"
    )
    group_by: Literal["album_id", "artist", "group"] = Field(
        "album_id", description="what is hashed, so that all of it falls in one split"
    )
    split_fractions: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="shares of train, dev and test"
    )
    split_seed: int = Field(0, description="another seed is another split")
    max_side: Positive = Field(
        300, description="pixels; a larger cover is stored re-encoded at this longer side"
    )
    keep_original: bool = Field(False, description="store every cover's bytes as they are")
    shard_rows: Positive = Field(1024, description="albums in a shard")
    workers: Positive | None = Field(
        None, description="tasks at a time  [default: as many as the cluster has CPUs]"
    )

    @field_validator("genres", "split_fractions", mode="before")
    @classmethod
    def _text_is_a_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not (values := _comma_separated(value)):
            raise ValueError("names none; separate them by commas")
        return values

    @field_validator("genres")
    @classmethod
    def _genres_are_written_as_in_a_catalog(cls, genres: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(clean_name(name) for name in genres)

    def needed_columns(self) -> set[str]:
        return {self.group_by} | ({"split"} if self.split_from == "catalog" else set())

    @field_validator("split_fractions")
    @classmethod
    def _fractions_make_one(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            raise ValueError("must not be negative, and must sum to 1")
        return shares


Device = Literal["auto", "cpu", "gpu"]
_WORKERS = "processes that hold the model  [default: one for each GPU, or one CPU process]"
_DEVICE = "auto takes GPUs where the cluster has them"
_CPUS = "CPUs reserved for each worker; under 1, so that decoding has CPUs too"


class TrainConfig(StageConfig):
    """Settings of train: a dataset becomes a model. None means: as the model's defaults say."""

    dataset: Place = argument("folder that prepare made")
    out: Place = Field(description="folder of the model, new or left by this same command")
    model: str = Field("vgg16", description=f"one of: {', '.join(MODELS)}")
    weights: Place | None = Field(
        None,
        description="imagenet, none, or a safetensors or torch file of the backbone"
        "  [default: imagenet, where the model has them]",
    )
    allow_partial_weights: bool = Field(
        False, description="take a weights file that lacks some layers; says which"
    )
    freeze: str | None = Field(
        None,
        description="paper, none, all, or N: the first N convolutions"
        "  [default: paper for vgg16, none for others]",
    )
    batch_norm: Literal["auto", "train"] = Field(
        "auto", description="auto leaves pretrained batch norm in eval mode"
    )
    epochs: Positive | None = Field(None, description="passes over the training split")
    max_steps: Positive | None = Field(
        None, description="stop after so many steps in all, in the middle of an epoch if need be"
    )
    batch_size: Positive = Field(32, description="albums in a step, over all workers together")
    learning_rate: float | None = Field(None, gt=0, description="Adam's, at the start")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine lowers the learning rate to 0 over all steps"
    )
    l2: float | None = Field(None, ge=0, description="L2 penalty on weights, added to the loss")
    augment: Literal["none", "color", "light"] | None = Field(
        None,
        description="color: brightness and saturation (the baseline's); light: flip and crop too",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the arithmetic, in training and in the finished model"
    )
    workers: str | None = Field(
        None,
        description=f"{_WORKERS}; MIN:MAX goes on with fewer where machines leave, and with more"
        " where they come",
    )
    cpus_per_worker: float = Field(0.5, gt=0, description=_CPUS)
    device: Device = Field("auto", description=_DEVICE)
    checkpoint_every: Positive | None = Field(
        None, description="steps from one checkpoint to the next, beside that of each epoch's end"
    )
    resume: bool = Field(False, description="go on with the unfinished run at --out, if any")
    seed: Seed = Field(0, description="of weights, order and augmentation")
    shuffle_window: Positive = Field(
        8, description="shards whose rows are shuffled together; more mixes better, takes memory"
    )

    @field_validator("workers")
    @classmethod
    def _workers_are_a_range(cls, workers: str | None, info: ValidationInfo) -> str | None:
        low, _, high = (workers or "1").partition(":")
        if not re.fullmatch(r"[1-9][0-9]*(:[1-9][0-9]*)?", workers or "1") or (
            high and int(low) > int(high)
        ):
            raise ValueError("give a number, or MIN:MAX")
        batch_size = info.data.get("batch_size")  # missing where it is wrong itself
        if workers is not None and batch_size is not None and int(low) > batch_size:
            raise ValueError(
                f"each worker needs at least one album of each step, and --batch-size is"
                f" {batch_size}; ask for fewer workers, or raise --batch-size"
            )
        return workers

    def worker_range(self) -> tuple[int, int] | None:
        """(fewest, most) workers; None: one a GPU, or one CPU process.

        Never more than --batch-size: each needs an album of each step.
        """
        if self.workers is None:
            return None
        low, _, high = self.workers.partition(":")
        return int(low), min(int(high or low), self.batch_size)

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, model: str) -> str:
        if model not in MODELS:
            raise ValueError(f"no such model{did_you_mean(model, MODELS)}")
        return model

    @field_validator("freeze")
    @classmethod
    def _freeze_is_a_word_or_a_number(cls, freeze: str | None) -> str | None:
        words = ("paper", "none", "all")
        if freeze is not None and freeze not in words and not freeze.isdecimal():
            raise ValueError(f"no number of convolutions{did_you_mean(freeze, words)}")
        return freeze

    def resolved(self) -> "TrainConfig":
        """A copy in which every default of the model is filled in."""
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


class EvaluateConfig(StageConfig):
    """Settings of evaluate: a model is measured on a split of a dataset."""

    model: Place = argument("folder that train made")
    dataset: Place = argument("folder that prepare made")
    out: Place = Field(description="folder of the metrics, new or left by this same command")
    split: Literal["train", "dev", "test"] = Field("test", description="which split to measure")
    batch_size: Positive = Field(64, description="covers in a forward pass")
    workers: Positive | None = Field(None, description=_WORKERS)
    cpus_per_worker: float = Field(0.5, gt=0, description=_CPUS)
    device: Device = Field("auto", description=_DEVICE)


class ScoreConfig(CatalogSettings):
    """Settings of score: a model labels a catalog."""

    model: Place = argument("folder that train made")
    catalog: Place = argument("a catalog as prepare reads it, or a dataset that prepare made")
    out: Place = Field(description="folder of the labels, new or left by this same command")
    unit_rows: Positive = Field(1024, description="rows of a unit: what is committed at once")
    max_rejected: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the rows (without duplicates) that may be rejected: with more the"
        " job fails at its end, with exit code 3  [default: it fails if all are, unless each cover"
        " was read and is not an image]",
    )
    batch_size: Positive = Field(64, description="covers in a forward pass")
    workers: Positive | None = Field(None, description=_WORKERS)
    cpus_per_worker: float = Field(0.5, gt=0, description=_CPUS)
    device: Device = Field("auto", description=_DEVICE)


Stage = TypeVar("Stage", bound=StageConfig)


def parse(stage: type[Stage], flags: Mapping[str, Any], file: str | None = None) -> Stage:
    """Settings from a YAML file and from flags; a flag wins. Raises ConfigError in one line."""
    if file == "":
        raise ConfigError("--config: is empty; name a file")
    values, lines = _read_file(file) if file is not None else ({}, {})
    for key in values:
        if key not in stage.model_fields:
            near = did_you_mean(key, stage.model_fields)
            raise ConfigError(f"{file} line {lines[key]}: no setting {key!r}{near}")
    sources = {name: f"{file} line {line}: {name}" for name, line in lines.items()}
    settings = stage.__new__(stage)
    try:
        # Not through the class's own __init__, whose errors name settings as Python does.
        BaseModel.__init__(settings, **(values | dict(flags)))
    except ValidationError as error:
        by_flag = {name: _option_name(stage, name) for name in stage.model_fields}
        # A flag overrides the file, and so it is the flag that is wrong.
        in_file = {name: where for name, where in sources.items() if name not in flags}
        raise _config_error(error, stage, by_flag | in_file) from error
    return settings


def _read_file(file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's settings, and the line of each."""
    from covergenre.config_file import read_settings
    from covergenre.io import storage

    return read_settings(storage.read_bytes(file), file)


def _config_error(
    error: ValidationError, stage: type[StageConfig], shown: Mapping[str, str]
) -> ConfigError:
    """The first problem in one line. shown: what to call a setting; by default its name."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    where = shown.get(name, name)
    if first["type"] == "extra_forbidden":
        near = did_you_mean(name, stage.model_fields)
        return ConfigError(f"{stage.__name__} has no setting {name!r}{near}", code="unknown")
    if first["type"] == "missing" and first["loc"] == (name,):
        return ConfigError(f"{where} is missing", code="missing")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "too few values"
    message = message[0].lower() + message[1:]
    value = first["input"]
    if first["type"] == "literal_error" and isinstance(value, str):
        near = did_you_mean(value, options(stage, name))
        return ConfigError(f"{where}: {value!r} is no valid value{near}", code="invalid")
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return ConfigError(f"{where}: {value!r}: {message}", code="invalid")


def _option_name(stage: type[StageConfig], name: str) -> str:
    """What the command line calls a setting."""
    return name.upper() if stage.model_fields[name].json_schema_extra else flag(name)


def _options(annotation: Any) -> list[Any]:
    """The values of a Literal, inside an optional or not; empty where there is none."""
    from typing import get_args, get_origin

    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for inner in get_args(annotation) for value in _options(inner)]


def options(stage: type[StageConfig], name: str) -> list[str]:
    """What values the setting `name` can have; empty where any text or number will do."""
    return [str(value) for value in _options(stage.model_fields[name].annotation)]


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")

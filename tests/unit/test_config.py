"""Settings: their checks, their files, and which of them make another result."""

import pickle
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from covergenre import config
from covergenre.config import (
    EvaluateConfig,
    PrepareConfig,
    ScoreConfig,
    StageConfig,
    TrainConfig,
    flag,
    options,
    parse,
)
from covergenre.errors import ConfigError, StorageError
from covergenre.registry import MODELS

STAGES: tuple[type[StageConfig], ...] = (PrepareConfig, TrainConfig, EvaluateConfig, ScoreConfig)
ARGUMENTS = {
    PrepareConfig: {"catalog"},
    TrainConfig: {"dataset"},
    EvaluateConfig: {"model", "dataset"},
    ScoreConfig: {"model", "catalog"},
}
NEEDED = {stage: {**dict.fromkeys(names, "in"), "out": "out"} for stage, names in ARGUMENTS.items()}
TRAIN = {"dataset": "d", "out": "o"}
PREPARE = {"catalog": "c", "out": "o"}


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "settings.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(
    stage: type[StageConfig], flags: dict[str, Any], file: str | None = None, *parts: str
) -> str:
    """The message, one line that has all of `parts`."""
    with pytest.raises(ConfigError) as caught:
        parse(stage, flags, file)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    return text


# Values


@pytest.mark.parametrize("stage", STAGES)
def test_arguments_and_out_are_all_that_is_needed(stage: type[StageConfig]) -> None:
    settings = parse(stage, NEEDED[stage])
    required = {name for name, f in stage.model_fields.items() if f.is_required()}
    assert required == set(NEEDED[stage])
    for name in required:
        less = {key: value for key, value in NEEDED[stage].items() if key != name}
        shown = name.upper() if name in ARGUMENTS[stage] else "--out"
        assert refused(stage, less) == f"{shown} is missing"
        assert refused(stage, less | {name: ""}).startswith(f"{shown}: '': ")
    with pytest.raises(ValidationError):
        setattr(settings, "out", "elsewhere")  # noqa: B010  frozen


@pytest.mark.parametrize("stage", STAGES)
def test_paths_may_be_path_objects(stage: type[StageConfig]) -> None:
    given = {name: Path(value) for name, value in NEEDED[stage].items()}
    assert stage(**given) == stage(**NEEDED[stage])


def test_text_from_the_command_line_becomes_what_it_says() -> None:
    settings = parse(
        TrainConfig,
        {**TRAIN, "epochs": "3", "learning_rate": "1e-4", "l2": "0", "seed": "7", "freeze": "4"},
    )
    assert (settings.epochs, settings.learning_rate, settings.l2) == (3, 1e-4, 0.0)
    assert (settings.seed, settings.freeze) == (7, "4")
    prepared = parse(PrepareConfig, {**PREPARE, "split_fractions": ("0.5", "0.25", "0.25")})
    assert prepared.split_fractions == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("stage", "name", "value", "part"),
    [
        (TrainConfig, "epochs", "x", "valid integer"),
        (TrainConfig, "epochs", "1.5", "valid integer"),
        (TrainConfig, "epochs", "0", "greater than or equal to 1"),
        (TrainConfig, "epochs", "", "valid integer"),
        (TrainConfig, "max_steps", "-1", "greater than or equal to 1"),
        (TrainConfig, "batch_size", "0", "greater than or equal to 1"),
        (TrainConfig, "learning_rate", "0", "greater than 0"),
        (TrainConfig, "learning_rate", "fast", "valid number"),
        (TrainConfig, "learning_rate", "inf", "finite"),
        (TrainConfig, "learning_rate", "nan", "finite"),
        (TrainConfig, "l2", "-1e-3", "greater than or equal to 0"),
        (TrainConfig, "cpus_per_worker", "0", "greater than 0"),
        (TrainConfig, "workers", "0", "a number or MIN:MAX"),
        (TrainConfig, "workers", "3:2", "a number or MIN:MAX"),
        (TrainConfig, "workers", "1:", "a number or MIN:MAX"),
        (TrainConfig, "seed", "-1", "greater than or equal to 0"),
        (TrainConfig, "seed", str(2**63), "less than"),
        (TrainConfig, "model", "vgg61", "did you mean 'vgg16'?"),
        (TrainConfig, "model", "qqq", "valid: alexnet, baseline"),
        (TrainConfig, "freeze", "papre", "did you mean 'paper'?"),
        (TrainConfig, "freeze", "-1", "valid: all, none, paper"),
        (TrainConfig, "freeze", "1.5", "valid: all, none, paper"),
        (TrainConfig, "augment", "colour", "did you mean 'color'?"),
        (TrainConfig, "schedule", "cosin", "did you mean 'cosine'?"),
        (TrainConfig, "precision", "fp16", "did you mean 'bf16'?"),
        (TrainConfig, "device", "tpu", "did you mean 'gpu'?"),
        (PrepareConfig, "min_share", "2", "less than or equal to 1"),
        (PrepareConfig, "min_share", "nan", "finite"),
        (PrepareConfig, "genre_match", "some", "valid: all, any"),
        (PrepareConfig, "format", "xlsx", "valid: auto, csv, jsonl, mumu, parquet, tsv"),
        (PrepareConfig, "group_by", "artists", "did you mean 'artist'?"),
        (PrepareConfig, "genres_separator", "", "at least 1 character"),
        (PrepareConfig, "keep_original", "maybe", "boolean"),
        (PrepareConfig, "max_side", "1k", "valid integer"),
        (PrepareConfig, "split_fractions", ("0.5", "0.5"), "too few values"),
        (PrepareConfig, "split_fractions", (), "too few values"),
        (PrepareConfig, "split_fractions", ("0.5", "0.5", "0", "0"), "at most 3 items"),
        (PrepareConfig, "split_fractions", ("0.5", "0.5", "0.5"), "must sum to 1"),
        (PrepareConfig, "split_fractions", ("1.5", "-0.5", "0"), "must not be negative"),
        (PrepareConfig, "split_fractions", ("nan", "0.5", "0.5"), "finite"),
        (PrepareConfig, "split_fractions", ("0.5", "x", "0.5"), "valid number"),
        (EvaluateConfig, "split", "tset", "did you mean 'test'?"),
        (ScoreConfig, "part_rows", "0", "greater than or equal to 1"),
    ],
)
def test_a_mistake_names_the_flag_or_the_file(
    stage: type[StageConfig], name: str, value: object, part: str, tmp_path: Path
) -> None:
    text = refused(stage, {**NEEDED[stage], name: value}, None, part)
    assert text.startswith(f"{flag(name)}: ")
    in_yaml = list(value) if isinstance(value, tuple) else value
    file = written(tmp_path, f"{name}: {in_yaml!r}\n")
    text = refused(stage, NEEDED[stage], file, part)
    assert text.startswith(f"{file} line 1: {name}: ")
    # with both, the flag counts, and is what is named
    text = refused(stage, {**NEEDED[stage], name: value}, file, part)
    assert text.startswith(f"{flag(name)}: ")


@pytest.mark.parametrize(("workers", "size"), [("2", 1), ("3:8", 2)])
def test_more_workers_than_albums_in_a_step_are_refused(
    workers: str, size: int, tmp_path: Path
) -> None:
    part = f"--batch-size is {size}"
    text = refused(TrainConfig, {**TRAIN, "workers": workers, "batch_size": size}, None, part)
    assert text.startswith(f"--workers: '{workers}': ")
    file = written(tmp_path, f"workers: '{workers}'\nbatch_size: {size}\n")
    assert refused(TrainConfig, TRAIN, file, part).startswith(f"{file} line 1: workers: ")
    refused(TrainConfig, {**TRAIN, "batch_size": size}, written(tmp_path, "workers: '9'"), part)


def test_range_of_workers_ends_at_the_albums_in_a_step() -> None:
    settings = parse(TrainConfig, {**TRAIN, "workers": "2:8", "batch_size": 3})
    assert settings.worker_range() == (2, 3)
    assert parse(TrainConfig, {**TRAIN, "workers": "2:8"}).worker_range() == (2, 8)
    assert parse(TrainConfig, {**TRAIN, "workers": "2"}).worker_range() == (2, 2)


def test_fractions_may_be_rounded_and_may_be_nought() -> None:
    for shares in ((0.7, 0.2, 0.1), (1, 0, 0), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7)):
        parse(PrepareConfig, {**PREPARE, "split_fractions": shares})


# Files


@pytest.mark.parametrize("key", ["batch_size", "batch-size"])
def test_a_file_is_overruled_by_flags(key: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"{key}: 8\nseed: 3\ndataset: from-file\n")
    settings = parse(TrainConfig, {"out": "o", "seed": "9"}, file)
    assert (settings.batch_size, settings.seed, settings.dataset) == (8, 9, "from-file")


def test_a_flag_overrules_true(tmp_path: Path) -> None:
    file = written(tmp_path, "keep_original: true\n")
    assert parse(PrepareConfig, PREPARE, file).keep_original
    assert not parse(PrepareConfig, {**PREPARE, "keep_original": False}, file).keep_original


def test_what_yaml_makes_of_plain_words_is_understood(tmp_path: Path) -> None:
    text = (
        "learning_rate: 1e-3\n"  # text, to YAML 1.1
        "freeze: 4\n"  # a number, though the setting is text
        "weights: none\n"
        "augment: none\n"
        "epochs: null\n"
        "l2: 0\n"
        "allow-partial-weights: yes\n"
    )
    settings = parse(TrainConfig, TRAIN, written(tmp_path, text))
    assert (settings.learning_rate, settings.freeze, settings.weights) == (1e-3, "4", "none")
    assert (settings.augment, settings.epochs, settings.l2) == ("none", None, 0.0)
    assert settings.allow_partial_weights
    text = "genres: [Rock, 1980]\nsplit-fractions: [0.6, 0.2, 0.2]\n"
    prepared = parse(PrepareConfig, PREPARE, written(tmp_path, text))
    assert prepared.genres == ("Rock", "1980")
    assert prepared.split_fractions == (0.6, 0.2, 0.2)


def test_a_value_in_a_file_is_the_text_that_is_written(tmp_path: Path) -> None:
    # YAML 1.1 reads these as 128, a date, 8, true, 1.1, false and an octal number.
    text = "workers: 2:8\nout: 2020-01-01\nweights: 010\nfreeze: 4\n"
    settings = parse(TrainConfig, {"dataset": "d"}, written(tmp_path, text))
    assert (settings.workers, settings.out) == ("2:8", "2020-01-01")
    assert (settings.weights, settings.freeze) == ("010", "4")
    text = "id_column: on\ntitle_column: 1.10\ngenres: [No, 1_980, 0o7]\nkeep_original: 'no'\n"
    prepared = parse(PrepareConfig, PREPARE, written(tmp_path, text))
    assert (prepared.id_column, prepared.title_column) == ("on", "1.10")
    assert prepared.genres == ("No", "1_980", "0o7")
    assert not prepared.keep_original
    assert parse(PrepareConfig, PREPARE, written(tmp_path, "genres: No\n")).genres == ("No",)


def test_merge_keys_and_anchors_of_yaml_work_in_a_file(tmp_path: Path) -> None:
    text = "<<: {epochs: 3, batch-size: &n 8}\nbatch_size: 16\nseed: *n\n"
    settings = parse(TrainConfig, TRAIN, written(tmp_path, text))
    assert (settings.epochs, settings.batch_size, settings.seed) == (3, 16, 8)


@pytest.mark.parametrize("text", ["", "# nothing set\n", "---\n", "{}"])
def test_an_empty_file_sets_nothing(text: str, tmp_path: Path) -> None:
    assert parse(TrainConfig, TRAIN, written(tmp_path, text)) == parse(TrainConfig, TRAIN)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("epochs: 3\nbatch_size: [1\n", "not valid YAML"),
        ("epochs: 3\n\tbatch_size: 1\n", "line 2: not valid YAML: has a tab; use spaces"),
        ("epochs:\t3\n", "line 1: not valid YAML: has a tab; use spaces"),
        ("out: a: b\n", "line 1: not valid YAML: mapping values are not allowed here"),
        ("epochs: 3\n---\nepochs: 4\n", "line 2: not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        (b"epochs: \xff\xfe\n", "not valid YAML"),
        (b"\x00\x01", "not valid YAML"),
        ("seed: 2020-13-45\n", "line 1: seed: '2020-13-45': input should be a valid integer"),
        ("seed: !!binary AAAA\n", "not valid YAML"),
        ("seed: !!int x\n", "line 1: seed: 'x': input should be a valid integer"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("- epochs\n- 3\n", "expected settings as `name: value` lines"),
        ("epochs=3\n", "expected settings as `name: value` lines"),
        ("3\n", "expected settings as `name: value` lines"),
        ("false\n", "expected settings as `name: value` lines"),
        ("epoch: 3\n", "unknown setting 'epoch'; did you mean 'epochs'?"),
        ("learning-rat: 3\n", "did you mean 'learning_rate'?"),
        ("zzz: 3\n", "unknown setting 'zzz'; valid: "),
        ("1: 3\n", "unknown setting '1'"),
        (
            "batch_size: 1\n\nbatch-size: 2\n",
            "line 3: batch-size is set twice, first in line 1 as batch_size",
        ),
        ("epochs: 1\nseed: 2\nepochs: 1\n", "line 3: epochs is set twice, first in line 1"),
        ("{epochs: 1, 'epochs': 2}", "line 1: epochs is set twice"),
        ("<<: {epochs: 1, epochs: 2}\nseed: 1\n", "line 1: epochs is set twice"),
        ("<<: {epochs: 1}\n<<: {seed: 2}\n", "line 2: << is set twice"),
        ("epochs: {a: 1, a: 2}\n", "line 1: a is set twice"),
        ("epochs: [{a: 1, a: 2}]\n", "line 1: a is set twice"),
        ("seed: 1\nepochs: [[3]]\n", "line 2: epochs: expected a value or a list of values"),
        ("epochs: [3]\n", "epochs: '3': input should be a valid integer"),
        ("epochs: {a: 3}\n", "line 1: epochs: expected a value or a list of values"),
        ("epochs: true\n", "line 1: epochs: 'true': input should be a valid integer"),
        ("epochs: 1e1\n", "line 1: epochs: '1e1': input should be a valid integer"),
        ("epochs: 0x10\n", "line 1: epochs: '0x10': input should be a valid integer"),
        ("epochs: 1:30\n", "line 1: epochs: '1:30': input should be a valid integer"),
        ("learning_rate: 1:30\n", "line 1: learning_rate: '1:30': input should be a valid number"),
        ("resume: 1.0\n", "line 1: resume: '1.0': input should be a valid boolean"),
        ("workers: 1e1\n", "line 1: workers: '1e1': expected a number or MIN:MAX"),
        ("out: null\n", "out: None: "),
    ],
)
def test_a_bad_file_is_told_by_name(text: str | bytes, part: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    flags = {"dataset": "d"} if "out" in str(text) else TRAIN
    assert refused(TrainConfig, flags, file, part).startswith(file)


def test_a_setting_of_another_stage_is_told(tmp_path: Path) -> None:
    file = written(tmp_path, "top_genres: 3\n")
    assert parse(PrepareConfig, PREPARE, file).top_genres == 3
    assert refused(TrainConfig, TRAIN, file).startswith(
        f"{file} line 1: unknown setting 'top_genres'"
    )


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.yaml: no such file"):
        parse(TrainConfig, TRAIN, str(tmp_path / "none.yaml"))


# The models' defaults


@pytest.mark.parametrize(
    ("model", "expected"),
    [  # learning rate, freeze, batch, epochs, augment, l2, weights: the paper's table
        ("vgg16", (1e-3, "paper", 32, 10, "none", 0.0, "imagenet")),
        ("baseline", (1e-5, "none", 32, 20, "color", 1e-3, "none")),
        ("resnet18", (1e-4, "none", 32, 10, "light", 0.0, "imagenet")),
        ("tiny", (1e-3, "none", 32, 10, "light", 0.0, "none")),
    ],
)
def test_defaults_of_a_model(model: str, expected: tuple[object, ...]) -> None:
    s = parse(TrainConfig, {**TRAIN, "model": model}).resolved()
    found = (s.learning_rate, s.freeze, s.batch_size, s.epochs, s.augment, s.l2, s.weights)
    assert found == expected


@pytest.mark.parametrize("model", MODELS)
def test_resolved_settings_leave_nothing_open(model: str) -> None:
    settings = parse(TrainConfig, {**TRAIN, "model": model}).resolved()
    is_open = {name for name, value in settings if value is None}
    assert is_open == {"checkpoint_every", "max_steps", "workers"}
    assert settings.resolved() == settings


def test_what_is_given_is_kept() -> None:
    given: dict[str, Any] = {
        "weights": "w.safetensors",
        "freeze": "3",
        "epochs": 2,
        "learning_rate": 0.5,
        "l2": 0.25,
        "augment": "light",
        "seed": 4,
        "workers": "2",
    }
    settings = parse(TrainConfig, {**TRAIN, **given}).resolved()
    assert {name: getattr(settings, name) for name in given} == given
    # nought is a value, not an absence
    assert parse(TrainConfig, {**TRAIN, "model": "baseline", "l2": 0}).resolved().l2 == 0


def test_the_default_is_the_papers_model() -> None:
    assert parse(TrainConfig, TRAIN).model == "vgg16"


# Fingerprints

UNCHANGED = {
    "contact",
    "download_concurrency",
    "max_rejected",
    "shared_filesystem",
    "covers",
    "genre_map",
    "weights",
    "out",
    "workers",
    "cpus_per_worker",
    "device",
    "checkpoint_every",
    "resume",
}
OTHER = {
    "freeze": "3",
    "model": "tiny",
    "split_fractions": (0.5, 0.25, 0.25),
    "genres": ("Rock",),
    "min_share": 0.5,
    "max_rejected": 0.5,
    "epochs": 3,
    "max_steps": 3,
    "checkpoint_every": 3,
    "workers": 3,
    "l2": 0.125,
    "learning_rate": 0.125,
}


def another(stage: type[StageConfig], name: str) -> object:
    """A valid value of `name` that is not its default."""
    if name in ARGUMENTS[stage] or name == "out":
        return "elsewhere"
    if name in OTHER:
        return OTHER[name]
    default = stage.model_fields[name].default
    if choices := options(stage, name):
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "other"


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage in STAGES for name in stage.model_fields]
)
def test_a_fingerprint_is_of_what_makes_the_result(stage: type[StageConfig], name: str) -> None:
    base = parse(stage, NEEDED[stage])
    changed = parse(stage, {**NEEDED[stage], name: another(stage, name)})
    assert changed != base
    same = changed.fingerprint() == base.fingerprint()
    assert same == (name in UNCHANGED | ARGUMENTS[stage])


def test_a_fingerprint_is_the_same_from_flags_and_file(tmp_path: Path) -> None:
    file = written(tmp_path, "epochs: 3\nlearning_rate: 1e-4\n")
    from_file = parse(TrainConfig, TRAIN, file)
    from_flags = parse(TrainConfig, {**TRAIN, "epochs": "3", "learning_rate": "0.0001"})
    assert from_file.fingerprint() == from_flags.fingerprint()
    assert len(from_file.fingerprint()) == 64


# What the command line is made of


def test_options_are_those_of_the_literal() -> None:
    assert options(PrepareConfig, "genre_match") == ["any", "all"]
    assert options(TrainConfig, "augment") == ["none", "color", "light"]
    for name in ("epochs", "out", "keep_original", "split_fractions"):
        stage = PrepareConfig if name in PrepareConfig.model_fields else TrainConfig
        assert options(stage, name) == []


def test_flag_names() -> None:
    assert flag("batch_size") == "--batch-size"
    assert flag("out") == "--out"


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_says_what_it_is(stage: type[StageConfig]) -> None:
    for name, field in stage.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description
        if get_origin(field.annotation) is Literal:
            assert field.default in get_args(field.annotation)


def test_prepare_and_score_read_a_catalog_alike() -> None:
    shared = config.CatalogSettings.model_fields
    for name in shared:
        assert PrepareConfig.model_fields[name].default == ScoreConfig.model_fields[name].default


@pytest.mark.parametrize(
    ("text", "genres"),
    [
        ("Jazz,Rock", ("Jazz", "Rock")),
        (" Jazz , Rock,,", ("Jazz", "Rock")),
        ('"R&B, Soul",Jazz', ("R&B, Soul", "Jazz")),
        (["R&B, Soul", "Jazz"], ("R&B, Soul", "Jazz")),
    ],
)
def test_genres_are_a_list_or_a_line_of_csv(text: Any, genres: tuple[str, ...]) -> None:
    assert PrepareConfig(catalog="c", out="o", genres=text).genres == genres


def test_text_in_a_file_is_a_list_too(tmp_path: Path) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text("out: o\ngenres: Jazz, Rock\nsplit_fractions: 0.7, 0.2, 0.1\n")
    settings = parse(PrepareConfig, {"catalog": "c"}, str(file))
    assert settings.genres == ("Jazz", "Rock")
    assert settings.split_fractions == (0.7, 0.2, 0.1)
    file.write_text("out: o\ngenres: ''\n")
    with pytest.raises(ConfigError, match=r"genres: '': expected a comma"):
        parse(PrepareConfig, {"catalog": "c"}, str(file))


@pytest.mark.parametrize(
    ("settings", "code", "word"),
    [
        ({}, "missing", "catalog"),
        ({"catalog": "c", "out": "o", "shard_rows": 0}, "invalid", "shard_rows"),
        ({"catalog": "c", "out": "o", "split_fractions": (0.5, 0.5)}, "invalid", "split_fractions"),
        ({"catalog": "c", "out": "o", "format": "xls"}, "invalid", "format"),
        ({"catalog": "c", "out": "o", "shard_row": 5}, "unknown", "shard_rows"),
        ({"catalog": None, "out": "o"}, "invalid", "catalog"),
    ],
)
def test_invalid_settings_in_python_are_a_config_error_that_names_the_setting(
    settings: dict[str, Any], code: str, word: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        PrepareConfig(**settings)
    message = str(raised.value)
    assert raised.value.code == code
    assert word in message and "\n" not in message and "--" not in message


def test_settings_in_python_may_be_paths_numbers_and_lists() -> None:
    prepare = PrepareConfig(
        catalog=Path("c.csv"),
        out=Path("o"),
        covers=Path("images"),
        genres=["Pop", "Rock"],
        split_fractions=[0.6, 0.2, 0.2],
    )
    assert (prepare.catalog, prepare.out, prepare.covers) == ("c.csv", "o", "images")
    assert prepare.genres == ("Pop", "Rock")
    assert prepare.fingerprint() == pickle.loads(pickle.dumps(prepare)).fingerprint()
    train = TrainConfig(
        dataset=Path("d"), out="o", model="tiny", freeze=2, workers=1, weights=Path("w.pt")
    )
    assert (train.freeze, train.workers, train.weights) == ("2", "1", "w.pt")
    assert train.resolved().epochs == 10

"""Settings: validation, config files, defaults of models, fingerprints."""

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
    parse,
)
from covergenre.config_errors import options
from covergenre.errors import ConfigError, StorageError
from covergenre.registry import MODELS

STAGES: tuple[type[StageConfig], ...] = (PrepareConfig, TrainConfig, EvaluateConfig, ScoreConfig)
ARGUMENTS = {
    PrepareConfig: {"catalog"},
    TrainConfig: {"dataset"},
    EvaluateConfig: {"model", "dataset"},
    ScoreConfig: {"model", "catalog"},
}
REQUIRED = {
    stage: {**dict.fromkeys(names, "in"), "out": "out"} for stage, names in ARGUMENTS.items()
}
TRAIN = {"dataset": "d", "out": "o"}
PREPARE = {"catalog": "c", "out": "o"}


def config_file(folder: Path, text: str | bytes) -> str:
    path = folder / "settings.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def error_of(
    stage: type[StageConfig],
    flags: dict[str, Any],
    file: str | None = None,
    *,
    code: str = "invalid",
    fact: str = "",
) -> str:
    """The one-line message of the error of parse; it must have the code and contain the fact."""
    with pytest.raises(ConfigError) as caught:
        parse(stage, flags, file)
    message = str(caught.value)
    assert caught.value.code == code
    assert "\n" not in message and fact in message, message
    return message


# Values


@pytest.mark.parametrize("stage", STAGES)
def test_only_arguments_and_out_are_required(stage: type[StageConfig]) -> None:
    settings = parse(stage, REQUIRED[stage])
    required = {name for name, f in stage.model_fields.items() if f.is_required()}
    assert required == set(REQUIRED[stage])
    for name in required:
        less = {key: value for key, value in REQUIRED[stage].items() if key != name}
        shown = name.upper() if name in ARGUMENTS[stage] else "--out"
        assert error_of(stage, less, code="missing").startswith(shown)
        assert error_of(stage, less | {name: ""}).startswith(f"{shown}: '': ")
    with pytest.raises(ValidationError):
        setattr(settings, "out", "elsewhere")  # noqa: B010  frozen


@pytest.mark.parametrize("stage", STAGES)
def test_paths_may_be_path_objects(stage: type[StageConfig]) -> None:
    given = {name: Path(value) for name, value in REQUIRED[stage].items()}
    assert stage(**given) == stage(**REQUIRED[stage])


def test_text_from_the_command_line_is_converted() -> None:
    settings = parse(
        TrainConfig,
        {**TRAIN, "epochs": "3", "learning_rate": "1e-4", "l2": "0", "seed": "7", "freeze": "4"},
    )
    assert (settings.epochs, settings.learning_rate, settings.l2) == (3, 1e-4, 0.0)
    assert (settings.seed, settings.freeze) == (7, "4")
    prepared = parse(PrepareConfig, {**PREPARE, "split_fractions": ("0.5", "0.25", "0.25")})
    assert prepared.split_fractions == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("stage", "name", "value", "fact"),
    [
        (TrainConfig, "epochs", "x", ""),
        (TrainConfig, "epochs", "1.5", ""),
        (TrainConfig, "epochs", "0", "1"),
        (TrainConfig, "epochs", "", ""),
        (TrainConfig, "max_steps", "-1", "1"),
        (TrainConfig, "batch_size", "0", "1"),
        (TrainConfig, "learning_rate", "0", "0"),
        (TrainConfig, "learning_rate", "fast", ""),
        (TrainConfig, "learning_rate", "inf", ""),
        (TrainConfig, "learning_rate", "nan", ""),
        (TrainConfig, "l2", "-1e-3", "0"),
        (TrainConfig, "cpus_per_worker", "0", "0"),
        (TrainConfig, "workers", "0", "MIN:MAX"),
        (TrainConfig, "workers", "3:2", "MIN:MAX"),
        (TrainConfig, "workers", "1:", "MIN:MAX"),
        (TrainConfig, "seed", "-1", "0"),
        (TrainConfig, "seed", str(2**63), "9223372036854775808"),
        (TrainConfig, "model", "vgg61", "'vgg16'"),
        (TrainConfig, "model", "qqq", "alexnet, baseline"),
        (TrainConfig, "freeze", "papre", "'paper'"),
        (TrainConfig, "freeze", "-1", "all, none, paper"),
        (TrainConfig, "freeze", "1.5", "all, none, paper"),
        (TrainConfig, "augment", "colour", "'color'"),
        (TrainConfig, "schedule", "cosin", "'cosine'"),
        (TrainConfig, "precision", "fp16", "'bf16'"),
        (TrainConfig, "device", "tpu", "'gpu'"),
        (PrepareConfig, "min_share", "2", "1"),
        (PrepareConfig, "min_share", "nan", ""),
        (PrepareConfig, "genre_match", "some", "all, any"),
        (PrepareConfig, "format", "xlsx", "auto, csv, jsonl, mumu, parquet, tsv"),
        (PrepareConfig, "group_by", "artists", "'artist'"),
        (PrepareConfig, "genres_separator", "", ""),
        (PrepareConfig, "keep_original", "maybe", ""),
        (PrepareConfig, "max_side", "1k", ""),
        (PrepareConfig, "split_fractions", ("0.5", "0.5"), "3"),
        (PrepareConfig, "split_fractions", (), "3"),
        (PrepareConfig, "split_fractions", ("0.5", "0.5", "0", "0"), "3"),
        (PrepareConfig, "split_fractions", ("0.5", "0.5", "0.5"), ""),
        (PrepareConfig, "split_fractions", ("1.5", "-0.5", "0"), ""),
        (PrepareConfig, "split_fractions", ("nan", "0.5", "0.5"), ""),
        (PrepareConfig, "split_fractions", ("0.5", "x", "0.5"), ""),
        (EvaluateConfig, "split", "tset", "'test'"),
        (ScoreConfig, "part_rows", "0", "1"),
    ],
)
def test_error_of_a_value_names_the_flag_or_the_line_of_the_file(
    stage: type[StageConfig], name: str, value: object, fact: str, tmp_path: Path
) -> None:
    message = error_of(stage, {**REQUIRED[stage], name: value}, fact=fact)
    assert message.startswith(f"{flag(name)}: ")
    in_yaml = list(value) if isinstance(value, tuple) else value
    file = config_file(tmp_path, f"{name}: {in_yaml!r}\n")
    message = error_of(stage, REQUIRED[stage], file, fact=fact)
    assert message.startswith(f"{file} line 1: {name}: ")
    # A flag overrides the file, so the error names the flag.
    message = error_of(stage, {**REQUIRED[stage], name: value}, file, fact=fact)
    assert message.startswith(f"{flag(name)}: ")


@pytest.mark.parametrize(("workers", "size"), [("2", 1), ("3:8", 2)])
def test_more_workers_than_albums_per_step_are_an_error(
    workers: str, size: int, tmp_path: Path
) -> None:
    fact = f"--batch-size is {size}"
    flags = {**TRAIN, "workers": workers, "batch_size": size}
    assert error_of(TrainConfig, flags, fact=fact).startswith(f"--workers: '{workers}': ")
    file = config_file(tmp_path, f"workers: '{workers}'\nbatch_size: {size}\n")
    assert error_of(TrainConfig, TRAIN, file, fact=fact).startswith(f"{file} line 1: workers: ")
    file = config_file(tmp_path, "workers: '9'")
    error_of(TrainConfig, {**TRAIN, "batch_size": size}, file, fact=fact)


def test_maximum_number_of_workers_is_the_batch_size() -> None:
    settings = parse(TrainConfig, {**TRAIN, "workers": "2:8", "batch_size": 3})
    assert settings.worker_range() == (2, 3)
    assert parse(TrainConfig, {**TRAIN, "workers": "2:8"}).worker_range() == (2, 8)
    assert parse(TrainConfig, {**TRAIN, "workers": "2"}).worker_range() == (2, 2)


def test_split_fractions_may_be_rounded_or_zero() -> None:
    for shares in ((0.7, 0.2, 0.1), (1, 0, 0), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7)):
        parse(PrepareConfig, {**PREPARE, "split_fractions": shares})


# Files


@pytest.mark.parametrize("key", ["batch_size", "batch-size"])
def test_flags_override_the_file(key: str, tmp_path: Path) -> None:
    file = config_file(tmp_path, f"{key}: 8\nseed: 3\ndataset: from-file\n")
    settings = parse(TrainConfig, {"out": "o", "seed": "9"}, file)
    assert (settings.batch_size, settings.seed, settings.dataset) == (8, 9, "from-file")


def test_false_flag_overrides_true_in_the_file(tmp_path: Path) -> None:
    file = config_file(tmp_path, "keep_original: true\n")
    assert parse(PrepareConfig, PREPARE, file).keep_original
    assert not parse(PrepareConfig, {**PREPARE, "keep_original": False}, file).keep_original


def test_numbers_booleans_and_null_in_a_file_are_converted(tmp_path: Path) -> None:
    text = (
        "learning_rate: 1e-3\n"  # text in YAML 1.1
        "freeze: 4\n"  # a number in YAML, but the setting is text
        "weights: none\n"
        "augment: none\n"
        "epochs: null\n"
        "l2: 0\n"
        "allow-partial-weights: yes\n"
    )
    settings = parse(TrainConfig, TRAIN, config_file(tmp_path, text))
    assert (settings.learning_rate, settings.freeze, settings.weights) == (1e-3, "4", "none")
    assert (settings.augment, settings.epochs, settings.l2) == ("none", None, 0.0)
    assert settings.allow_partial_weights
    text = "genres: [Rock, 1980]\nsplit-fractions: [0.6, 0.2, 0.2]\n"
    prepared = parse(PrepareConfig, PREPARE, config_file(tmp_path, text))
    assert prepared.genres == ("Rock", "1980")
    assert prepared.split_fractions == (0.6, 0.2, 0.2)


def test_value_in_a_file_means_the_same_as_in_a_flag(tmp_path: Path) -> None:
    # YAML 1.1 would read 128, a date, 8, true, 1.1, false and an octal number.
    text = "workers: 2:8\nout: 2020-01-01\nweights: 010\nfreeze: 4\n"
    settings = parse(TrainConfig, {"dataset": "d"}, config_file(tmp_path, text))
    assert (settings.workers, settings.out) == ("2:8", "2020-01-01")
    assert (settings.weights, settings.freeze) == ("010", "4")
    text = "id_column: on\ntitle_column: 1.10\ngenres: [No, 1_980, 0o7]\nkeep_original: 'no'\n"
    prepared = parse(PrepareConfig, PREPARE, config_file(tmp_path, text))
    assert (prepared.id_column, prepared.title_column) == ("on", "1.10")
    assert prepared.genres == ("No", "1_980", "0o7")
    assert not prepared.keep_original
    assert parse(PrepareConfig, PREPARE, config_file(tmp_path, "genres: No\n")).genres == ("No",)


def test_merge_keys_and_anchors_work_in_a_file(tmp_path: Path) -> None:
    text = "<<: {epochs: 3, batch-size: &n 8}\nbatch_size: 16\nseed: *n\n"
    settings = parse(TrainConfig, TRAIN, config_file(tmp_path, text))
    assert (settings.epochs, settings.batch_size, settings.seed) == (3, 16, 8)


@pytest.mark.parametrize("text", ["", "# nothing set\n", "---\n", "{}"])
def test_empty_file_sets_nothing(text: str, tmp_path: Path) -> None:
    assert parse(TrainConfig, TRAIN, config_file(tmp_path, text)) == parse(TrainConfig, TRAIN)


@pytest.mark.parametrize(
    ("text", "code", "fact"),
    [
        ("epochs: 3\nbatch_size: [1\n", "invalid_file", ""),
        ("epochs: 3\n\tbatch_size: 1\n", "invalid_file", "line 2"),
        ("epochs:\t3\n", "invalid_file", "line 1"),
        ("out: a: b\n", "invalid_file", "line 1"),
        ("epochs: 3\n---\nepochs: 4\n", "invalid_file", "line 2"),
        ("[" * 5000, "invalid_file", ""),
        (b"epochs: \xff\xfe\n", "invalid_file", ""),
        (b"\x00\x01", "invalid_file", ""),
        ("seed: 2020-13-45\n", "invalid", "line 1: seed: '2020-13-45'"),
        ("seed: !!binary AAAA\n", "invalid_file", ""),
        ("seed: !!int x\n", "invalid", "line 1: seed: 'x'"),
        ("seed: !!python/object/apply:os.getcwd []\n", "invalid_file", ""),
        ("? [a]\n: 1\n", "invalid_file", ""),
        ("- epochs\n- 3\n", "invalid_file", "`name: value`"),
        ("epochs=3\n", "invalid_file", "`name: value`"),
        ("3\n", "invalid_file", "`name: value`"),
        ("false\n", "invalid_file", "`name: value`"),
        ("epoch: 3\n", "unknown", "'epochs'"),
        ("learning-rat: 3\n", "unknown", "'learning_rate'"),
        ("zzz: 3\n", "unknown", "'zzz'"),
        ("1: 3\n", "unknown", "'1'"),
        ("batch_size: 1\n\nbatch-size: 2\n", "duplicate", "line 3: batch-size"),
        ("epochs: 1\nseed: 2\nepochs: 1\n", "duplicate", "line 3: epochs"),
        ("{epochs: 1, 'epochs': 2}", "duplicate", "line 1: epochs"),
        ("<<: {epochs: 1, epochs: 2}\nseed: 1\n", "duplicate", "line 1: epochs"),
        ("<<: {epochs: 1}\n<<: {seed: 2}\n", "duplicate", "line 2: <<"),
        ("epochs: {a: 1, a: 2}\n", "duplicate", "line 1: a"),
        ("epochs: [{a: 1, a: 2}]\n", "duplicate", "line 1: a"),
        ("seed: 1\nepochs: [[3]]\n", "invalid", "line 2: epochs"),
        ("epochs: [3]\n", "invalid", "epochs: '3'"),
        ("epochs: {a: 3}\n", "invalid", "line 1: epochs"),
        ("epochs: true\n", "invalid", "line 1: epochs: 'true'"),
        ("epochs: 1e1\n", "invalid", "line 1: epochs: '1e1'"),
        ("epochs: 0x10\n", "invalid", "line 1: epochs: '0x10'"),
        ("epochs: 1:30\n", "invalid", "line 1: epochs: '1:30'"),
        ("learning_rate: 1:30\n", "invalid", "line 1: learning_rate: '1:30'"),
        ("resume: 1.0\n", "invalid", "line 1: resume: '1.0'"),
        ("workers: 1e1\n", "invalid", "line 1: workers: '1e1'"),
        ("out: null\n", "invalid", "out: None: "),
    ],
)
def test_error_of_a_file_names_the_file(
    text: str | bytes, code: str, fact: str, tmp_path: Path
) -> None:
    file = config_file(tmp_path, text)
    flags = {"dataset": "d"} if "out" in str(text) else TRAIN
    assert error_of(TrainConfig, flags, file, code=code, fact=fact).startswith(file)


def test_setting_of_another_stage_is_unknown(tmp_path: Path) -> None:
    file = config_file(tmp_path, "top_genres: 3\n")
    assert parse(PrepareConfig, PREPARE, file).top_genres == 3
    message = error_of(TrainConfig, TRAIN, file, code="unknown", fact="'top_genres'")
    assert message.startswith(f"{file} line 1: ")


def test_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.yaml"):
        parse(TrainConfig, TRAIN, str(tmp_path / "none.yaml"))


# Defaults of the models


@pytest.mark.parametrize(
    ("model", "expected"),
    [  # learning rate, freeze, batch size, epochs, augment, l2, weights, as in docs/paper.md
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
def test_resolved_settings_are_complete(model: str) -> None:
    settings = parse(TrainConfig, {**TRAIN, "model": model}).resolved()
    unset = {name for name, value in settings if value is None}
    assert unset == {"checkpoint_every", "max_steps", "microbatch", "workers"}
    assert settings.resolved() == settings


def test_given_settings_override_the_defaults_of_the_model() -> None:
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
    # 0 is a value
    assert parse(TrainConfig, {**TRAIN, "model": "baseline", "l2": 0}).resolved().l2 == 0


def test_default_model_is_vgg16() -> None:
    assert parse(TrainConfig, TRAIN).model == "vgg16"


# Fingerprints

NOT_IN_FINGERPRINT = {
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
    "cache_features",
    "resume",
}
OTHER_VALUES = {
    "part_rows": 128,
    "freeze": "3",
    "model": "tiny",
    "split_fractions": (0.5, 0.25, 0.25),
    "genres": ("Rock",),
    "min_share": 0.5,
    "max_rejected": 0.5,
    "epochs": 3,
    "max_steps": 3,
    "checkpoint_every": 3,
    "microbatch": 4,
    "workers": 3,
    "l2": 0.125,
    "learning_rate": 0.125,
}


def other_value(stage: type[StageConfig], name: str) -> object:
    """A valid value of `name` that is not its default."""
    if name in ARGUMENTS[stage] or name == "out":
        return "elsewhere"
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    default = stage.model_fields[name].default
    if choices := options(stage, name):
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "other"


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage in STAGES for name in stage.model_fields]
)
def test_fingerprint_depends_on_settings_that_change_the_result(
    stage: type[StageConfig], name: str
) -> None:
    base = parse(stage, REQUIRED[stage])
    changed = parse(stage, {**REQUIRED[stage], name: other_value(stage, name)})
    assert changed != base
    same = changed.fingerprint() == base.fingerprint()
    assert same == (name in NOT_IN_FINGERPRINT | ARGUMENTS[stage])


def test_fingerprint_is_the_same_from_flags_and_from_a_file(tmp_path: Path) -> None:
    file = config_file(tmp_path, "epochs: 3\nlearning_rate: 1e-4\n")
    from_file = parse(TrainConfig, TRAIN, file)
    from_flags = parse(TrainConfig, {**TRAIN, "epochs": "3", "learning_rate": "0.0001"})
    assert from_file.fingerprint() == from_flags.fingerprint()
    assert len(from_file.fingerprint()) == 64


# For the command line


def test_options_are_the_values_of_a_literal() -> None:
    assert options(PrepareConfig, "genre_match") == ["any", "all"]
    assert options(TrainConfig, "augment") == ["none", "color", "light"]
    for name in ("epochs", "out", "keep_original", "split_fractions"):
        stage = PrepareConfig if name in PrepareConfig.model_fields else TrainConfig
        assert options(stage, name) == []


def test_flag_names() -> None:
    assert flag("batch_size") == "--batch-size"
    assert flag("out") == "--out"


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_has_a_description(stage: type[StageConfig]) -> None:
    for name, field in stage.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description
        if get_origin(field.annotation) is Literal:
            assert field.default in get_args(field.annotation)


def test_prepare_and_score_have_the_same_catalog_settings() -> None:
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
def test_genres_are_a_list_or_comma_separated_text(text: Any, genres: tuple[str, ...]) -> None:
    assert PrepareConfig(catalog="c", out="o", genres=text).genres == genres


def test_comma_separated_text_in_a_file_is_a_list(tmp_path: Path) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text("out: o\ngenres: Jazz, Rock\nsplit_fractions: 0.7, 0.2, 0.1\n")
    settings = parse(PrepareConfig, {"catalog": "c"}, str(file))
    assert settings.genres == ("Jazz", "Rock")
    assert settings.split_fractions == (0.7, 0.2, 0.1)
    file.write_text("out: o\ngenres: ''\n")
    error_of(PrepareConfig, {"catalog": "c"}, str(file), fact="line 2: genres: ''")


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
def test_config_error_in_python_names_the_setting(
    settings: dict[str, Any], code: str, word: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        PrepareConfig(**settings)
    message = str(raised.value)
    assert raised.value.code == code
    assert word in message and "\n" not in message and "--" not in message


def test_settings_in_python_can_be_paths_numbers_and_lists() -> None:
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

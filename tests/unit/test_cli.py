"""The command line: flags, help and errors. Stages are replaced by stubs; Ray is not started."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import covergenre.demo.run  # noqa: F401 - imports the real stages before they are replaced
from covergenre import __version__
from covergenre.cli import main
from covergenre.config import (
    PREPARE_ONLY,
    EvaluateConfig,
    PrepareConfig,
    ScoreConfig,
    StageConfig,
    TrainConfig,
)
from covergenre.errors import ConfigError, LedgerError

ROOT = Path(__file__).parents[2]
STAGES: dict[str, type[StageConfig]] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
}
COMMANDS = [*STAGES, "demo", "sample", "summary"]
# The required arguments of each stage
REQUIRED = {
    "prepare": ["catalog.csv", "--out", "o"],
    "train": ["dataset", "--out", "o"],
    "evaluate": ["model", "dataset", "--out", "o"],
    "score": ["model", "catalog.csv", "--out", "o"],
}

Run = Callable[..., tuple[int, str, str]]
"""Arguments -> exit code, standard output, standard error."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def command(*args: str) -> tuple[int, str, str]:
        code: Any = 0
        try:
            main(args)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return command


def user_error(run: Run, *args: str) -> str:
    """The error message of a command that must fail with one line and exit code 2."""
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("covergenre: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("covergenre: ").rstrip()


class StubResult:
    """Stands for the result of a stage."""

    def summary(self) -> str:
        return "first line\nsecond line"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, bool]]:
    """(stage, settings, verbose) of every call of a stage; the stages are replaced by stubs."""
    recorded: list[tuple[str, Any, bool]] = []

    def stub(stage: str) -> ModuleType:
        def run_stage(settings: StageConfig, *, verbose: bool) -> StubResult:
            recorded.append((stage, settings, verbose))
            return StubResult()

        module = ModuleType(f"covergenre.stages.{stage}")
        setattr(module, stage, run_stage)
        return module

    for stage in STAGES:
        monkeypatch.setitem(sys.modules, f"covergenre.stages.{stage}", stub(stage))
    return recorded


# Errors


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        # commands and options
        ("trian", ["'trian'", "'train'"]),
        ("sumary vgg16", ["'sumary'", "'summary'"]),
        ("qqqqqq", ["'qqqqqq'", "demo, doctor, evaluate, prepare, quantize, quote,"]),
        ("--verson", ["--verson", "'--version'"]),
        ("train d --out o --bath-size 3", ["--bath-size", "'--batch-size'"]),
        ("prepare c --out o --no-keep-orignal", ["'--no-keep-original'"]),
        ("prepare c --out o --top_genres 3", ["--top_genres", "'--top-genres'"]),
        ("train d --out o --verbos", ["'--verbose'"]),
        ("sample --ouut o", ["'--out'"]),
        ("train d --out o -x", ["-x", "covergenre train --help"]),
        ("train d --out", ["'--out'", "covergenre --help"]),
        ("train d --out o --allow-partial-weights=1", ["'--allow-partial-weights'"]),
        # arguments
        ("train", ["DATASET", "dataset directory written by prepare"]),
        ("train d", ["--out", "output directory"]),
        ("train --out o", ["DATASET"]),
        ("evaluate --out o m", ["DATASET"]),
        ("train d e --out o", ["(e)", "covergenre train --help"]),
        ("summary", ["'MODEL'", "covergenre summary --help"]),
        ("sample", ["'--out'", "covergenre sample --help"]),
        # values
        ("train d --out o --epochs many", ["--epochs: 'many'", "an integer"]),
        ("train d --out o --epochs 99999999999", ["--epochs: '99999999999'", "2147483648"]),
        ("train d --out o --model vgg61", ["--model: 'vgg61'", "'vgg16'"]),
        ("train d --out o --freeze papr", ["--freeze: 'papr'", "'paper'"]),
        ("train d --out o --augment colour", ["--augment: 'colour'", "'color'"]),
        ("train d --out o --batch-size 1 --workers 2", ["--workers: '2'", "--batch-size is 1"]),
        ("train d --out o --batch-size 3 --workers 4:8", ["--workers: '4:8'", "--batch-size is 3"]),
        ("train d --out o --workers=", ["--workers: ''", "MIN:MAX"]),
        ("prepare c --out o --split-fractions 1,0", ["--split-fractions: '1,0'"]),
        ("prepare c --out o --split-fractions 0.5,0.4,0.3", ["--split-fractions", "0.4", "1"]),
        ("prepare c --out o --id-column=", ["--id-column: ''"]),
        ("score m c --out o --format xlsx", ["--format: 'xlsx'", "auto, csv"]),
        ("score m c --out o --covers=", ["--covers: ''"]),
        ("evaluate m d --out o --split tset", ["--split: 'tset'", "'test'"]),
        ("summary vgg61", ["'vgg61'", "'vgg16'"]),
        ("sample --out o --albums 0", ["'--albums'", "x>=1"]),
        ("sample --out o --albums few", ["'--albums'", "'few'"]),
        ("sample --out=", ["--out", "PATH"]),
        ("sample --out /dev/null", ["/dev/null", "--out"]),
        ("demo --out /dev/null", ["/dev/null", "--out"]),
        ("demo --out=", ["--out", "PATH"]),
        # --config
        ("train d --out o --config none.yaml", ["none.yaml: no such file"]),
        ("train d --out o --config=", ["--config", "YAML"]),
        # submit and doctor
        ("submit trian x", ["'trian'", "'train'"]),
        ("submit train d --out o --epoch 3", ["--epoch", "'--epochs'"]),
        ("submit train d --out o --adress x", ["--adress", "'--address'"]),
        ("submit train d --out o --epochs x", ["--epochs: 'x'"]),
        ("submit train d e --out o", ["(e)", "covergenre train --help"]),
        ("submit train d", ["--out"]),
        ("submit train d --out o --working-dir .", ["--working-dir .", "jobs/train.py"]),
        ("submit train d --out o --working-dir=", ["--working-dir", "PATH"]),
        ("submit train d --out o --config /dev/null", ["--config /dev/null", "--working-dir"]),
        ("doctor --address=", ["--address", "URL"]),
        ("doctor --address http://127.0.0.1:8265", ["--address", "covergenre/__main__.py"]),
        ("doctor --storage=", ["--storage", "PATH"]),
        ("doctor --workers 0", ["'--workers'", "x>=1"]),
    ],
)
def test_user_error_is_one_line_with_the_argument_and_the_fix(
    line: str, facts: list[str], run: Run, calls: list[Any]
) -> None:
    message = user_error(run, *line.split())
    assert all(fact in message for fact in facts), message
    assert not calls
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ("prepare", "{}", "--out", "o"),
        ("prepare", "c.csv", "--out", "{}"),
        ("prepare", "c.csv", "--out", "o", "--genre-map", "{}.csv"),
        ("prepare", "c.csv", "--out", "o", "--config", "{}"),
        ("train", "{}", "--out", "o"),
        ("train", "dataset", "--out", "{}"),
        ("evaluate", "{}", "dataset", "--out", "o"),
        ("evaluate", "model", "{}", "--out", "o"),
        ("evaluate", "model", "dataset", "--out", "{}"),
        ("score", "{}", "c.csv", "--out", "o"),
        ("score", "model", "{}", "--out", "o"),
        ("score", "model", "c.csv", "--out", "{}"),
        ("sample", "--out", "{}"),
        ("demo", "--out", "{}"),
    ],
)
def test_path_with_an_unsupported_scheme_is_an_error(
    args: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "c.csv").write_text("album_id,cover,genres\na,1.jpg,Rock\n")
    for uri in ("gs://bucket/x", "https://host/x"):
        line = user_error(run, *(arg.format(uri) for arg in args))
        assert uri in line and "not supported" in line


def test_named_pipe_as_input_file_is_an_error(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "c.csv").write_text("album_id,cover,genres\na,1.jpg,Rock\n")
    for args in (
        ("pipe.csv",),
        ("c.csv", "--genre-map", "pipe.csv"),
        ("c.csv", "--config", "pipe.csv"),
    ):
        line = user_error(run, "prepare", *args, "--out", "o")
        assert "pipe.csv" in line and "regular file" in line


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_invalid_proxy_is_an_error_before_ray_starts(
    variable: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    (tmp_path / "c.csv").write_text("album_id,cover,genres\na,http://host.invalid/1.jpg,Rock\n")
    monkeypatch.setenv(variable, "socks5://user:hidden@host:1")
    line = user_error(run, "prepare", "c.csv", "--out", "o")
    assert line.startswith(f"{variable}: socks5://")
    assert "hidden" not in line


@pytest.mark.parametrize("stage", STAGES)
def test_misspelt_flag_is_corrected(stage: str, run: Run, calls: list[Any]) -> None:
    for name, field in STAGES[stage].model_fields.items():
        if field.json_schema_extra:
            continue
        flag = "--" + name.replace("_", "-")
        wrong = flag + "e"
        message = user_error(run, stage, *REQUIRED[stage], wrong, "1")
        assert wrong in message and f"{flag}'" in message.replace("--no-", "--"), message


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("bach-size: 3", ["'bach_size'", "'batch_size'"]),
        ("batch_size: many", ["batch_size: 'many'"]),
        ("batch_size: [1", ["YAML"]),
        ("- batch_size", ["`name: value`"]),
        ("model: vgg61", ["model: 'vgg61'", "'vgg16'"]),
        ("device: gpus", ["device: 'gpus'", "'gpu'"]),
    ],
)
def test_error_in_a_config_file_names_the_file(
    text: str, facts: list[str], run: Run, calls: list[Any]
) -> None:
    Path("run.yaml").write_text(text)
    line = user_error(run, "train", "d", "--out", "o", "--config", "run.yaml")
    assert line.startswith("run.yaml") and all(fact in line for fact in facts), line
    assert not calls


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("two\nlines"), 2, "two lines"),
        (LedgerError("3 rows are missing"), 1, "3 rows are missing"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_error_of_a_stage_sets_the_exit_code(
    error: BaseException, code: int, message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real end_now would also stop the Ray of other tests.
    monkeypatch.setattr("covergenre.cluster.command_process.end_now", sys.exit)
    replace_train(monkeypatch, error)
    found, out, err = run("train", *REQUIRED["train"])
    # click starts a new line after ^C
    assert (found, out, err.lstrip("\n")) == (code, "", f"covergenre: {message}\n")


def test_unexpected_exception_is_not_caught(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_train(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run("train", *REQUIRED["train"])


def replace_train(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Replace the stage by one that raises `error`."""

    def train(*_: object, **__: object) -> None:
        raise error

    module = ModuleType("covergenre.stages.train")
    monkeypatch.setattr(module, "train", train, raising=False)
    monkeypatch.setitem(sys.modules, "covergenre.stages.train", module)


# Settings


@pytest.mark.parametrize("stage", STAGES)
def test_stage_receives_its_settings(stage: str, run: Run, calls: list[Any]) -> None:
    code, out, err = run(stage, *REQUIRED[stage])
    assert (code, out, err) == (0, "first line\nsecond line\n", "")
    ((called, settings, verbose),) = calls
    assert (called, type(settings), verbose) == (stage, STAGES[stage], False)
    assert settings.out == "o"
    run(stage, "--verbose", *REQUIRED[stage])
    assert calls[1][2]
    assert calls[1][1] == settings


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_has_a_flag(stage: str, run: Run, calls: list[Any]) -> None:
    examples = {
        "split_fractions": "0.5,0.3,0.2",
        "genres": "Rock, Jazz,,Soul",
        "missing_values": "nan, -",
        "carry": "year, label",
        "freeze": "2",
        "model": "tiny",
        "min_share": "0.25",
        "max_rejected": "0.25",
        "learning_rate": "1e-5",
        "weights": "none",
        "l2": "0.5",
        "cpus_per_worker": "2",
        "genres_separator": ";",
        "covers": "x",
        "genre_map": "x.csv",
        "workers": "2",
        "epochs": "2",
        "max_steps": "2",
    }
    expected: dict[str, Any] = {
        "split_fractions": (0.5, 0.3, 0.2),
        "genres": ("Rock", "Jazz", "Soul"),
        "missing_values": ("nan", "-"),
        "carry": ("year", "label"),
    }
    for name, field in STAGES[stage].model_fields.items():
        if field.json_schema_extra or name == "out":
            continue
        flag, default = "--" + name.replace("_", "-"), field.default
        calls.clear()
        if isinstance(default, bool):
            for given in (True, False):
                text = flag if given else flag.replace("--", "--no-", 1)
                run(stage, *REQUIRED[stage], text)
                assert getattr(calls[-1][1], name) is given
            continue
        text = examples.get(name) or next(
            choice for choice in CHOICES if accepted(STAGES[stage], name, choice)
        )
        assert run(stage, *REQUIRED[stage], flag, text)[0] == 0, (flag, text)
        value = getattr(calls[-1][1], name)
        assert value != default, flag
        assert value == expected.get(name, type(value)(text)), flag


CHOICES = ("csv", "all", "hash", "artist", "gpu", "bf16", "light", "dev", "cosine", "train", "7")


def accepted(settings: type[StageConfig], name: str, value: str) -> bool:
    """Whether `value` is valid for the setting, and is not its default."""
    names = [n for n, f in settings.model_fields.items() if f.json_schema_extra]
    try:
        given = settings.model_validate({**dict.fromkeys([*names, "out"], "x"), name: value})
    except ConfigError:
        return False
    return bool(getattr(given, name) != settings.model_fields[name].default)


@pytest.mark.parametrize("key", ["top-genres", "top_genres"])
def test_flags_override_the_config_file(key: str, run: Run, calls: list[Any]) -> None:
    Path("run.yaml").write_text(f"{key}: 3\nkeep-original: true\nout: there\n")
    file = ["--config", "run.yaml"]
    run("prepare", "c", *file)
    settings = calls[-1][1]
    assert (settings.top_genres, settings.keep_original, settings.out) == (3, True, "there")
    run("prepare", "c", *file, "--top-genres", "4", "--no-keep-original", "--out", "here")
    settings = calls[-1][1]
    assert (settings.top_genres, settings.keep_original, settings.out) == (4, False, "here")


def test_argument_can_be_set_in_the_config_file(run: Run, calls: list[Any]) -> None:
    Path("run.yaml").write_text("dataset: d\nout: o\n")
    assert run("train", "--config", "run.yaml")[0] == 0
    assert calls[-1][1].dataset == "d"


# Help


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, option: str, run: Run) -> None:
    code, out, err = run(command, option)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ") and command in out.splitlines()[0]
    for name, field in STAGES[command].model_fields.items() if command in STAGES else ():
        shown = name.upper() if field.json_schema_extra else "--" + name.replace("_", "-")
        if command == "score" and name in PREPARE_ONLY:
            assert shown not in out
            continue
        assert re.search(rf"(^|\s){shown}\b", out), shown
        if isinstance(field.default, str):
            assert f"[default: {field.default}]" in " ".join(out.split())
    assert " [default: True]" not in out and "None" not in out


def test_help_without_a_command_lists_the_commands(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command}  +\S", out, re.MULTILINE), command
    code, bare, err = run()
    assert (code, bare.strip(), err) == (0, out.strip(), "")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"covergenre {__version__}\n", "")


def test_help_imports_no_slow_packages() -> None:
    program = (
        "import sys; from covergenre.cli import main; main(['--help']);"
        "heavy = {'torch', 'ray', 'pyarrow', 'pydantic', 'numpy', 'PIL', 'matplotlib', 'boto3'};"
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")


# jobs/*.py


@pytest.mark.parametrize("stage", STAGES)
def test_job_script_is_the_same_as_the_command(
    stage: str, run: Run, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = str(ROOT / "jobs" / f"{stage}.py")
    monkeypatch.setattr(sys, "argv", [job, *REQUIRED[stage], "--verbose"])
    runpy.run_path(job, run_name="__main__")
    run(stage, *REQUIRED[stage], "--verbose")
    assert calls[0] == calls[1]
    runpy.run_path(job, run_name="imported")
    assert len(calls) == 2


def test_error_of_a_job_script_is_that_of_the_command(run: Run) -> None:
    job = [sys.executable, str(ROOT / "jobs/train.py"), "--nope"]
    done = subprocess.run(job, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == run("train", "--nope")
    assert done.returncode == 2


def test_interrupted_sample_is_completed(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "s")
    run("sample", "--out", out, "--albums", "3")
    original = (tmp_path / "s/covers/synthetic_000002.jpg").read_bytes()
    catalog = tmp_path / "s/catalog.csv"
    whole = catalog.read_text()
    catalog.unlink()  # it is written last
    (tmp_path / "s/covers/synthetic_000002.jpg").write_bytes(original[:50])
    run("sample", "--out", out, "--albums", "3")
    assert catalog.read_text() == whole
    assert (tmp_path / "s/covers/synthetic_000002.jpg").read_bytes() == original

"""The command line: a mistake is one line and exit code 2; no stage of these runs, and no Ray."""

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

from covergenre import __version__
from covergenre.cli import main
from covergenre.config import EvaluateConfig, PrepareConfig, ScoreConfig, StageConfig, TrainConfig
from covergenre.errors import ConfigError, LedgerError

ROOT = Path(__file__).parents[2]
STAGES: dict[str, type[StageConfig]] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
}
COMMANDS = [*STAGES, "demo", "sample", "summary"]
# what each stage needs at least
NEEDED = {
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


def mistake(run: Run, *args: str) -> str:
    """What the one line says."""
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("covergenre: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("covergenre: ").rstrip()


class Done:
    """What a stage gives back."""

    def summary(self) -> str:
        return "first line\nsecond line"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, bool]]:
    """(stage, settings, verbose) of every stage that was run, and none of them did anything."""
    made: list[tuple[str, Any, bool]] = []

    def stand_in(stage: str) -> ModuleType:
        def run_stage(settings: StageConfig, *, verbose: bool) -> Done:
            made.append((stage, settings, verbose))
            return Done()

        module = ModuleType(f"covergenre.stages.{stage}")
        setattr(module, stage, run_stage)
        return module

    for stage in STAGES:
        monkeypatch.setitem(sys.modules, f"covergenre.stages.{stage}", stand_in(stage))
    return made


# Mistakes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "no command 'trian'; did you mean 'train'?"),
        ("sumary vgg16", "no command 'sumary'; did you mean 'summary'?"),
        ("qqqqqq", "no command 'qqqqqq'; valid: demo, doctor, evaluate, prepare, sample, score,"),
        ("--verson", "no option --verson; did you mean '--version'?"),
        ("train d --out o --bath-size 3", "--bath-size; did you mean '--batch-size'?"),
        ("prepare c --out o --no-keep-orignal", "did you mean '--no-keep-original'?"),
        ("prepare c --out o --top_genres 3", "--top_genres; did you mean '--top-genres'?"),
        ("train d --out o --verbos", "did you mean '--verbose'?"),
        ("sample --ouut o", "did you mean '--out'?"),
        ("train d --out o -x", "no option -x"),
        ("train", "DATASET is missing"),
        ("train d", "--out is missing"),
        ("train --out o", "DATASET is missing"),
        ("evaluate --out o m", "DATASET is missing"),
        ("train d e --out o", "unexpected extra argument (e)"),
        ("train d --out", "'--out' requires an argument"),
        ("train d --out o --allow-partial-weights=1", "does not take a value"),
        ("train d --out o --epochs many", "--epochs: 'many': "),
        ("train d --out o --model vgg61", "--model: 'vgg61': unknown model; did you mean 'vgg16'?"),
        ("train d --out o --freeze papr", "--freeze: 'papr': "),
        (
            "train d --out o --augment colour",
            "--augment: 'colour' is not a valid value; did you mean",
        ),
        ("submit trian x", "no stage 'trian'; did you mean 'train'?"),
        ("submit train d --out o --epoch 3", "no option --epoch; did you mean '--epochs'?"),
        ("submit train d --out o --adress x", "no option --adress; did you mean '--address'?"),
        ("submit train d --out o --epochs x", "--epochs: 'x'"),
        ("submit train d", "--out is missing"),
        ("submit train d --out o --working-dir .", "--working-dir .: has no jobs/train.py"),
        ("prepare c --out o --split-fractions 1,0", "--split-fractions: '1,0': too few values"),
        ("prepare c --out o --split-fractions 0.5,0.4,0.3", "must sum to 1"),
        (
            "score m c --out o --format xlsx",
            "--format: 'xlsx' is not a valid value; valid: auto, csv",
        ),
        ("evaluate m d --out o --split tset", "--split: 'tset' is not a valid value; did you mean"),
        (
            "train d --out o --batch-size 1 --workers 2",
            "--workers: '2': each worker needs at least",
        ),
        ("train d --out o --batch-size 3 --workers 4:8", "and --batch-size is 3; use fewer"),
        ("train d --out o --config none.yaml", "none.yaml: no such file"),
        ("train d --out o --config=", "--config is empty"),
        ("train d --out o --epochs 99999999999", "--epochs: '99999999999': "),
        ("score m c --out o --covers=", "--covers: '': "),
        ("doctor --address=", "--address: is empty; give the dashboard's"),
        ("doctor --address http://127.0.0.1:8265", "be in covergenre's folder"),
        ("submit train d --out o --config /dev/null", "--config /dev/null: the job sees"),
        ("doctor --storage=", "--storage: is empty; give a folder or s3://BUCKET/PREFIX"),
        ("doctor --workers 0", "'--workers'"),
        ("demo --out=", "--out: is empty; give a folder"),
        ("sample --out=", "--out: is empty; give a folder"),
        ("submit train d --out o --working-dir=", "--working-dir: is empty; give covergenre's"),
        ("train d --out o --workers=", "--workers: '': is empty"),
        ("prepare c --out o --id-column=", "--id-column: '': is empty"),
        ("sample", "'--out'"),
        ("sample --out o --albums 0", "'--albums'"),
        ("sample --out o --albums few", "'--albums'"),
        ("summary", "MODEL"),
        ("summary vgg61", "no model 'vgg61'; did you mean 'vgg16'?"),
    ],
)
def test_a_mistake_is_one_line_that_says_what(
    line: str, said: str, run: Run, calls: list[Any]
) -> None:
    assert said in mistake(run, *line.split())
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
def test_place_with_an_unsupported_scheme_is_one_line(
    args: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "c.csv").write_text("album_id,cover,genres\na,1.jpg,Rock\n")
    for uri, advice in (
        ("gs://bucket/x", "gs:// is not supported; use a local path or s3://"),
        ("https://host/x", "https:// is not supported; download it first"),
    ):
        line = mistake(run, *(arg.format(uri) for arg in args))
        assert uri in line and advice in line


def test_catalog_that_is_a_pipe_is_one_line(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "c.csv").write_text("album_id,cover,genres\na,1.jpg,Rock\n")
    for args in (
        ("pipe.csv",),
        ("c.csv", "--genre-map", "pipe.csv"),
        ("c.csv", "--config", "pipe.csv"),
    ):
        line = mistake(run, "prepare", *args, "--out", "o")
        assert "pipe.csv" in line and "it is a pipe, not a regular file" in line


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_invalid_proxy_is_told_before_ray_is_started(
    variable: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    (tmp_path / "c.csv").write_text("album_id,cover,genres\na,http://host.invalid/1.jpg,Rock\n")
    monkeypatch.setenv(variable, "socks5://user:hidden@host:1")
    line = mistake(run, "prepare", "c.csv", "--out", "o")
    assert line.startswith(f"{variable}: socks5:// proxies are not supported")
    assert "hidden" not in line


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_misspelt_finds_the_nearest(stage: str, run: Run, calls: list[Any]) -> None:
    for name, field in STAGES[stage].model_fields.items():
        if field.json_schema_extra:
            continue
        flag = "--" + name.replace("_", "-")
        wrong = flag + "e"
        said = mistake(run, stage, *NEEDED[stage], wrong, "1")
        assert said.startswith(f"no option {wrong}; did you mean '--"), said
        assert flag in said, said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bach-size: 3", "unknown setting 'bach_size'; did you mean 'batch_size'?"),
        ("batch_size: many", "batch_size: 'many': "),
        ("batch_size: [1", "not valid YAML"),
        ("- batch_size", "expected settings as `name: value` lines"),
        ("model: vgg61", "model: 'vgg61': unknown model; did you mean 'vgg16'?"),
        ("device: gpus", "device: 'gpus' is not a valid value; did you mean 'gpu'?"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(
    text: str, said: str, run: Run, calls: list[Any]
) -> None:
    Path("run.yaml").write_text(text)
    line = mistake(run, "train", "d", "--out", "o", "--config", "run.yaml")
    assert line.startswith("run.yaml") and said in line
    assert not calls


def test_what_a_stage_raises_has_its_own_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An interrupted process ends at once, with the Ray that it embeds: not the one of other tests.
    monkeypatch.setattr("covergenre.cluster.command_process.end_now", sys.exit)
    for error, code, said in (
        (ConfigError("no\nluck"), 2, "no luck"),
        (LedgerError("3 rows are gone"), 1, "3 rows are gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        module = ModuleType("covergenre.stages.train")

        def fails(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(module, "train", fails, raising=False)
        monkeypatch.setitem(sys.modules, "covergenre.stages.train", module)
        found, out, err = run("train", *NEEDED["train"])
        # after ^C click ends the line that the terminal is in
        assert (found, out, err.lstrip("\n")) == (code, "", f"covergenre: {said}\n")


def test_a_defect_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("covergenre.stages.train")
    monkeypatch.setattr(module, "train", lambda *_, **__: 1 / 0, raising=False)
    monkeypatch.setitem(sys.modules, "covergenre.stages.train", module)
    with pytest.raises(ZeroDivisionError):
        run("train", *NEEDED["train"])


# What reaches a stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gets_its_settings(stage: str, run: Run, calls: list[Any]) -> None:
    code, out, err = run(stage, *NEEDED[stage])
    assert (code, out, err) == (0, "first line\nsecond line\n", "")
    ((called, settings, verbose),) = calls
    assert (called, type(settings), verbose) == (stage, STAGES[stage], False)
    assert settings.out == "o"
    run(stage, "--verbose", *NEEDED[stage])
    assert calls[1][2]
    assert calls[1][1] == settings


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_can_be_given_as_a_flag(stage: str, run: Run, calls: list[Any]) -> None:
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
                run(stage, *NEEDED[stage], text)
                assert getattr(calls[-1][1], name) is given
            continue
        text = examples.get(name) or next(
            choice for choice in CHOICES if accepted(STAGES[stage], name, choice)
        )
        assert run(stage, *NEEDED[stage], flag, text)[0] == 0, (flag, text)
        value = getattr(calls[-1][1], name)
        assert value != default, flag
        assert value == expected.get(name, type(value)(text)), flag


CHOICES = ("csv", "all", "hash", "artist", "gpu", "bf16", "light", "dev", "cosine", "train", "7")


def accepted(settings: type[StageConfig], name: str, value: str) -> bool:
    """Whether `value` is one that the setting may have, and not its default."""
    names = [n for n, f in settings.model_fields.items() if f.json_schema_extra]
    try:
        made = settings.model_validate({**dict.fromkeys([*names, "out"], "x"), name: value})
    except ConfigError:
        return False
    return bool(getattr(made, name) != settings.model_fields[name].default)


@pytest.mark.parametrize("key", ["top-genres", "top_genres"])
def test_flags_overrule_the_file(key: str, run: Run, calls: list[Any]) -> None:
    Path("run.yaml").write_text(f"{key}: 3\nkeep-original: true\nout: there\n")
    file = ["--config", "run.yaml"]
    run("prepare", "c", *file)
    settings = calls[-1][1]
    assert (settings.top_genres, settings.keep_original, settings.out) == (3, True, "there")
    run("prepare", "c", *file, "--top-genres", "4", "--no-keep-original", "--out", "here")
    settings = calls[-1][1]
    assert (settings.top_genres, settings.keep_original, settings.out) == (4, False, "here")


def test_an_argument_may_stand_in_the_file(run: Run, calls: list[Any]) -> None:
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
        assert re.search(rf"(^|\s){shown}\b", out), shown
        if isinstance(field.default, str):
            assert f"[default: {field.default}]" in " ".join(out.split())
    assert " [default: True]" not in out and "None" not in out


def test_the_list_of_commands(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command}  +\S", out, re.MULTILINE), command
    # without a command, the same help: nobody needs to guess
    code, bare, err = run()
    assert (code, bare.strip(), err) == (0, out.strip(), "")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"covergenre {__version__}\n", "")


def test_help_is_fast_because_it_imports_little() -> None:
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
def test_a_job_is_the_command(
    stage: str, run: Run, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = str(ROOT / "jobs" / f"{stage}.py")
    monkeypatch.setattr(sys, "argv", [job, *NEEDED[stage], "--verbose"])
    runpy.run_path(job, run_name="__main__")
    run(stage, *NEEDED[stage], "--verbose")
    assert calls[0] == calls[1]
    runpy.run_path(job, run_name="imported")
    assert len(calls) == 2


def test_a_jobs_mistake_is_the_commands(run: Run) -> None:
    job = [sys.executable, str(ROOT / "jobs/train.py"), "--nope"]
    done = subprocess.run(job, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == run("train", "--nope")
    assert done.returncode == 2


def test_an_interrupted_sample_is_drawn_to_its_end(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "s")
    run("sample", "--out", out, "--albums", "3")
    original = (tmp_path / "s/covers/synthetic_000002.jpg").read_bytes()
    catalog = tmp_path / "s/catalog.csv"
    whole = catalog.read_text()
    catalog.unlink()  # it comes last
    (tmp_path / "s/covers/synthetic_000002.jpg").write_bytes(original[:50])
    run("sample", "--out", out, "--albums", "3")
    assert catalog.read_text() == whole
    assert (tmp_path / "s/covers/synthetic_000002.jpg").read_bytes() == original

"""The command line: parses the arguments into the settings of a stage, and runs the stage.

Slow imports (pydantic, Ray, torch) are inside functions, so that --help is fast.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from covergenre import __version__
from covergenre.errors import ConfigError, CovergenreError, did_you_mean
from covergenre.progress import log_to_stderr, reporting

if TYPE_CHECKING:
    from covergenre.config import StageConfig

# stage -> (name of its class in config.py, help text)
_STAGES = {
    "prepare": ("PrepareConfig", "Validate a catalog and write it as a dataset."),
    "train": ("TrainConfig", "Fine-tune a model on a dataset."),
    "evaluate": ("EvaluateConfig", "Compute a model's metrics over a split of a dataset."),
    "score": ("ScoreConfig", "Label a catalog or a dataset with a model."),
    "quantize": ("QuantizeConfig", "Make an int8 model, which scores faster on CPUs."),
    "quote": ("QuoteConfig", "Estimate the time and cost of scoring a catalog."),
}
_SUBMITTED = ("prepare", "train", "evaluate", "score")
"""Stages that run on the cluster of RAY_ADDRESS; the others use the machine where
they are run."""
_COMMANDS = ("demo", "sample", *_STAGES, "summary", "submit", "doctor")
_PROGRAM = "covergenre"
_ARGUMENTS = "covergenre.arguments"
"""Key in click's Context.meta: the unparsed arguments of a stage."""
_VERBOSE_HELP = "Also show the logs of Ray and torch"

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Commands(click.Group):
    """The stages' commands are created when they are used, because that imports pydantic."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _STAGES:
            return _stage_command(cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        helps = {name: command.get_short_help_str(80) for name, command in self.commands.items()}
        helps |= {name: about for name, (_, about) in _STAGES.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, helps[name]) for name in _COMMANDS])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in _COMMANDS:
            raise ConfigError(f"no command {args[0]!r}{did_you_mean(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=_PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Predicts the genres of albums from their covers.

    catalog -> prepare -> dataset -> train -> model -> score -> labels
    """


class _StageCommand(click.Command):
    """Keeps the unparsed arguments, to pass them to a job on a cluster."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


def _stage_command(name: str) -> click.Command:
    """The command of a stage: an option or argument for each of its settings."""
    from covergenre.config import CatalogSettings, StageConfig

    stage, about = _stage_config(name), _STAGES[name][1]

    def order(setting: str) -> tuple[bool, ...]:
        """Required settings first; those that stages have in common last."""
        is_required = stage.model_fields[setting].is_required()
        return (
            not is_required,
            setting in StageConfig.model_fields,
            setting in CatalogSettings.model_fields,
        )

    params = [_parameter(stage, setting) for setting in sorted(stage.model_fields, key=order)]
    arguments = [
        f"{setting.upper()}: {field.description}."
        for setting, field in stage.model_fields.items()
        if field.json_schema_extra
    ]
    params += [
        click.Option(
            ["--config"], metavar="PATH", help="YAML file of settings, overridden by flags"
        ),
        click.Option(["--verbose"], is_flag=True, help=_VERBOSE_HELP),
    ]

    def run(verbose: bool, **given: Any) -> None:
        _run_stage(name, given, verbose)

    return _StageCommand(name, callback=run, params=params, help="\n\n".join([about, *arguments]))


def _stage_config(name: str) -> "type[StageConfig]":
    from covergenre import config

    stage: type[StageConfig] = getattr(config, _STAGES[name][0])
    return stage


def _parameter(stage: "type[StageConfig]", name: str) -> click.Parameter:
    """The argument or option of a setting. Its value is validated later, by the settings class."""
    from covergenre.config import PREPARE_ONLY, PrepareConfig, flag

    field = stage.model_fields[name]
    if field.json_schema_extra:
        return click.Argument([name], required=False, metavar=name.upper())
    text = field.description or ""
    text = text[:1].upper() + text[1:]
    if field.annotation is bool:
        # --no-x overrides `x: true` in a file.
        declaration = f"{flag(name)}/--no-{name.replace('_', '-')}"
        return click.Option([declaration, name], is_flag=True, default=None, help=text)
    if field.is_required():
        text += "  [required]"
    elif field.default not in (None, ()):
        is_list = isinstance(field.default, tuple)
        text += f"  [default: {','.join(map(str, field.default)) if is_list else field.default}]"
    hidden = name in PREPARE_ONLY and stage is not PrepareConfig
    return click.Option([flag(name), name], metavar=_metavar(stage, name), help=text, hidden=hidden)


def _metavar(stage: "type[StageConfig]", name: str) -> str:
    from covergenre.config import PATH_SETTINGS
    from covergenre.config_errors import options

    if name == "weights":
        return "NAME|PATH"
    if name in PATH_SETTINGS:
        return "PATH"
    kinds = {"tuple": "LIST", "int": "N", "float": "X"}
    annotation = str(stage.model_fields[name].annotation)
    found = (shown for kind, shown in kinds.items() if kind in annotation)
    return "|".join(options(stage, name)) or next(found, "TEXT")


def _run_stage(name: str, given: dict[str, Any], verbose: bool) -> None:
    """Run a stage here, or as a job if RAY_ADDRESS is the URL of a dashboard."""
    settings = _settings(name, given)
    from covergenre.cluster import command_process
    from covergenre.cluster.ray_runtime import dashboard

    if name in _SUBMITTED and (address := dashboard()):
        from covergenre.cluster.jobs import submit as submit_job

        arguments = click.get_current_context().meta[_ARGUMENTS]
        file = given["config"]
        sys.exit(submit_job(name, arguments, file, address=address, wait=True, working_dir="."))
    command_process.install()
    run = getattr(import_module(f"covergenre.stages.{name}"), name)
    click.echo(run(settings, verbose=verbose).summary())


def _settings(name: str, given: dict[str, Any]) -> "StageConfig":
    """The settings of a stage from its parsed arguments and the file of --config."""
    from covergenre.config import parse

    flags = {key: value for key, value in given.items() if value is not None}
    return parse(_stage_config(name), flags, flags.pop("config", None))


def _check_arguments(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parse the arguments of a stage, and raise if its settings are invalid."""
    context = _stage_command(name).make_context(f"{_PROGRAM} {name}", list(arguments))
    _settings(name, {key: v for key, v in context.params.items() if key != "verbose"})
    return context.params


def _not_empty(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise ConfigError(f"{parameter.opts[0]}: is empty; expected {parameter.metavar}")
    return value


def _text_option(flag: str, metavar: str, help_text: str, **settings: Any) -> _Decorator:
    """An option with a text that must not be empty, such as a path."""
    return click.option(flag, metavar=metavar, callback=_not_empty, help=help_text, **settings)


def _integer_option(
    flag: str, help_text: str, *, minimum: int = 1, default: int | None = None
) -> _Decorator:
    kind = click.IntRange(min=minimum)
    kind.name = "integer"  # in click's errors
    shown = default is not None
    return click.option(
        flag, type=kind, metavar="N", default=default, show_default=shown, help=help_text
    )


@cli.command()
@_text_option("--out", "PATH", "Output directory", default="covergenre-demo", show_default=True)
@click.option("--verbose", is_flag=True, help=_VERBOSE_HELP)
def demo(out: str, verbose: bool) -> None:
    """Run all stages on a synthetic catalog, in minutes."""
    from covergenre.cluster import command_process
    from covergenre.demo.run import run_demo

    command_process.install()
    run_demo(out, verbose=verbose)


@cli.command()
@_text_option("--out", "PATH", "Output directory, new or empty", required=True)
@_integer_option("--albums", "Number of albums", default=600)
@_integer_option("--seed", "Seed of the covers and genres", minimum=0, default=0)
def sample(out: str, albums: int, seed: int) -> None:
    """Write a catalog of synthetic covers, for testing."""
    from covergenre.demo.run import make_sample

    click.echo(make_sample(out, albums, seed))


@cli.command()
@click.argument("model")
@_integer_option("--genres", "Number of genres", default=20)
@click.option(
    "--freeze", help="paper, none, all, or N: layers to freeze, as in train  [default: the model's]"
)
def summary(model: str, genres: int, freeze: str | None) -> None:
    """Print the layers and the parameter counts of a model.

    MODEL: an architecture, such as vgg16.
    """
    from covergenre.models.summary import layer_table

    click.echo(layer_table(model, genres, freeze))


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("stage")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@_text_option(
    "--address",
    "URL",
    "URL of the cluster's dashboard  [default: RAY_ADDRESS, or http://127.0.0.1:8265]",
)
@click.option(
    "--wait/--no-wait",
    default=True,
    help="Print the job's log until it ends, and exit with its exit code  [default: --wait]",
)
@_text_option(
    "--working-dir",
    "PATH",
    "Directory with covergenre's source code, which is uploaded to the cluster",
    default=".",
    show_default=True,
)
def submit(
    stage: str, arguments: tuple[str, ...], address: str | None, wait: bool, working_dir: str
) -> None:
    """Run a stage as a job on a cluster.

    STAGE: prepare, train, evaluate or score.

    ARGUMENTS: arguments and options of the stage.
    """
    from covergenre.cluster.jobs import submit as submit_job

    if stage not in _SUBMITTED:
        raise ConfigError(f"no stage {stage!r}{did_you_mean(stage, _SUBMITTED)}")
    try:
        file = _check_arguments(stage, arguments)["config"]
    except click.NoSuchOption as error:
        own = ("--address", "--wait", "--no-wait", "--working-dir")
        known = [*(error.possibilities or ()), *own]
        raise click.NoSuchOption(error.option_name, possibilities=known, ctx=error.ctx) from error
    sys.exit(
        submit_job(stage, arguments, file, address=address, wait=wait, working_dir=working_dir)
    )


@cli.command()
@_text_option(
    "--address",
    "URL",
    "URL of the cluster's dashboard; the checks run as a job there  [default: RAY_ADDRESS; if that"
    " is not set, check this machine]",
)
@_text_option(
    "--storage",
    "PATH",
    "Check that a file can be written, read and deleted in this directory or s3:// prefix",
)
@_integer_option("--workers", "Check that N workers can be scheduled")
def doctor(address: str | None, storage: str | None, workers: int | None) -> None:
    """Check every machine of a cluster.

    Checks package versions, GPUs, free memory and disk space, and access to the storage. Exits with
    code 2 if a check fails.
    """
    from covergenre.cluster import command_process
    from covergenre.cluster.doctor import doctor as run_checks

    command_process.install()
    sys.exit(run_checks(address, storage, workers))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. A user error is one line on stderr and exit code 2."""
    try:
        with log_to_stderr(), reporting(True):
            cli.main(
                args=list(args) if args is not None else None,
                prog_name=_PROGRAM,
                standalone_mode=False,
            )
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(0)
    except click.ClickException as error:
        _exit(_usage_error(error), 2)
    except CovergenreError as error:
        _exit(str(error).replace("\n", " "), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        from covergenre.cluster.command_process import end_now

        click.echo(f"{_PROGRAM}: interrupted", err=True)
        end_now(130)
    except BrokenPipeError:
        sys.exit(1)


def _usage_error(error: click.ClickException) -> str:
    """The message of click's error in one line, with the nearest option or the help command."""
    advice = ""
    message = error.format_message().replace("\n", " ").rstrip(".")
    if isinstance(error, click.NoSuchOption):
        message = f"no option {error.option_name}"
        advice = did_you_mean(error.option_name, error.possibilities or ())
    if not advice:
        ctx = error.ctx if isinstance(error, click.UsageError) else None
        advice = f"; see {ctx.command_path if ctx else _PROGRAM} --help"
    return message[:1].lower() + message[1:] + advice


def _exit(message: str, code: int) -> None:
    click.echo(f"{_PROGRAM}: {message}", err=True)
    sys.exit(code)

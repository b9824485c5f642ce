"""covergenre: an album's genres from its cover.

Arguments become a stage's settings, and the stage is imported only then: --help stays fast.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click

from covergenre import __version__
from covergenre.errors import ConfigError, CovergenreError, did_you_mean
from covergenre.progress import log_to_stderr, reporting

# stage -> (class of settings, what it does)
_STAGES = {
    "prepare": ("PrepareConfig", "Validate a catalog and pack it into a dataset."),
    "train": ("TrainConfig", "Fine-tune a model on a dataset, data-parallel."),
    "evaluate": ("EvaluateConfig", "Measure a model on a split of a dataset, every album."),
    "score": ("ScoreConfig", "Label a catalog (or a dataset) with a model."),
}

_ARGUMENTS = "covergenre.arguments"
_SUBMIT_OPTIONS = ("--address", "--wait", "--no-wait", "--working-dir")


class _Covergenre(click.Group):
    """Commands by name, each made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["demo", "sample", *_STAGES, "summary", "submit", "doctor"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _STAGES:
            return _stage_command(cmd_name)
        return _own_commands().get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would make every command to ask for its help; that imports pydantic for nothing.
        helps = {name: about for name, (_, about) in _STAGES.items()} | {
            name: str(command.short_help) for name, command in _own_commands().items()
        }
        with formatter.section("Commands"):
            formatter.write_dl([(name, helps[name]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            near = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f"no command {args[0]!r}{near}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Covergenre, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="covergenre", message="%(prog)s %(version)s")
def cli() -> None:
    """Tells an album's genres from its cover, on a cluster.

    catalog -> prepare -> dataset -> train -> model -> score -> labels
    """


def _verbose_option() -> click.Option:
    return click.Option(["--verbose"], is_flag=True, help="Show what Ray and torch log, too.")


def _stage_command(name: str) -> click.Command:
    from covergenre import config

    class_name, about = _STAGES[name]
    stage: type[config.StageConfig] = getattr(config, class_name)
    params: list[click.Parameter] = []
    # What all stages share comes last.
    for field_name, field in sorted(
        stage.model_fields.items(), key=lambda item: item[0] in config.StageConfig.model_fields
    ):
        if field.json_schema_extra:
            params.append(click.Argument([field_name], required=False, metavar=field_name.upper()))
            continue
        text = field.description or ""
        is_flag = field.annotation is bool
        if field.default is not None and not field.is_required() and not is_flag:
            shown = field.default
            shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else shown
            if shown != "":
                text += f"  [default: {shown}]"
        elif field.is_required():
            text += "  [required]"
        choices = config.options(stage, field_name)
        # Values are checked by the settings class, where a file's are; click only reads them.
        params.append(
            click.Option(
                [_flag_declaration(field_name, is_flag), field_name],
                is_flag=is_flag,
                default=None,
                metavar=None if is_flag else "|".join(choices) or _metavar(field.annotation),
                help=text,
            )
        )
    params.append(
        click.Option(["--config"], metavar="FILE", help="Settings as YAML; a flag overrides it.")
    )
    params.append(_verbose_option())

    def run(verbose: bool, **given: Any) -> None:
        settings = _settings(stage, given)
        from covergenre.cluster import command_process
        from covergenre.cluster.ray_runtime import dashboard

        if address := dashboard():
            from covergenre.cluster.jobs import submit

            arguments = click.get_current_context().meta[_ARGUMENTS]
            file = given["config"]
            sys.exit(submit(name, arguments, file, address=address, wait=True, working_dir="."))
        command_process.install()
        run_stage = getattr(import_module(f"covergenre.stages.{name}"), name)
        click.echo(run_stage(settings, verbose=verbose).summary())

    return _Stage(name, callback=run, params=params, help=about, short_help=about)


class _Stage(click.Command):
    """A stage; its arguments are kept as they were given, for a job on a cluster."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


def _settings(stage: Any, given: dict[str, Any]) -> Any:
    """What click read, with the file of --config, as the stage's settings."""
    from covergenre import config

    flags = {key: value for key, value in given.items() if value is not None}
    return config.parse(stage, flags, flags.pop("config", None))


def _check_arguments(name: str, arguments: list[str]) -> dict[str, Any]:
    """What click reads of a stage's arguments. Raises for what the stage would refuse before it
    begins."""
    from covergenre import config

    given = _stage_command(name).make_context(name, list(arguments)).params
    given.pop("verbose")
    _settings(getattr(config, _STAGES[name][0]), given)
    return given


def _flag_declaration(name: str, is_flag: bool) -> str:
    from covergenre.config import flag

    # --no-x so that a flag can overrule a file's `x: true`.
    return f"{flag(name)}/--no-{name.replace('_', '-')}" if is_flag else flag(name)


def _metavar(annotation: Any) -> str:
    text = str(annotation)
    return "N" if "int" in text else "X" if "float" in text and "tuple" not in text else "TEXT"


def _own_commands() -> dict[str, click.Command]:
    def option(*names: str, **settings: Any) -> click.Option:
        return click.Option(list(names), **settings)

    def sample(out: str, albums: int, seed: int) -> None:
        from covergenre.demo.run import make_sample

        click.echo(make_sample(out, albums, seed))

    def summary(model: str, genres: int, freeze: str | None) -> None:
        from covergenre.models.summary import layer_table

        click.echo(layer_table(model, genres, freeze))

    def demo(out: str, verbose: bool) -> None:
        from covergenre.cluster import command_process
        from covergenre.demo.run import run_demo

        command_process.install()
        run_demo(out, verbose=verbose)

    def submit(
        stage: str, arguments: tuple[str, ...], address: str | None, wait: bool, working_dir: str
    ) -> None:
        from covergenre.cluster.jobs import submit as submit_stage

        if stage not in _STAGES:
            raise ConfigError(f"no stage {stage!r}{did_you_mean(stage, _STAGES)}")
        try:
            given = _check_arguments(stage, list(arguments))
        except click.NoSuchOption as error:
            known = [*(error.possibilities or ()), *_SUBMIT_OPTIONS]
            raise click.NoSuchOption(error.option_name, possibilities=known) from error
        file = given["config"]
        code = submit_stage(
            stage, arguments, file, address=address, wait=wait, working_dir=working_dir
        )
        sys.exit(code)

    def doctor(address: str | None, storage: str | None, workers: int | None) -> None:
        from covergenre.cluster import command_process
        from covergenre.cluster.doctor import doctor as look

        command_process.install()
        sys.exit(look(address, storage, workers))

    def command(run: Callable[..., None], about: str, *params: click.Parameter) -> click.Command:
        return click.Command(
            run.__name__, callback=run, params=list(params), help=about, short_help=about
        )

    def not_empty(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        if value == "":
            raise ConfigError(f"{parameter.opts[0]}: is empty; give {examples[parameter.opts[0]]}")
        return value

    examples = {
        "--address": "the dashboard's, as http://HEAD:8265",
        "--out": "a folder",
        "--storage": "a folder or s3://BUCKET/PREFIX",
        "--working-dir": "covergenre's folder",
    }

    address = option(
        "--address",
        metavar="URL",
        callback=not_empty,
        help="The dashboard's  [default: RAY_ADDRESS, or port 8265]",
    )
    seed = option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
    return {
        "sample": command(
            sample,
            "Write a catalog of synthetic covers, for testing.",
            option(
                "--out",
                required=True,
                metavar="DIR",
                callback=not_empty,
                help="Folder to write, new or empty.",
            ),
            option("--albums", type=click.IntRange(min=1), default=600, show_default=True),
            seed,
        ),
        "summary": command(
            summary,
            "Print a model's layers and parameters.",
            click.Argument(["model"]),
            option("--genres", type=click.IntRange(min=1), default=20, show_default=True),
            option("--freeze", help="paper, none, all or N  [default: the model's]"),
        ),
        "submit": _passing_on(
            command(
                submit,
                "Run a stage as a job on a cluster.",
                click.Argument(["stage"]),
                click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED),
                address,
                option("--wait/--no-wait", default=True, help="Follow the job to its end, or not."),
                option(
                    "--working-dir",
                    default=".",
                    show_default=True,
                    metavar="DIR",
                    callback=not_empty,
                    help="covergenre's folder; it is sent to the cluster.",
                ),
            )
        ),
        "doctor": command(
            doctor,
            "Check a cluster: versions, storage, GPUs, on every node.",
            option(
                "--address",
                metavar="URL",
                callback=not_empty,
                help="The dashboard's, to look from a job  [default: RAY_ADDRESS, or from here]",
            ),
            option(
                "--storage",
                metavar="URI",
                callback=not_empty,
                help="A place to write to, read and delete again.",
            ),
            option("--workers", type=click.IntRange(min=1), help="Could so many be placed?"),
        ),
        "demo": command(
            demo,
            "Run all stages on a synthetic catalog, in minutes.",
            option(
                "--out",
                default="covergenre-demo",
                show_default=True,
                metavar="DIR",
                callback=not_empty,
            ),
            _verbose_option(),
        ),
    }


def _passing_on(command: click.Command) -> click.Command:
    # Options that are not its own are the stage's.
    command.context_settings = {"ignore_unknown_options": True}
    return command


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake is one line and exit code 2, never a traceback."""
    try:
        with log_to_stderr(), reporting(True):
            cli.main(args=list(args) if args is not None else None, standalone_mode=False)
    except click.exceptions.NoSuchOption as error:
        near = did_you_mean(error.option_name, error.possibilities or ())
        _end(f"no option {error.option_name}{near}", 2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(0)
    except click.ClickException as error:
        _end(error.format_message().replace("\n", " "), 2)
    except CovergenreError as error:
        _end(str(error).replace("\n", " "), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        from covergenre.cluster.command_process import end_now

        click.echo("covergenre: interrupted", err=True)
        end_now(130)
    except BrokenPipeError:
        sys.exit(1)


def _end(line: str, code: int) -> None:
    click.echo(f"covergenre: {line}", err=True)
    sys.exit(code)

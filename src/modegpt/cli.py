"""The ``modegpt`` command: parses, calls one library function, prints. What compresses is here."""

from __future__ import annotations

import inspect as introspection
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from .cli_models import bench, evaluate, export, generate, inspect, push, report
from .cli_options import help_of
from .config import ProfileConfig, RunConfig
from .mixture import DEFAULT as CALIBRATION

app = typer.Typer(
    name="modegpt",
    help="Make causal language models smaller without training.\n\n"
    "MoDeGPT (ICLR 2025) removes 10 to 50 % of the decoder's parameters with calibration text alone: "
    "channels of the MLPs, rotary pairs of queries and keys, and dimensions of values. The result is a "
    "Hugging Face directory.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"modegpt {version('modegpt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What goes before the name of a command."""


_Config = TypeVar("_Config", bound=RunConfig)
_Result = TypeVar("_Result")


def _default(field: str) -> Any:
    return RunConfig.model_fields[field].default


def _or_of_profile(field: str, panel: str) -> Any:
    """An option whose default is not passed on: with --profile-from, it may be that of the profile instead."""
    return typer.Option(help=help_of(field), show_default=str(_default(field)), rich_help_panel=panel)


_WHAT, _HOW, _TEXT, _RUN = "What to remove", "How to choose it", "Text", "Running"


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help=help_of("model"), metavar="MODEL")],
    output: Annotated[Path, typer.Option("--output", "-o", help=help_of("output"), rich_help_panel=_WHAT)],
    ratio: Annotated[float | None, typer.Option(help=help_of("ratio"), rich_help_panel=_WHAT)] = None,
    target_parameters: Annotated[
        str | None, typer.Option(help=help_of("target_parameters"), rich_help_panel=_WHAT)
    ] = None,
    target_size: Annotated[str | None, typer.Option(help=help_of("target_size"), rich_help_panel=_WHAT)] = None,
    max_perplexity_increase: Annotated[
        str | None, typer.Option(help=help_of("max_perplexity_increase"), rich_help_panel=_WHAT)
    ] = None,
    profile: Annotated[str, typer.Option(help=help_of("profile"), rich_help_panel=_WHAT)] = _default("profile"),
    ratio_of: Annotated[str, typer.Option(help=help_of("ratio_of"), rich_help_panel=_WHAT)] = _default("ratio_of"),
    modules: Annotated[str | None, typer.Option(help=help_of("modules"), rich_help_panel=_WHAT)] = None,
    layers: Annotated[str, typer.Option(help=help_of("layers"), rich_help_panel=_WHAT)] = _default("layers"),
    align: Annotated[str, typer.Option(help=help_of("align"), rich_help_panel=_WHAT)] = str(_default("align")),
    method: Annotated[str | None, _or_of_profile("method", _HOW)] = None,
    allocation: Annotated[str | None, typer.Option(help=help_of("allocation"), rich_help_panel=_HOW)] = None,
    temperature: Annotated[str, typer.Option(help=help_of("temperature"), rich_help_panel=_HOW)] = "auto",
    owl_threshold: Annotated[float, typer.Option(help=help_of("owl_threshold"), rich_help_panel=_HOW)] = _default(
        "owl_threshold"
    ),
    owl_reach: Annotated[float, typer.Option(help=help_of("owl_reach"), rich_help_panel=_HOW)] = _default("owl_reach"),
    statistics: Annotated[str | None, typer.Option(help=help_of("statistics"), rich_help_panel=_HOW)] = None,
    ridge: Annotated[float | None, typer.Option(help=help_of("ridge"), rich_help_panel=_HOW)] = None,
    joint_only: Annotated[bool, typer.Option("--joint-only", help=help_of("joint_only"), rich_help_panel=_HOW)] = False,
    calibration: Annotated[str | None, typer.Option(help=help_of("calibration"), rich_help_panel=_TEXT)] = None,
    samples: Annotated[int | None, _or_of_profile("samples", _TEXT)] = None,
    sequence_length: Annotated[int | None, _or_of_profile("sequence_length", _TEXT)] = None,
    seed: Annotated[int | None, _or_of_profile("seed", _TEXT)] = None,
    profile_from: Annotated[Path | None, typer.Option(help=help_of("profile_from"), rich_help_panel=_TEXT)] = None,
    evaluate: Annotated[str | None, typer.Option(help=help_of("evaluate"), rich_help_panel=_TEXT)] = None,
    evaluation_samples: Annotated[int, typer.Option(help=help_of("evaluation_samples"), rich_help_panel=_TEXT)] = 8,
    dtype: Annotated[str, typer.Option(help=help_of("dtype"), rich_help_panel=_RUN)] = _default("dtype"),
    device: Annotated[str, typer.Option(help=help_of("device"), rich_help_panel=_RUN)] = _default("device"),
    batch_size: Annotated[int, typer.Option(help=help_of("batch_size"), rich_help_panel=_RUN)] = _default("batch_size"),
    devices: Annotated[str, typer.Option(help=help_of("devices"), rich_help_panel=_RUN)] = "1",
    offload_folder: Annotated[Path | None, typer.Option(help=help_of("offload_folder"), rich_help_panel=_RUN)] = None,
    restart: Annotated[bool, typer.Option("--restart", help=help_of("restart"), rich_help_panel=_RUN)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=help_of("overwrite"), rich_help_panel=_RUN)] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help=help_of("trust_remote_code"), rich_help_panel=_RUN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.", rich_help_panel=_RUN)] = False,
) -> None:
    """Compress MODEL and write a checkpoint.

    Example: **modegpt compress HuggingFaceTB/SmolLM2-135M --ratio 0.3 --output small**
    """
    arguments = {name: value for name, value in locals().items() if name != "quiet"}
    from .console import say, summary_table
    from .parallel import first_process
    from .pipeline import compress_to_directory
    from .report import RunFacts

    report = _carry_out(compress_to_directory, _run_config(arguments, RunConfig), quiet)
    if not quiet and first_process():
        console = Console()
        console.print(summary_table(report, RunFacts.read(output)))
        say(console, f"Checkpoint: {output}")


def _carry_out(work: Callable[..., _Result], config: _Config, quiet: bool) -> _Result:
    """Do ``work`` as ``config`` says, in the processes that it asks for; its plan and progress are shown."""
    from .console import choose_progress, plan_line, say
    from .parallel import first_process, launch, launched, processes
    from .pipeline import check_start

    if (count := processes(config.devices, config.device)) > 1 and not launched():
        check_start(config)
        raise SystemExit(launch(count, sys.argv[1:]))
    quiet = quiet or not first_process()
    try:
        return work(
            config,
            choose_progress(Console(stderr=True), quiet),
            command=shlex.join(["modegpt", *sys.argv[1:]]),
            show=None if quiet else lambda plan: say(Console(stderr=True), plan_line(plan)),
        )
    except KeyboardInterrupt:
        print("modegpt: interrupted; repeat the command to go on from what is finished", file=sys.stderr)
        raise SystemExit(130) from None


def _with_options_of_compress(command: Callable[..., None], but: Collection[str] = (), **changed: Any) -> None:
    """Add ``command`` with the options of ``compress``, ``but`` for some.

    Of others something is ``changed``, given as :meth:`inspect.Parameter.replace` takes it.
    """
    signature = introspection.signature(compress, eval_str=True)
    options = [
        option.replace(**changed.get(name, {})) for name, option in signature.parameters.items() if name not in but
    ]
    options.sort(key=lambda option: option.default is not option.empty)  # what is required comes first
    vars(command)["__signature__"] = signature.replace(parameters=options)
    command.__annotations__ = {option.name: option.annotation for option in options}
    app.command()(command)


def profile(**arguments: Any) -> None:
    """Measure once what every part of MODEL is worth; `compress --profile-from` then gives any size without text.

    Example: **modegpt profile HuggingFaceTB/SmolLM2-135M --output profile**
    """
    from .console import say
    from .parallel import first_process
    from .pipeline import profile_to_directory

    quiet = arguments.pop("quiet")
    _carry_out(profile_to_directory, _run_config(arguments, ProfileConfig), quiet)
    if not quiet and first_process():
        say(Console(), f"Profile: {arguments['output']}; modegpt curve {arguments['output']} shows what it predicts")


_with_options_of_compress(
    profile,
    but=(
        *("ratio", "target_parameters", "target_size", "max_perplexity_increase", "profile", "ratio_of"),
        *("layers", "align"),
        *("allocation", "temperature", "owl_threshold", "owl_reach", "statistics"),
        *("profile_from", "evaluate", "evaluation_samples"),
    ),
    output={
        "annotation": Annotated[
            Path, typer.Option("--output", "-o", help="Directory for the profile.", rich_help_panel=_WHAT)
        ]
    },
    calibration={"default": CALIBRATION},
    overwrite={
        "annotation": Annotated[
            bool,
            typer.Option(
                "--overwrite", help="Replace an earlier profile in the output directory.", rich_help_panel=_RUN
            ),
        ]
    },
)


@app.command()
def curve(
    directory: Annotated[Path, typer.Argument(help="What `profile` wrote.", metavar="PROFILE")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this image file (.png, .svg, .pdf).")] = None,
    align: Annotated[int, typer.Option(help="Round ranks to multiples of this many channels.", min=1)] = 1,
) -> None:
    """Predict perplexity against size from a profile, and mark the knee.

    On the text that sensitivities were measured on. Of how modules act on one another, predictions know what all of
    attention and all MLPs cost together, at one rank.
    """
    from .console import curve_table, say
    from .curve import plot as draw
    from .curve import predicted_curve

    found = predicted_curve(directory, align)
    Console().print(curve_table(found))
    if plot is not None:
        draw(found, plot)
        say(Console(), f"Plot: {plot}")


def _run_config(arguments: dict[str, Any], kind: type[_Config]) -> _Config:
    if arguments.get("temperature", "auto") != "auto":
        arguments["temperature"] = _number(arguments["temperature"], "--temperature")
    if arguments.get("align", "").isdecimal():
        arguments["align"] = int(arguments["align"])
    if arguments["devices"].isdigit():
        arguments["devices"] = int(arguments["devices"])
    return kind.validated(**{name: value for name, value in arguments.items() if value is not None})


def plan(**arguments: Any) -> None:
    """Predict what `compress` with the same options will take: memory, disk, arithmetic and time.

    Nothing but the model's config is read; for the times, a random layer of its shape is run. Exit code 2 if this
    machine cannot hold it.
    """
    from .console import plan_table
    from .pipeline import plan_request
    from .plan import check_plan

    del arguments["quiet"]
    config = _run_config(arguments, RunConfig)
    config, _, predicted, shape = plan_request(config)
    Console().print(plan_table(predicted))
    check_plan(predicted, config, shape)


# Where the output goes is not needed.
_with_options_of_compress(plan, output={"default": Path("compressed")})


for _command in (evaluate, bench, report, push, generate, export, inspect):
    app.command()(_command)


@app.command()
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the supported model families and what is special about each."""
    from .console import families_table
    from .families import family_rows

    if markdown:
        for number, row in enumerate(family_rows()):
            print(f"| {' | '.join(row)} |" + ("\n|" + "---|" * len(row) if number == 0 else ""))
    else:
        Console().print(families_table())


def _number(text: str, option: str) -> float:
    from .errors import InvalidRequest

    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"{option} {text!r}: use 'auto' or a positive number") from None


def main() -> None:
    """Entry point: one line and exit code 2 for a wrong request or input, 1 for a failure on the way."""
    from .errors import CheckpointError, InvalidRequest, ModeGPTError, NumericalError
    from .parallel import first_process

    _calm_libraries()
    try:
        app()
    except ModeGPTError as error:
        if first_process() or not isinstance(error, (InvalidRequest, NumericalError)):  # these are raised by all
            print(f"modegpt: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (InvalidRequest, CheckpointError)) else 1)


def _calm_libraries() -> None:
    """Our progress is the only one shown."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

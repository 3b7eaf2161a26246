"""The ``modegpt`` command: parses, calls one library function, prints."""

from __future__ import annotations

import inspect as introspection
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from .config import ProfileConfig, RunConfig
from .data import HUB_DATASETS
from .mixture import DEFAULT as CALIBRATION

if TYPE_CHECKING:
    from .results_file import ResultsFile

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


def _help(field: str) -> str:
    return RunConfig.model_fields[field].description or ""


def _default(field: str) -> Any:
    return RunConfig.model_fields[field].default


def _or_of_profile(field: str, panel: str) -> Any:
    """An option whose default is not passed on: with --profile-from, it may be that of the profile instead."""
    return typer.Option(help=_help(field), show_default=str(_default(field)), rich_help_panel=panel)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result and errors.")]
Device = Annotated[str, typer.Option(help=_help("device"))]
Dtype = Annotated[str, typer.Option(help=_help("dtype"))]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=_help("trust_remote_code"))]
_WHAT, _HOW, _TEXT, _RUN = "What to remove", "How to choose it", "Text", "Running"


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help=_help("model"), metavar="MODEL")],
    output: Annotated[Path, typer.Option("--output", "-o", help=_help("output"), rich_help_panel=_WHAT)],
    ratio: Annotated[float | None, typer.Option(help=_help("ratio"), rich_help_panel=_WHAT)] = None,
    target_parameters: Annotated[
        str | None, typer.Option(help=_help("target_parameters"), rich_help_panel=_WHAT)
    ] = None,
    target_size: Annotated[str | None, typer.Option(help=_help("target_size"), rich_help_panel=_WHAT)] = None,
    max_perplexity_increase: Annotated[
        str | None, typer.Option(help=_help("max_perplexity_increase"), rich_help_panel=_WHAT)
    ] = None,
    profile: Annotated[str, typer.Option(help=_help("profile"), rich_help_panel=_WHAT)] = _default("profile"),
    ratio_of: Annotated[str, typer.Option(help=_help("ratio_of"), rich_help_panel=_WHAT)] = _default("ratio_of"),
    modules: Annotated[str | None, typer.Option(help=_help("modules"), rich_help_panel=_WHAT)] = None,
    layers: Annotated[str, typer.Option(help=_help("layers"), rich_help_panel=_WHAT)] = _default("layers"),
    align: Annotated[str, typer.Option(help=_help("align"), rich_help_panel=_WHAT)] = str(_default("align")),
    method: Annotated[str | None, _or_of_profile("method", _HOW)] = None,
    allocation: Annotated[str | None, typer.Option(help=_help("allocation"), rich_help_panel=_HOW)] = None,
    temperature: Annotated[str, typer.Option(help=_help("temperature"), rich_help_panel=_HOW)] = "auto",
    owl_threshold: Annotated[float, typer.Option(help=_help("owl_threshold"), rich_help_panel=_HOW)] = _default(
        "owl_threshold"
    ),
    owl_reach: Annotated[float, typer.Option(help=_help("owl_reach"), rich_help_panel=_HOW)] = _default("owl_reach"),
    statistics: Annotated[str | None, typer.Option(help=_help("statistics"), rich_help_panel=_HOW)] = None,
    ridge: Annotated[float | None, typer.Option(help=_help("ridge"), rich_help_panel=_HOW)] = None,
    joint_only: Annotated[bool, typer.Option("--joint-only", help=_help("joint_only"), rich_help_panel=_HOW)] = False,
    calibration: Annotated[str | None, typer.Option(help=_help("calibration"), rich_help_panel=_TEXT)] = None,
    samples: Annotated[int | None, _or_of_profile("samples", _TEXT)] = None,
    sequence_length: Annotated[int | None, _or_of_profile("sequence_length", _TEXT)] = None,
    seed: Annotated[int | None, _or_of_profile("seed", _TEXT)] = None,
    profile_from: Annotated[Path | None, typer.Option(help=_help("profile_from"), rich_help_panel=_TEXT)] = None,
    evaluate: Annotated[str | None, typer.Option(help=_help("evaluate"), rich_help_panel=_TEXT)] = None,
    evaluation_samples: Annotated[int, typer.Option(help=_help("evaluation_samples"), rich_help_panel=_TEXT)] = 8,
    dtype: Annotated[str, typer.Option(help=_help("dtype"), rich_help_panel=_RUN)] = _default("dtype"),
    device: Annotated[str, typer.Option(help=_help("device"), rich_help_panel=_RUN)] = _default("device"),
    batch_size: Annotated[int, typer.Option(help=_help("batch_size"), rich_help_panel=_RUN)] = _default("batch_size"),
    devices: Annotated[str, typer.Option(help=_help("devices"), rich_help_panel=_RUN)] = "1",
    offload_folder: Annotated[Path | None, typer.Option(help=_help("offload_folder"), rich_help_panel=_RUN)] = None,
    restart: Annotated[bool, typer.Option("--restart", help=_help("restart"), rich_help_panel=_RUN)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_help("overwrite"), rich_help_panel=_RUN)] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help=_help("trust_remote_code"), rich_help_panel=_RUN)
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
        print("modegpt: interrupted; repeat the command to go on", file=sys.stderr)
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


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Compressed checkpoints, or any MODEL that `compress` takes; the others are compared with the first.",
            metavar="MODEL...",
        ),
    ],
    perplexity: Annotated[
        str | None,
        typer.Option(
            help=f"Texts: {', '.join(HUB_DATASETS)} (their test parts), or text files, separated by commas. "
            "wikitext2 where no --tasks are given."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows from the start of a text; all by default.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Windows begin every so many tokens, and only tokens that no window before had count. By default they "
            "follow one another."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, separated by commas: arc_easy,piqa,... (needs lm-eval)."),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Directory with the tasks' data, TASK_SPLIT.jsonl or .jsonl.gz, in place of the hub's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions from the start of each task; all by default.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Answered examples before each question; by default what the task says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or answers of a task, run at once.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write all numbers into this .json file.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Measure dense or compressed models, side by side: perplexity on texts, accuracy on tasks.

    Perplexity is exp of the mean negative log-likelihood over windows, without special tokens. Accuracies and their
    standard errors are those of lm-evaluation-harness.

    Example: **modegpt evaluate HuggingFaceTB/SmolLM2-135M small --tasks arc_easy,piqa --perplexity wikitext2,ptb**
    """
    arguments = dict(locals())
    from .comparison import Texts, compare, facts_of, split_names
    from .comparison_tables import print_scores
    from .console import choose_progress
    from .tasks import Tasks

    _goes_with("--perplexity", tasks is None or perplexity is not None, {"samples": samples, "stride": stride})
    _goes_with("--tasks", tasks is not None, {"task-data": task_data, "limit": limit, "num-fewshot": num_fewshot})
    texts = asked = None
    if tasks is None or perplexity is not None:
        windows = {"samples": samples, "sequence_length": sequence_length, "stride": stride}
        texts = Texts.parse("wikitext2" if perplexity is None else perplexity, **windows)
    if tasks is not None:
        asked = Tasks(split_names(tasks, "--tasks"), task_data, limit, num_fewshot)
    file = _results_file(output, arguments)
    scores = compare(
        models,
        texts,
        asked,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=choose_progress(Console(stderr=True), quiet),
        finished=(lambda found: file.write(facts_of(found))) if file else None,
    )
    print_scores(Console(), scores)


def _results_file(output: Path | None, arguments: dict[str, Any]) -> ResultsFile | None:
    """The file that ``output`` names, with the ``arguments`` of the command."""
    from .results_file import ResultsFile

    settings = {name: value for name, value in arguments.items() if name not in ("models", "output", "quiet")}
    return None if output is None else ResultsFile(output, shlex.join(["modegpt", *sys.argv[1:]]), settings)


def _goes_with(needed: str, given: bool, options: dict[str, Any]) -> None:
    """Refuse ``options`` that say something of what is not measured."""
    from .errors import InvalidRequest

    for name, value in options.items():
        if value is not None and not given:
            raise InvalidRequest(f"--{name} {value}: goes with {needed}, which is not given")


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Compressed checkpoints, or any MODEL that `compress` takes; the others are compared with the first.",
            metavar="MODEL...",
        ),
    ],
    batch_sizes: Annotated[str, typer.Option(help="Numbers of sequences, separated by commas.")] = "1,8",
    sequence_length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens that follow the first one, one by one.")] = 32,
    repeats: Annotated[int, typer.Option(help="How often each model is measured, in turn with the others.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Processor threads; by default PyTorch's choice.")] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the models first, by torch.compile (needs a C++ compiler or Triton)."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write all numbers into this .json file.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast dense and compressed models are, side by side in one process.

    Prompts and greedy continuations of random tokens, each model in turn; ratios to the first model are taken within a
    repeat.

    Example: **modegpt bench HuggingFaceTB/SmolLM2-135M small --batch-sizes 1,8 --threads 2**
    """
    arguments = dict(locals())
    import torch

    from .bench import Load, facts_of, measure
    from .comparison_tables import print_speeds
    from .console import choose_progress
    from .errors import InvalidRequest

    if not all(size.strip().isdecimal() for size in batch_sizes.split(",")):
        raise InvalidRequest(f"--batch-sizes {batch_sizes!r}: give whole numbers separated by commas")
    load = Load([int(size) for size in batch_sizes.split(",")], sequence_length, new_tokens, repeats)
    file = _results_file(output, arguments)
    if threads is not None:
        if threads < 1:
            raise InvalidRequest(f"--threads {threads}: must be at least 1")
        torch.set_num_threads(threads)
    speeds = measure(
        models,
        load,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        compiled=compile,
        progress=choose_progress(Console(stderr=True), quiet),
    )
    if file is not None:
        file.write(facts_of(speeds, load))
    print_speeds(Console(), speeds, load)


@app.command()
def report(
    checkpoints: Annotated[list[Path], typer.Argument(help="Directories of compressed models.", metavar="DIR...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .html file to write.")] = Path("report.html"),
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="A file of evaluate --output; can be given several times.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="A file of bench --output; can be given several times.")
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            help="What modegpt profile wrote, for its curve beside what was measured; can be given several times."
        ),
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Also write all figures as PNG and SVG files into it.")] = None,
) -> None:
    """Write one page of HTML about compressed models: what they are, how good, how fast, layer by layer.

    It needs nothing but itself: no scripts, no files beside it.

    Example: **modegpt report small-20 small-30 --evaluation quality.json --bench speed.json -o report.html**
    """
    from .console import say
    from .curve import predicted_curve
    from .page import Bench, Checkpoint, Evaluation, Page, check_page, read_results

    check_page(output, figures)
    Page(
        [Checkpoint.read(directory) for directory in checkpoints],
        [read_results(path, Evaluation, "--evaluation") for path in evaluation or ()],
        [read_results(path, Bench, "--bench") for path in bench or ()],
        [predicted_curve(directory) for directory in profile or ()],
    ).write(output, figures)
    say(Console(), f"Written: {output}")


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a compressed model.", metavar="DIR")],
    repository: Annotated[str, typer.Argument(help="Where to on the hub, such as name/smollm2-30.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made now: for the owner alone.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Compressed with modegpt",
) -> None:
    """Upload a compressed model to the Hugging Face hub, with its model card.

    Log in first: **hf auth login**, or the environment variable HF_TOKEN.
    """
    from .console import say
    from .hub import push_to_hub

    say(Console(), f"Uploaded: {push_to_hub(checkpoint, repository, private=private, message=message)}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint, or any MODEL that `compress` takes.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue PROMPT greedily."""
    from .address import open_model
    from .evaluation import generate_text

    tokenizer, _, open_it = open_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    text = generate_text(open_it(), tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat)
    print(text)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint, or any MODEL that `compress` takes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .gguf file, or a directory for a stock model.")],
    format: Annotated[
        str,
        typer.Option(
            help="'gguf', a file for llama.cpp; 'stock', a LlamaForCausalLM that needs no code of modegpt's; 'onnx', a "
            "graph for ONNX Runtime.",
        ),
    ],
    type: Annotated[
        str,
        typer.Option(
            help="What a GGUF file's matrices are stored as: f32, f16, bf16, q8_0, q4_0, ...; q4_k_m and the like."
        ),
    ] = "f16",
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="llama.cpp's name for how the tokenizer splits text, where it cannot be told.")
    ] = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Write MODEL for other engines, which it computes the same in.

    Where the engine wants all heads or layers alike, zeros fill them up; how many is printed.
    """
    from .console import choose_progress, export_line, say
    from .exports.export import export as carry_out

    facts = carry_out(
        model,
        output,
        format,
        kind=type,
        pre_tokenizer=pre_tokenizer,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=choose_progress(Console(stderr=True), quiet),
    )
    if not quiet:
        say(Console(), export_line(facts))


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A compressed checkpoint.", metavar="DIR")],
) -> None:
    """Show what was kept in each layer of a compressed checkpoint, and at what error."""
    from .console import experts_lines, layer_table, say, summary_table
    from .report import CompressionReport, RunFacts

    report = CompressionReport.read(directory)
    console = Console()
    console.print(summary_table(report, RunFacts.read(directory)))
    console.print(layer_table(report))
    for line in experts_lines(report):
        say(console, line)
    say(console, f"Made by: {report.command}")


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

"""From a model's address to a compressed checkpoint: refuse early, then read, compress, evaluate, write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .checkpoint import check_output, publish, publish_profile, published
from .config import HELD_OUT, NONE, ProfileConfig, RunConfig
from .data import (
    SELF,
    TokenWindows,
    check_length,
    check_source,
    read_text,
    sample_from_model,
    tokenize,
)
from .engine import Compression, Engine
from .errors import InvalidRequest
from .families import check_family, check_model, model_geometry
from .journal import Journal, check_unfinished, open_journal
from .kept import Kept, open_kept
from .layered import LayeredModel
from .methods import METHODS
from .mixture import Cut, Mixture, Texts, interleave, leading_windows, read_mixture
from .origin import Origin, model_identity, profile_hash
from .parallel import Workers, local_device, processes, restarts, workers
from .plan import Plan, Shape, check_plan, make_plan
from .profile import probe_shape
from .progress import Progress
from .report import (
    CompressionReport,
    Pair,
    RunFacts,
    TextFacts,
    build_report,
    peak_device_memory,
    peak_memory,
    versions,
)
from .sources import ModelSource, check_vocabulary, empty_model


@dataclass(frozen=True)
class Request:
    """A compression that was found possible, and what was read to find out."""

    config: RunConfig
    source: ModelSource
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    origin: Origin | None = None
    """Of the profile that it goes by, where there is one."""
    kept: Kept | None = None
    """The profile itself."""


def compress_to_directory(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    command: str | None = None,
    show: Callable[[Plan], object] | None = None,
) -> CompressionReport:
    """Carry out ``config``: everything wrong is refused before any weight is loaded.

    An interrupted run of the same config goes on where it was. Under ``torchrun`` the processes share the work.
    ``command`` is what the report says to repeat it with; without, this call. ``show`` is called with the plan.
    """
    with _begun(config, progress, show) as run:
        return _compress(run, command)


def check_request(config: RunConfig, *, timed: bool) -> Request:
    """Refuse whatever is wrong with ``config`` or does not fit this machine; ``timed`` plans take some seconds more."""
    # Of a group that torchrun started again, nothing is to be thrown away a second time.
    config = config.model_copy(
        update={"device": local_device(config.device), "restart": config.restart and restarts() == 0}
    )
    source = ModelSource(config.model, config.trust_remote_code)
    source.check()
    origin, kept = None, None
    if config.profile_from is not None:
        origin, kept = Origin.read(config.profile_from), open_kept(config.profile_from)
        config = origin.applied(config)
    mixture = Mixture.parse(SELF if origin or config.calibration == NONE else config.calibration)
    evaluated = [config.evaluate] if Path(config.evaluate).is_file() else []
    finished = published(config.output) and not config.restart
    if not finished:
        inputs = [config.model, *mixture.files, *evaluated, *([str(config.profile_from)] if origin else [])]
        profile = isinstance(config, ProfileConfig)
        check_output(config.output, overwrite=config.overwrite, inputs=inputs, profile=profile)
    mixture.check(config.samples)
    if config.evaluate not in (HELD_OUT, NONE):
        check_source(config.evaluate, option="--evaluate")
    if any(Path(name).samefile(source) for name in evaluated for source in mixture.files):
        raise InvalidRequest(
            f"--evaluate {config.evaluate!r} is a calibration text; use 'held-out' to keep a part of it"
        )
    batches = math.ceil(config.samples / config.batch_size)
    count = processes(config.devices, config.device)
    if config.calibrates and count > batches:
        raise InvalidRequest(
            f"--devices {count}: there are {batches} batches to share; use fewer processes, more "
            "--samples or a smaller --batch-size"
        )
    config, model_config, plan, shape = plan_request(config, timed=timed)
    if origin is not None:
        origin.check(model_identity(model_config, source.fingerprint()))
        assert kept is not None
        assert kept.profile is not None
        method = METHODS[config.method].from_config(config)
        layers = model_geometry(empty_model(model_config, config.trust_remote_code), method.geometry)
        kept.profile.check(layers, config.modules)
    if not finished:
        check_plan(plan, config, shape)
    tokenizer = source.tokenizer()
    check_vocabulary(tokenizer, model_config)
    return Request(config, source, model_config, tokenizer, plan, origin, kept)


def check_start(config: RunConfig) -> None:
    """Refuse, before processes are started, whatever they would refuse."""
    request = check_request(config, timed=False)
    check_unfinished(config.output, _fingerprint(request, read_texts(config, request.tokenizer)), config.restart)


def plan_request(config: RunConfig, *, timed: bool = True) -> tuple[RunConfig, PreTrainedConfig, Plan, Shape]:
    """``config`` with its ratio, the model's config, what it will take, and the shape that this follows from."""
    if config.profile_from is not None:
        config = Origin.read(config.profile_from).applied(config)
    source = ModelSource(config.model, config.trust_remote_code)
    model_config = source.config()
    check_family(model_config)
    if config.calibrates or config.evaluate != NONE:
        check_length(config.sequence_length, model_config)
    config, plan, shape = make_plan(config, source, model_config, timed=timed)
    return config, model_config, plan, shape


@dataclass(frozen=True)
class _Run:
    """A request under way."""

    request: Request
    texts: Texts
    engine: Engine
    journal: Journal | None
    """The first worker's."""
    published: bool
    """Whether the checkpoint is in its place already; the texts are then as they were read."""


@contextmanager
def _begun(config: RunConfig, progress: Progress | None, show: Callable[[Plan], object] | None) -> Iterator[_Run]:
    """Refuse what is wrong with ``config``, show the plan, and open the run with the other processes."""
    request = check_request(config, timed=show is not None)
    if show is not None:
        show(request.plan)
    with workers(request.config.device) as crew, _opened(request, progress, crew) as run:
        yield run


@contextmanager
def _opened(request: Request, progress: Progress | None, crew: Workers) -> Iterator[_Run]:
    """Read the texts and open the model and the journal."""
    progress = (progress if crew.first else None) or Progress()
    config, source = request.config, request.source
    with progress.phase("text") if _reads_text(config) else nullcontext():
        texts = read_texts(config, request.tokenizer)
    with progress.phase("load"):
        dense = source.streamed(request.model_config, config.dtype, config.device)
    check_model(dense.model, loaded=False)
    with _journal(request, texts, crew) as journal:
        done = crew.tell(journal is not None and published(config.output))
        if not done:
            if journal is not None and journal.starts > 1:
                again = f"; done again because damaged: {', '.join(map(str, journal.broken))}" if journal.broken else ""
                progress.note(f"Going on with an interrupted run: {len(journal.finished)} layers are finished{again}")
            texts = _sampled(request, texts, journal, crew, progress)
        engine = Engine(
            dense,
            texts.calibration,
            config.batch_size,
            probe=texts.probe_windows,
            progress=progress,
            workers=crew,
            journal=journal,
            kept=request.kept,
        )
        with engine.active():
            yield _Run(request, texts, engine, journal, done)


def _compress(run: _Run, command: str | None) -> CompressionReport:
    config, engine, journal, texts = run.request.config, run.engine, run.journal, run.texts
    if run.published:
        report = CompressionReport.read(config.output)
        if journal is not None:
            journal.remove()
        return report
    result, origin = engine.run(config), run.request.origin
    report = build_report(
        engine.dense.model,
        result,
        config,
        origin.calibration if origin else _calibration_facts(config, texts),
        command=command or f"modegpt.compress_to_directory({config!r})",
        source=config.model,
        evaluation=_evaluation_facts(config, texts),
        perplexities=_perplexities(engine, result, texts.evaluation, journal),
    )
    if journal is not None:
        _publish(run.request, journal, result, report, engine)
    return report


def profile_to_directory(
    config: ProfileConfig,
    progress: Progress | None = None,
    *,
    command: str | None = None,
    show: Callable[[Plan], object] | None = None,
) -> Origin:
    """Make the profile that ``config`` describes, for ``profile_from`` of later compressions.

    Refusals, ``command`` and ``show`` as for :func:`compress_to_directory`.
    """
    with _begun(config, progress, show) as run:
        request = run.request
        run.engine.profile(request.config)
        origin = Origin(
            command=command or f"modegpt.profile_to_directory({config!r})",
            versions=versions(),
            source=config.model,
            model=model_identity(request.model_config, request.source.fingerprint()),
            dtype=str(run.engine.dense.model.dtype).removeprefix("torch."),
            options=request.config.settings(),
            calibration=_calibration_facts(config, run.texts),
            probe=None if run.texts.probe_windows is None else TextFacts.of("probe", run.texts.probe_windows),
        )
        if run.journal is not None:
            publish_profile(run.journal, config.output, origin, request.model_config, overwrite=config.overwrite)
    return origin


def _publish(
    request: Request,
    journal: Journal,
    result: Compression,
    report: CompressionReport,
    engine: Engine,
) -> None:
    """Put the checkpoint in its place, with what the run took beside it."""
    facts = RunFacts(
        seconds=engine.progress.seconds,
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=peak_device_memory(result.thin.device),
        processes=engine.workers.size,
        starts=journal.starts,
        planned=request.plan.model_dump(mode="json"),
    )
    config = request.config
    publish(
        journal,
        result.thin,
        config.output,
        tokenizer=request.tokenizer,
        report=report,
        run=facts,
        overwrite=config.overwrite,
    )


@contextmanager
def _journal(request: Request, texts: Texts, crew: Workers) -> Iterator[Journal | None]:
    """The run's journal, for the first worker."""
    if not crew.first:
        yield None
        return
    config = request.config
    fingerprint = _fingerprint(request, texts)
    with open_journal(config.output, fingerprint, restart=config.restart, offload=config.offload_folder) as journal:
        yield journal


def _fingerprint(request: Request, texts: Texts) -> dict[str, Any]:
    """Everything that the result depends on."""
    config = request.config
    options = {f"--{name.replace('_', '-')}": value for name, value in config.settings().items()}
    del options["--model"], options["--trust-remote-code"]  # what counts is the model that was found there
    options["--device"] = torch.device(config.device).type
    return {
        "the model's config": sha256(request.model_config.to_json_string().encode()).hexdigest(),
        "the model's weights": request.source.fingerprint(),
        **options,
        "--profile-from": None if config.profile_from is None else profile_hash(config.profile_from),
        **{f"the {name} tokens": number for name, number in texts.hashes().items()},
        **{f"the version of {name}": number for name, number in versions().items()},
    }


def _reads_text(config: RunConfig) -> bool:
    """Whether any text is, to calibrate or to be measured on."""
    return _reads_calibration(config) or config.evaluate not in (HELD_OUT, NONE)


def _reads_calibration(config: RunConfig) -> bool:
    """Whether the text of ``--calibration`` is read: to calibrate, or to hold some out of it."""
    wanted = config.calibrates or config.evaluate == HELD_OUT
    return config.profile_from is None and config.calibration != NONE and wanted


def read_texts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The windows of a run, as far as the model does not write them itself."""
    length, count = config.sequence_length, config.evaluation_samples
    texts, held_out = Texts(config.seed), config.evaluate == HELD_OUT
    if _reads_calibration(config):
        mixture = Mixture.parse(config.calibration)
        cut = Cut(
            samples=config.samples,
            length=length,
            seed=config.seed,
            held_out=count if held_out else 0,
            probe=probe_shape(length, len(mixture.shares)) if config.allocation == "sensitivity" else None,
        )
        texts = read_mixture(mixture, tokenizer, cut)
        if not config.calibrates:  # what is held out is all that is wanted
            texts = replace(texts, parts={}, written={**texts.written, "parts": 0} if texts.written else {})
    if config.evaluate not in (HELD_OUT, NONE):
        ids = tokenize(tokenizer, read_text(config.evaluate, evaluation=True))
        windows = leading_windows(ids, count, length, what=f"--evaluate {config.evaluate}")
        texts = replace(texts, evaluation={config.evaluate: windows})
    return texts


def _sampled(request: Request, texts: Texts, journal: Journal | None, crew: Workers, progress: Progress) -> Texts:
    """``texts`` with what the model is to write, which is sampled from it where not yet done."""
    config, count = request.config, sum(texts.written.values())
    if count == 0:
        return texts
    windows = journal.windows() if journal else None
    if crew.first and windows is None:
        with progress.phase("sample"):
            model = request.source.model(config.dtype, config.device)
            windows = sample_from_model(model, request.tokenizer, count, config.sequence_length, config.seed)
            del model
        assert journal is not None
        journal.keep_windows(windows)
    ids = crew.tell(None if windows is None else windows.ids)
    assert ids is not None
    return texts.complete(TokenWindows(ids))


def _perplexities(
    engine: Engine,
    result: Compression,
    texts: Mapping[str, TokenWindows],
    journal: Journal | None,
) -> dict[str, Pair]:
    """Perplexity of both models on each of ``texts``, one layer at a time."""
    if not texts:
        return {}
    models: dict[str, LayeredModel] = {"dense": engine.dense, "compressed": result.thin}
    values: dict[str, dict[str, float]] = {text: {} for text in texts}
    with engine.progress.phase("evaluate", len(texts) * sum(len(model.layers) for model in models.values())):
        for (text, windows), (name, model) in itertools.product(texts.items(), models.items()):
            key = f"{name} on {text}"
            known = engine.workers.tell(journal.perplexity(key) if journal else None)
            value = engine.perplexity(model, windows) if known is None else known
            values[text][name] = value
            if journal is not None and known is None:
                journal.keep_perplexity(key, value)
    return {text: Pair(**pair) for text, pair in values.items()}


def _calibration_facts(config: RunConfig, texts: Texts) -> TextFacts:
    return TextFacts.of(config.calibration, texts.calibration, texts.parts)


def _evaluation_facts(config: RunConfig, texts: Texts) -> TextFacts | None:
    if not texts.evaluation:
        return None
    source = f"{config.calibration}, held out" if config.evaluate == HELD_OUT else config.evaluate
    return TextFacts.of(source, interleave(list(texts.evaluation.values()), texts.seed), texts.evaluation)

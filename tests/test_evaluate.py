"""``modegpt evaluate``: several models, texts and tasks; accuracies are those of log-likelihoods taken one by one."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import modegpt
from helpers import WORDS, Outcome, compress_arguments, run_cli, tiny_llama, tiny_tokenizer
from modegpt.address import open_model
from modegpt.comparison import ModelScores, Texts, TextScore
from modegpt.comparison_tables import text_table
from modegpt.data import tokenize
from modegpt.task_rows import files_of
from modegpt.tasks import Tasks, TaskScore, degradation, mean

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm-eval) is not installed")

Row = dict[str, Any]
#: Rows in a file of a task.
ROWS = 12


@dataclass(frozen=True)
class Question:
    """Pairs of a prompt and what follows it, by which number is right, and what lengths of answers are divided out."""

    pairs: Sequence[tuple[str, str]]
    right: int
    lengths: Sequence[int] = ()

    @classmethod
    def of(cls, prompt: str, answers: Sequence[str], right: int) -> Question:
        return cls([(prompt, f" {answer}") for answer in answers], right, [len(answer) for answer in answers])


def words(choose: random.Random, count: int) -> str:
    return " ".join(choose.choices(WORDS.split(), k=count))


def arc(choose: random.Random) -> tuple[Row, Question]:
    stem, answers, right = words(choose, 5), [words(choose, n) for n in (1, 3, 5)], choose.randrange(3)
    labelled = [{"text": text, "label": label} for text, label in zip(answers, "123", strict=True)]
    row = {"question": {"stem": stem, "choices": labelled}, "answerKey": "123"[right]}
    return row, Question.of(f"Question: {stem}\nAnswer:", answers, right)


def arc_of_the_hub(choose: random.Random) -> tuple[Row, Question]:
    stem, answers, right = words(choose, 5), [words(choose, n) for n in (1, 3, 5)], choose.randrange(3)
    row = {"question": stem, "choices": {"text": answers, "label": ["A", "B", "C"]}, "answerKey": "ABC"[right]}
    return row, Question.of(f"Question: {stem}\nAnswer:", answers, right)


def piqa(choose: random.Random) -> tuple[Row, Question]:
    goal, answers, right = words(choose, 5), [words(choose, n) for n in (2, 4)], choose.randrange(2)
    row = {"goal": goal, "sol1": answers[0], "sol2": answers[1], "label": right}
    return row, Question.of(f"Question: {goal}\nAnswer:", answers, right)


def winogrande(choose: random.Random) -> tuple[Row, Question]:
    before, after, right = words(choose, 5), words(choose, 5), choose.randrange(2)
    row = {"sentence": f"{before} _ {after}.", "option1": "a model", "option2": "key", "answer": str(right + 1)}
    return row, Question([(f"{before} {option}", f" {after}.") for option in ("a model", "key")], right)


def hellaswag(choose: random.Random) -> tuple[Row, Question]:
    first, second, right = words(choose, 5), words(choose, 2), choose.randrange(4)
    answers = [words(choose, n) for n in (1, 2, 3, 4)]
    row = {"activity_label": "Keeping", "ctx_a": f"[header] {first}", "ctx_b": second, "label": str(right)}
    row |= {"endings": [f"{answer} [substeps]" for answer in answers]}
    marked = [answer + " " for answer in answers]
    return row, Question.of(f"Keeping:  {first} {second.capitalize()}".replace("  ", " "), marked, right)


def boolq(choose: random.Random) -> tuple[Row, Question]:
    passage, question, right = words(choose, 9), words(choose, 5), choose.randrange(2)
    row = {"passage": passage, "question": question, "answer": bool(right)}
    return row, Question.of(f"{passage}\nQuestion: {question}?\nAnswer:", ["no", "yes"], right)


def openbookqa(choose: random.Random) -> tuple[Row, Question]:
    stem, answers, right = words(choose, 5), [words(choose, n) for n in (1, 2, 3, 4)], choose.randrange(4)
    return {"question_stem": stem, "choices": answers, "answerKey": "ABCD"[right]}, Question.of(stem, answers, right)


def mathqa(choose: random.Random) -> tuple[Row, Question]:
    problem, right = words(choose, 7), choose.randrange(5)
    answers = [str(choose.randrange(10**n)) for n in (1, 2, 3, 4, 5)]
    options = " , ".join(f"{letter} ) {answer}" for letter, answer in zip("abcde", answers, strict=True))
    row = {"Problem": problem, "options": options, "correct": "abcde"[right]}
    return row, Question.of(f"Question: {problem}\nAnswer:", answers, right)


def copa(choose: random.Random) -> tuple[Row, Question]:
    """The harness puts two blanks before the answers."""
    premise, answers, right = words(choose, 5), [words(choose, n) for n in (3, 4)], choose.randrange(2)
    row = {"premise": f"{premise}.", "question": "effect", "label": right}
    row |= {f"choice{number}": answer.capitalize() for number, answer in enumerate(answers, 1)}
    return row, Question.of(f"{premise} therefore", [f" {answer}" for answer in answers], right)


def lambada(choose: random.Random) -> tuple[Row, Question]:
    context, last = words(choose, 9), words(choose, 1)
    return {"context": context, "continuation": last}, Question([(context, f" {last}")], 0)


def mmlu(choose: random.Random) -> tuple[Row, Question]:
    subject = choose.choice(["anatomy", "computer_security"])
    question, answers, right = words(choose, 6), [words(choose, 2) for _ in "ABCD"], choose.randrange(4)
    prompt = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n{question}\n"
    )
    prompt += "".join(f"{letter}. {answer}\n" for letter, answer in zip("ABCD", answers, strict=True)) + "Answer:"
    row = {"subject": subject, "question": question, "choices": answers, "answer": "ABCD"[right]}
    return row, Question.of(prompt, list("ABCD"), right)


#: By task, its file and what makes a row of it and the question that the harness puts.
MAKERS: dict[str, tuple[str, Callable[[random.Random], tuple[Row, Question]]]] = {
    "arc_easy": ("arc_easy_test.jsonl", arc),
    "arc_challenge": ("arc_challenge.jsonl.gz", arc_of_the_hub),
    "piqa": ("piqa_val.jsonl", piqa),
    "winogrande": ("winogrande_validation.jsonl", winogrande),
    "hellaswag": ("hellaswag_val_short.jsonl.gz", hellaswag),
    "boolq": ("boolq_val.jsonl", boolq),
    "openbookqa": ("openbookqa_test.jsonl", openbookqa),
    "mathqa": ("mathqa_test.jsonl", mathqa),
    "copa": ("copa_dev.jsonl", copa),
    "lambada_openai": ("lambada_openai_test.jsonl", lambada),
    "mmlu": ("mmlu_test.jsonl", mmlu),
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Question]]]:
    """A directory with a file for every task, and what is asked."""
    directory, asked = tmp_path_factory.mktemp("tasks"), {}
    for task, (name, make) in MAKERS.items():
        made = [make(random.Random(f"{task} {number}")) for number in range(ROWS)]
        lines = "\n".join(json.dumps(row) for row, _ in made).encode()
        (directory / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        asked[task] = [question for _, question in made]
    return directory, asked


def test_the_file_of_the_most_exact_name_has_a_tasks_rows(tmp_path: Path) -> None:
    names = ["piqa.jsonl", "piqa_val_hard.jsonl", "piqa_valid.jsonl.gz", "piqa_validation.jsonl", "piqa_x.jsonl"]
    for name in names:
        (tmp_path / name).touch()
    found = [path.name for path in files_of(tmp_path, "piqa", "validation", whole=True)]
    assert found == ["piqa_validation.jsonl", "piqa_valid.jsonl.gz", "piqa_val_hard.jsonl"]
    assert [path.name for path in files_of(tmp_path, "piqa", "test", whole=True)] == ["piqa.jsonl"]
    assert files_of(tmp_path, "piqa", "test", whole=False) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[Path, Path]:
    """A dense model that takes long prompts, and a compressed one."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(text_file.read_text())
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(directory / "dense")
    tokenizer.save_pretrained(directory / "dense")
    small = directory / "small"
    options = ("--evaluate", "none", "--quiet", "--statistics", "dense")
    assert run_cli(*compress_arguments(directory / "dense", small, text_file, *options)).code == 0
    return directory / "dense", small


@torch.no_grad()
def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[float, bool]:
    """log p(answer | prompt), and whether each of its tokens is the likeliest."""
    ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    scores = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(start, ids.shape[1])
    total = sum(float(scores[place - 1, ids[0, place]]) for place in places)
    return total, all(int(scores[place - 1].argmax()) == int(ids[0, place]) for place in places)


def accuracies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Question]) -> dict[str, float]:
    """The shares of right answers, by log-likelihood and by log-likelihood over length."""
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for question in asked:
        found = [log_likelihood(model, tokenizer, *pair) for pair in question.pairs]
        scores = [score for score, _ in found]
        if len(found) == 1:
            right["acc"].append(found[0][1])
            continue
        right["acc"].append(scores.index(max(scores)) == question.right)
        if question.lengths:
            normed = [score / length for score, length in zip(scores, question.lengths, strict=True)]
            right["acc_norm"].append(normed.index(max(normed)) == question.right)
    return {name: sum(values) / len(values) for name, values in right.items() if values}


def test_prompts_that_are_too_long_are_told_of(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [
        {"goal": "keep the head " * (1 + 300 * (number % 2)), "sol1": "a", "sol2": "the model", "label": 0}
        for number in range(4)
    ]
    (tmp_path / "piqa_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = run_cli("evaluate", models[0], "--tasks", "piqa", "--task-data", tmp_path)
    assert outcome.code == 0
    assert "4 of 8 prompts are longer than the 512 tokens that the model takes" in " ".join(outcome.err.split())


@pytest.fixture(scope="module")
def results(
    models: tuple[Path, Path], questions: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, dict[str, Any]]:
    path = tmp_path_factory.mktemp("results") / "results.json"
    tasks = ("--tasks", ",".join(MAKERS), "--task-data", questions[0], "--batch-size", 8)
    outcome = run_cli("evaluate", *models, *tasks, "--output", path)
    assert outcome.code == 0, outcome.err
    return outcome, json.loads(path.read_text())


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("number", [0, 1], ids=["dense", "compressed"])
def test_accuracies_are_those_of_log_likelihoods_one_by_one(
    results: tuple[Outcome, dict[str, Any]],
    questions: tuple[Path, dict[str, list[Question]]],
    models: tuple[Path, Path],
    task: str,
    number: int,
) -> None:
    """The prompts are the harness's, written out above."""
    found = results[1]["models"][number]["tasks"][task]
    tokenizer, _, load = open_model(str(models[number]))
    expected = accuracies(load(), tokenizer, questions[1][task])
    assert found["items"] == ROWS
    for metric in expected.keys() & found["metrics"].keys():
        share = expected[metric]
        assert found["metrics"][metric] == pytest.approx(share), metric
        if task != "mmlu":  # whose error is pooled over its subjects
            assert found["errors"][metric] == pytest.approx(math.sqrt(share * (1 - share) / (ROWS - 1)))
    assert "acc" in found["metrics"]
    assert found["shown"] == ("acc_norm" if "acc_norm" in found["metrics"] else "acc")
    assert list(found["files"]) == [MAKERS[task][0]]


def test_the_table_has_all_models_their_means_and_what_was_lost(
    results: tuple[Outcome, dict[str, Any]], models: tuple[Path, Path]
) -> None:
    outcome, found = results
    assert [one["model"] for one in found["models"]] == list(map(str, models))
    lines = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.split()}
    for task in MAKERS:
        scores = [one["tasks"][task] for one in found["models"]]
        pairs = [(one["metrics"][one["shown"]], one["errors"][one["shown"]]) for one in scores]
        cells = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in pairs]
        assert " ".join(lines[task]) == f"{scores[0]['shown']} {ROWS} {' '.join(cells)}"
    shares = [
        [one["tasks"][task]["metrics"][one["tasks"][task]["shown"]] for task in MAKERS] for one in found["models"]
    ]
    means = [sum(values) / len(values) for values in shares]
    assert [one["mean"]["accuracy"] for one in found["models"]] == pytest.approx(means)
    assert found["models"][1]["mean"]["degradation"] == pytest.approx(1 - means[1] / means[0])
    assert lines["relative"][-1] == f"{1 - means[1] / means[0]:.1%}"
    assert found["harness"] == f"lm_eval {version('lm_eval')}"
    assert found["seeds"]["fewshot_random_seed"] == 1234
    assert found["command"].startswith("modegpt evaluate ")


def test_means_and_degradation_of_known_scores() -> None:
    def score(value: float, error: float | None, name: str = "acc") -> TaskScore:
        return TaskScore({name: value}, {name: error}, 10, 0, "1")

    dense = {"a": score(0.5, 0.3), "b": score(0.7, 0.4), "c": score(12.0, None, "perplexity")}
    small = {"a": score(0.4, 0.3), "b": score(0.5, None), "c": score(30.0, None, "perplexity")}
    assert mean(dense) == pytest.approx((0.6, 0.25))
    assert mean(small) == (pytest.approx(0.45), None)
    assert degradation(small, dense) == pytest.approx(0.25)
    assert mean({"c": dense["c"]}) is None
    assert degradation({"c": small["c"]}, {"c": dense["c"]}) is None


def test_limit_and_examples(models: tuple[Path, Path], questions: tuple[Path, Any], tmp_path: Path) -> None:
    """Examples come from the split that the task draws them from, here its training rows."""
    (tmp_path / "piqa_val.jsonl").write_bytes((questions[0] / "piqa_val.jsonl").read_bytes())
    made = [piqa(random.Random(f"train {number}"))[0] for number in range(5)]
    (tmp_path / "piqa_train.jsonl").write_text("\n".join(map(json.dumps, made)))
    loaded = Tasks(["piqa"], tmp_path, limit=4, num_fewshot=2).read()
    tokenizer, _, load = open_model(str(models[0]))
    seen: list[list[str]] = []
    model = load()
    forward = model.forward
    model.forward = lambda ids, **rest: seen.append(tokenizer.batch_decode(ids)) or forward(ids, **rest)
    score = loaded.scores(model, tokenizer)["piqa"]
    assert (score.items, score.few_shot) == (4, 2)
    prompts = {text for batch in seen for text in batch if "Question:" in text}
    goals = {row["goal"] for row in made}
    assert len(prompts) == 8
    for prompt in prompts:
        asked = [part.split("\nAnswer:")[0] for part in prompt.split("Question: ")[1:]]
        assert len(asked) == 3
        assert set(asked[:2]) <= goals
    assert set(score.files) == {"piqa_val.jsonl", "piqa_train.jsonl"}


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<it>{% endif %}"


def test_prompts_in_the_chat_template(
    models: tuple[Path, Path], questions: tuple[Path, dict[str, list[Question]]]
) -> None:
    """A question is a user's turn, and its answers are the model's."""
    tokenizer, _, load = open_model(str(models[0]))
    tokenizer.chat_template = CHAT
    loaded = Tasks(["piqa"], questions[0], chat_template=True).read()
    model, seen = load(), set()
    forward = model.forward
    model.forward = lambda ids, **rest: seen.update(tokenizer.batch_decode(ids)) or forward(ids, **rest)
    found = loaded.scores(model, tokenizer)["piqa"].metrics
    pairs = [[(f"<user>{prompt}<it>", answer.lstrip()) for prompt, answer in one.pairs] for one in questions[1]["piqa"]]
    inputs = [tokenizer(prompt + answer).input_ids[:-1] for both in pairs for prompt, answer in both]
    assert seen == set(tokenizer.batch_decode(inputs))
    asked = [replace(one, pairs=both) for one, both in zip(questions[1]["piqa"], pairs, strict=True)]
    expected = accuracies(load(), tokenizer, asked)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_chat_template_that_is_not_there_is_refused(models: tuple[Path, Path], questions: tuple[Path, Any]) -> None:
    tasks = ("--tasks", "piqa", "--task-data", questions[0], "--apply-chat-template")
    outcome = run_cli("evaluate", *models, *tasks)
    assert (outcome.code, "--apply-chat-template: " in outcome.err) == (2, True)
    assert "has no chat template; leave it out" in outcome.err
    outcome = run_cli("evaluate", *models, "--apply-chat-template")
    assert (outcome.code, "--apply-chat-template: goes with --tasks" in outcome.err) == (2, True)


@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_with_a_stride_every_token_counts_once_with_all_that_its_window_has(
    models: tuple[Path, Path], other_text_file: Path, stride: int
) -> None:
    tokenizer, _, load = open_model(str(models[1]))
    model = load()
    windows = Texts([str(other_text_file)], samples=6, sequence_length=16, stride=stride).windows(
        other_text_file.read_text(), "text", tokenizer
    )
    ids = tokenize(tokenizer, other_text_file.read_text())[: 5 * stride + 16]
    losses = []
    with torch.no_grad():
        for place in range(1, len(ids)):
            start = math.ceil(max(0, place - 15) / stride) * stride  # of the first window with this token
            if start < place:
                scores = model(input_ids=ids[None, start:place]).logits[0, -1].double().log_softmax(-1)
                losses.append(-float(scores[ids[place]]))
    found = modegpt.perplexity(model, windows, 4, stride=stride)
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_several_texts_of_several_models(
    models: tuple[Path, Path], text_file: Path, other_text_file: Path, tmp_path: Path
) -> None:
    path, options = tmp_path / "results.json", ("--sequence-length", 32, "--samples", 3, "--stride", 8)
    outcome = run_cli("evaluate", *models, "--perplexity", f"{text_file},{other_text_file}", *options, "-o", path)
    assert outcome.code == 0, outcome.err
    facts = json.loads(path.read_text())
    assert facts["settings"]["stride"] == 8
    for number, model in enumerate(models):
        for text in map(str, (text_file, other_text_file)):
            score = facts["models"][number]["texts"][text]
            assert f"{score['perplexity']:.3f}" in outcome.out
            alone = run_cli("evaluate", model, "--perplexity", text, *options)
            wanted = f"perplexity {score['perplexity']:.4f} on {text} (3 windows of 32 tokens, one every 8)\n"
            assert alone.out == wanted
    first, second = (facts["models"][number]["texts"][str(text_file)]["perplexity"] for number in range(2))
    assert f"{second:.3f} ({second / first - 1:+.1%})" in outcome.out
    written = path.read_bytes()
    again = run_cli("evaluate", models[0], "--perplexity", text_file, *options, "-o", path)
    assert (again.code, "is there already; remove it or choose another" in again.err) == (2, True)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--tasks", "no_such_task"), "--tasks 'no_such_task': lm-evaluation-harness has no such task"),
        (("--tasks", ","), "--tasks ',': name at least one"),
        (("--tasks", "piqa", "--limit", 0), "--limit 0: must be at least 1"),
        (("--tasks", "piqa", "--num-fewshot", -1), "--num-fewshot -1: must be at least 0"),
        (("--tasks", "piqa", "--batch-size", 0), "--batch-size 0: must be at least 1"),
        (("--tasks", "piqa", "--task-data", "nowhere"), "--task-data 'nowhere': no such directory"),
        (("--tasks", "piqa", "--stride", 8), "--stride 8: goes with --perplexity"),
        (("--limit", 3), "--limit 3: goes with --tasks"),
        (("--stride", 64, "--sequence-length", 32), "--stride 64 would skip tokens; use at most --sequence-length, 32"),
        (("--perplexity", "no-such-text"), "--perplexity 'no-such-text'"),
        (("--output", "results.csv"), "--output 'results.csv': name a .json file"),
        (("--output", "nowhere/results.json"), "--output 'nowhere/results.json': its directory does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    models: tuple[Path, Path], options: tuple[object, ...], problem: str
) -> None:
    outcome = run_cli("evaluate", models[0], *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert problem in outcome.err
    assert "Loading the model" not in outcome.err


PIQA = {"goal": "a", "sol1": "b", "sol2": "c", "label": 1}
MIXED = "\n".join(map(json.dumps, (PIQA, PIQA | {"goal": [5]})))


def test_too_few_rows_for_examples(models: tuple[Path, Path], tmp_path: Path) -> None:
    for split in ("val", "train"):
        (tmp_path / f"piqa_{split}.jsonl").write_text("\n".join([json.dumps(PIQA)] * 2))
    outcome = run_cli("evaluate", models[0], "--tasks", "piqa", "--task-data", tmp_path, "--num-fewshot", 3)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--num-fewshot 3: piqa has 2 rows to draw examples from" in outcome.err


def test_a_model_is_gone_before_the_next_is_loaded(models: tuple[Path, Path], questions: tuple[Path, Any]) -> None:
    tokenizer, _, load = open_model(str(models[0]))
    model = load()
    gone = weakref.ref(model)
    Tasks(["copa"], questions[0], limit=2).read().scores(model, tokenizer)
    del model
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("copa_val.jsonl", "{}", "has no copa"),
        ("piqa_val.jsonl", "{", "piqa_val.jsonl cannot be read"),
        ("piqa_val.jsonl.gz", "{}", "piqa_val.jsonl.gz cannot be read"),
        ("piqa_val.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c"}', "a row of .* has no 'label'; baber/piqa has"),
        ("piqa_val.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": "x"}', "a row of .* is not one of"),
        ("piqa_val.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": -1}', "the answer -1 is none of 0, 1"),
        ("piqa_val.jsonl", "", "--tasks piqa: piqa_val.jsonl has no row"),
        ("piqa_val.jsonl", "[1, 2]", "a line of .*piqa_val.jsonl is no JSON object"),
        ("piqa_val.jsonl", MIXED, "--tasks piqa cannot read piqa_val.jsonl: "),
    ],
)
def test_rows_that_are_none_are_refused(
    models: tuple[Path, Path], tmp_path: Path, name: str, text: str, problem: str
) -> None:
    (tmp_path / name).write_text(text)
    outcome = run_cli("evaluate", models[0], "--tasks", "piqa", "--task-data", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(problem.replace("no copa", "no piqa_validation.jsonl"), outcome.err)


def test_the_hub_is_asked_where_no_directory_is_given(models: tuple[Path, Path]) -> None:
    """And what to do without one is said; the tests run off line."""
    outcome = run_cli("evaluate", models[0], "--tasks", "piqa")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--tasks piqa: its data could not be loaded" in outcome.err
    assert "--task-data DIR" in outcome.err


def test_without_the_harness_one_line_says_what_to_install(models: tuple[Path, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modegpt.tasks.find_spec", lambda _: None)
        outcome = run_cli("evaluate", models[0], "--tasks", "piqa")
    assert (outcome.code, outcome.out) == (2, "")
    assert "pip install lm-eval" in outcome.err


def test_what_the_model_refuses_is_not_blamed_on_a_row(
    models: tuple[Path, Path], questions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise modegpt.InvalidRequest("the model takes no such text")

    monkeypatch.setattr("modegpt.task_model.TaskModel.loglikelihood", refuse)
    outcome = run_cli("evaluate", models[0], "--tasks", "piqa", "--task-data", questions[0])
    assert (outcome.code, outcome.err.splitlines()[-1]) == (2, "modegpt: the model takes no such text")


def test_perplexities_of_other_tokens_are_not_compared() -> None:
    """A model with another tokenizer predicts other, fewer or more, things."""
    texts = [("dense", 10.0, "x"), ("small", 11.0, "x"), ("other", 11.0, "y")]
    table = text_table([ModelScores(name, {"t": TextScore(ppl, 1, 8, None, sha)}) for name, ppl, sha in texts])
    shown = [next(iter(column.cells)) for column in table.columns[2:]]
    assert shown == ["10.000", "11.000 (+10.0%)", "11.000 (other tokens)"]


@pytest.mark.skipif("MODEGPT_TASK_DATA" not in os.environ, reason="MODEGPT_TASK_DATA names no directory of real tasks")
def test_real_rows(models: tuple[Path, Path]) -> None:
    directory = Path(os.environ["MODEGPT_TASK_DATA"])
    outcome = run_cli("evaluate", models[0], "--tasks", ",".join(MAKERS), "--task-data", directory, "--limit", 2)
    assert outcome.code == 0, outcome.err
    assert all(re.search(rf"^ *{task} ", outcome.out, re.MULTILINE) for task in MAKERS)

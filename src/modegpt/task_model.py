"""A model as lm-evaluation-harness wants it, with our progress in place of its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import NumericalError
from .progress import Progress

#: Requests between two signs of progress; they go through the model in order of their length.
_AT_ONCE = 256


class TaskModel(HFLM):  # type: ignore[misc]
    """What answers the harness's requests."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Progress
    ) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self._progress, self._stderr = progress, sys.stderr
        self._longer = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Log p of every continuation, and whether it is the greedy one."""
        self._longer = 0
        answers = self._in_parts(super().loglikelihood, requests)
        if self._longer:
            with redirect_stderr(self._stderr):
                self._progress.note(
                    f"{self._longer} of {len(answers)} prompts are longer than the {self.max_length} tokens that the "
                    "model takes, and lost their beginning"
                )
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[Any]:
        """That of tokens; the harness cuts off what is too long without a word."""
        lengths = (len(context) + len(continuation) for _, context, continuation in requests)
        self._longer += sum(length > self.max_length + 1 for length in lengths)
        answers: list[Any] = super()._loglikelihood_tokens(requests, *arguments, **options)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Log p of every text."""
        return self._in_parts(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """What follows on every text."""
        return self._in_parts(super().generate_until, requests)

    def _in_parts(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        """The answers, with progress on the real stderr."""
        parts = [requests[start : start + _AT_ONCE] for start in range(0, len(requests), _AT_ONCE)]
        answers = []
        with redirect_stderr(self._stderr), self._progress.phase("answers", len(parts)):
            for part in parts:
                answers += answer(part, disable_tqdm=True)
                self._progress.advance()
        if any(isinstance(found, tuple) and math.isnan(found[0]) for found in answers):  # log-likelihoods
            raise NumericalError("the model's log-likelihoods are NaN")
        return answers

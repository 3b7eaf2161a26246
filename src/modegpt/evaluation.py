"""Perplexity and text generation, the same for dense and compressed models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import TokenWindows
from .errors import InvalidRequest, NumericalError
from .progress import Progress

#: All positions of a window.
EVERYWHERE = slice(None)


class Loss:
    """The summed negative log-likelihood of predicted real tokens, and their number, in ``totals``."""

    def __init__(self) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64)

    def add(self, logits: torch.Tensor, batch: TokenWindows, positions: slice = EVERYWHERE) -> None:
        """Add ``logits`` (B, n, vocabulary) of these ``positions`` of ``batch``."""
        length = batch.ids.shape[1]
        here = torch.arange(length)[positions]
        here = here[here < length - 1]
        mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
        predicted = mask[:, here] & mask[:, here + 1]
        targets = batch.ids[:, here + 1][predicted].to(logits.device)
        predictions = logits[:, : len(here)][predicted.to(logits.device)].float()
        loss = nn.functional.cross_entropy(predictions, targets, reduction="sum")
        self.totals += torch.tensor([float(loss), len(targets)], dtype=torch.float64)

    def perplexity(self) -> float:
        """Exp of the mean."""
        return math.exp(min(self.mean(), 700.0))  # exp overflows a float beyond 709

    def mean(self) -> float:
        """The loss of one token; raises :class:`InvalidRequest` without any predicted token."""
        total, count = self.totals.tolist()
        if count == 0:
            raise InvalidRequest("the text has no two real tokens in a row: there is nothing to predict")
        if not math.isfinite(total):
            raise NumericalError("the model's loss is NaN or infinite")
        return float(total / count)


class Predictions:
    """The next-token distributions p after the real tokens among some positions of a batch, to compare others with."""

    def __init__(self, logits: torch.Tensor, batch: TokenWindows, positions: slice = EVERYWHERE) -> None:
        """Those of ``logits`` (B, n, vocabulary), at these ``positions`` of ``batch``."""
        self._real = None if batch.mask is None else batch.mask[:, positions].to(logits.device)
        scores = self._rows(logits).log_softmax(-1)
        self._shares = scores.exp()
        self._entropy = -torch.linalg.vecdot(self._shares, scores)
        self.count = len(scores)

    def divergence(self, logits: torch.Tensor) -> float:
        """The sum over the tokens of KL(p || q), q the distributions of other ``logits`` of the same positions."""
        others = self._rows(logits)
        # -sum p log q = log sum exp(z) - sum p z: one exponential less over the vocabulary than log_softmax.
        cross = others.logsumexp(-1) - torch.linalg.vecdot(self._shares, others)
        return float((cross - self._entropy).sum(dtype=torch.float64))

    def _rows(self, logits: torch.Tensor) -> torch.Tensor:
        """Those after real tokens: no copy, which takes as long as half a softmax, where all are."""
        return (logits.flatten(0, 1) if self._real is None else logits[self._real]).float()


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: TokenWindows,
    batch_size: int = 1,
    progress: Progress | None = None,
    stride: int | None = None,
) -> float:
    """Exp of the mean negative log-likelihood of every predicted real token; each window starts without context.

    Where windows begin every ``stride`` tokens, only the last ``stride`` tokens of each count, and all of the first.
    ``progress`` advances once for every batch.
    """
    length = windows.ids.shape[1]
    new = slice(max(0, length - (stride or length) - 1), None)  # what is predicted for the first time is predicted here
    loss = Loss()
    training = model.training
    model.eval()
    for number, batch in enumerate(windows.batches(batch_size)):
        ids = batch.ids.to(model.device)
        mask = None if batch.mask is None else batch.mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss.add(logits[:, new], batch, new)
        if number == 0 and new.start:
            old = slice(0, new.start)
            loss.add(logits[:1, old], next(iter(batch.batches(1))), old)
        if progress is not None:
            progress.advance()
    model.train(training)
    return loss.perplexity()


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
) -> str:
    """Greedy continuation of ``prompt``, without the prompt; ``chat`` puts it in the tokenizer's chat template."""
    if chat and not tokenizer.chat_template:
        raise InvalidRequest("--chat needs a tokenizer with a chat template, which this model's has not")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

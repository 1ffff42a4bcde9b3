"""How the next token is chosen, and what ends an answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_one.errors import UserError

# A character is at most four tokens of bytes, and a few tokens may stand for no text at all.
_TOKENS_PER_CHARACTER, _SPARE_TOKENS = 4, 8


@dataclass(frozen=True)
class Decoding:
    """How a continuation is chosen.

    Attributes:
        max_new_tokens: Longest continuation.
        temperature: 0 is greedy; otherwise tokens are sampled from ``softmax(logits / temperature)``.
        top_p: Sample from the most probable tokens that together have this probability.
        top_k: Sample from so many most probable tokens; 0: from all. Taken before ``top_p``.
        num_beams: Beams of a beam search; with a temperature, of a sampling one.
        stop: A continuation ends before the first of these texts, as it does at an end token.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for a setting that means nothing."""
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature:g}: below 0; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p:g}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: below 0; 0 takes all tokens")

    def __str__(self) -> str:
        beams = f", {self.num_beams} beams" if self.num_beams > 1 else ""
        if not self.is_sampled:
            return "greedy" + beams
        limits = f", top_p {self.top_p:g}" * (self.top_p < 1) + f", top_k {self.top_k}" * (self.top_k > 0)
        return f"sampled, temperature {self.temperature:g}{limits}{beams}"

    @property
    def is_sampled(self) -> bool:
        """Whether chance decides."""
        return self.temperature > 0


def uniforms(seed: int, index: int, n: int) -> np.ndarray:
    """The ``n`` numbers in [0, 1) that choose the tokens of prompt ``index``.

    They depend on nothing else: not on the batch, the order or the number of processes, and prompts that
    are alike differ in their index.
    """
    return np.random.default_rng([seed, index]).random(n)


def next_tokens(logits_BV: Tensor, decoding: Decoding, uniforms_B: Tensor | None) -> Tensor:
    """The chosen token of every row.

    Args:
        logits_BV: Of the next token.
        decoding: How; beams are not its business.
        uniforms_B: One number in [0, 1) a row, for sampling by the inverse of the distribution function.

    Returns:
        -1 where logits are no finite numbers, so that nobody has to wait for the device to know.
    """
    if not decoding.is_sampled:
        highest = logits_BV.max(-1)  # several times faster than argmax on a CPU
        return highest.indices.masked_fill(~highest.values.isfinite(), -1)
    assert uniforms_B is not None
    scores_BV = logits_BV.float() / decoding.temperature
    tokens_BK = None
    if decoding.top_k > 0 or decoding.top_p < 1:
        n = scores_BV.shape[-1]
        scores_BV, tokens_BK = scores_BV.topk(min(decoding.top_k or n, n))
    probabilities_BK = scores_BV.double().softmax(-1)
    sums_BK = probabilities_BK.cumsum(-1)
    if decoding.top_p < 1:
        # As many as it takes to reach top_p, so at least one.
        is_kept_BK = sums_BK - probabilities_BK < decoding.top_p
        sums_BK = (probabilities_BK * is_kept_BK).cumsum(-1)
    wanted_B1 = uniforms_B.double()[:, None] * sums_BK[:, -1:]
    chosen_B1 = (sums_BK <= wanted_B1).sum(-1, keepdim=True)
    tokens_B1 = chosen_B1 if tokens_BK is None else tokens_BK.gather(1, chosen_B1)
    return tokens_B1.masked_fill(~sums_BK[:, -1:].isfinite(), -1)[:, 0]


def not_finite() -> UserError:
    """What there is to say of a model whose logits are no finite numbers."""
    return UserError(
        "the model's logits are not finite (NaN or infinite): its weights are broken, or overflow in this "
        "precision; look at its training, or evaluate it in another precision"
    )


def end_tokens(model: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those that the model's own generation config names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *(token for token in several if token is not None)})


def until_end(ids: Sequence[int], ends: Sequence[int], max_new_tokens: int) -> tuple[list[int], bool]:
    """What comes before the first end token, and whether there is one, within ``max_new_tokens``."""
    kept = list(ids[:max_new_tokens])
    first = min((kept.index(end) for end in ends if end in kept), default=None)
    return (kept, False) if first is None else (kept[:first], True)


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """``text`` before the first of the texts in ``stop``, and whether there was one."""
    first = min((place for word in stop if (place := text.find(word)) >= 0), default=None)
    return (text, False) if first is None else (text[:first], True)


class StopWatch:
    """Finds the texts that end an answer, without decoding all of it again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        longest = max((len(word) for word in stop), default=0)
        self._n_before = _TOKENS_PER_CHARACTER * longest + _SPARE_TOKENS

    def has_ended(self, ids: list[int], n_new: int) -> bool:
        """Whether a stop text ends among the last ``n_new`` tokens."""
        if not self._stop:
            return False
        tail = ids[max(0, len(ids) - n_new - self._n_before) :]
        if not before_stop(self._text(tail), self._stop)[1]:
            return False
        return before_stop(self._text(ids), self._stop)[1]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

"""How the next token is chosen from logits.

`SamplingParams` are a request's options, `validate` checks them, and `Sampler` composes those functions of `logits`
that a request needs, once, so that an option that is off costs nothing.

Knows neither text nor KV nor the model. Called by `engine`; `services` calls `validate`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hearthd.errors import MAX_PROBLEMS, InvalidRequestError
from hearthd.sequences.logits import (
    FloatArray,
    apply_answer_penalties,
    apply_repetition_penalty,
    apply_temperature,
    draw,
    min_p_places,
    top_k_places,
    top_p_places,
)

__all__ = [
    "MAX_STOP_STRINGS",
    "MAX_STOP_STRING_CHARS",
    "MAX_TOP_LOGPROBS",
    "NonFiniteLogitsError",
    "Sampler",
    "SamplingParams",
    "validate",
]

MAX_STOP_STRINGS = 4
MAX_STOP_STRING_CHARS = 64
MAX_TOP_LOGPROBS = 20
_MAX_MAX_TOKENS = 2**31 - 1
_MAX_SEED = 2**64 - 1


class NonFiniteLogitsError(ArithmeticError):
    """The model returned logits that no token can be chosen from: NaN, +inf, or -inf throughout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request, all set. Ranges as in protos/hearth/v1/chat.proto; `validate` checks them."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Check every field's type and range.

    vocab_size: V, the most that top_k may be. Whether prompt and max_tokens fit the context is not known here.
    Raises InvalidRequestError, its field `sampling.<name>`, for the first one that is wrong; of `stop` for each string.
    """
    _check_integer("max_tokens", params.max_tokens, 1, _MAX_MAX_TOKENS)
    _check_number("temperature", params.temperature, 0.0, 2.0)
    _check_integer("top_k", params.top_k, 0, vocab_size)
    _check_number("top_p", params.top_p, 0.0, 1.0, low_is_excluded=True)
    _check_number("min_p", params.min_p, 0.0, 1.0)
    _check_number("repetition_penalty", params.repetition_penalty, 0.0, 10.0, low_is_excluded=True)
    _check_number("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if params.seed is not None:
        _check_integer("seed", params.seed, 0, _MAX_SEED)
    if params.top_logprobs is not None:
        _check_integer("top_logprobs", params.top_logprobs, 0, MAX_TOP_LOGPROBS)
    _check_stop(params.stop)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequestError(f"sampling.{name}", f"is a {type(value).__name__}; give an integer")
    if not low <= value <= high:
        raise InvalidRequestError(f"sampling.{name}", f"is {_shown(value)}; give {low} to {high}")


def _check_number(name: str, value: object, low: float, high: float, *, low_is_excluded: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequestError(f"sampling.{name}", f"is a {type(value).__name__}; give a number")
    # NaN compares false with everything, so the range must be asked for, not its opposite.
    if not low <= value <= high or (low_is_excluded and value == low):
        over = "over " if low_is_excluded else ""
        raise InvalidRequestError(f"sampling.{name}", f"is {_shown(value)}; give {over}{low:g} to {high:g}")


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple):
        raise InvalidRequestError("sampling.stop", f"is a {type(stop).__name__}; give strings")
    problems = list(islice(_find_stop_problems(stop), MAX_PROBLEMS))
    if problems:
        raise InvalidRequestError.of(problems)


def _find_stop_problems(stop: tuple[object, ...]) -> Iterator[InvalidRequestError]:
    if len(stop) > MAX_STOP_STRINGS:
        yield InvalidRequestError("sampling.stop", f"has {len(stop)} strings; give at most {MAX_STOP_STRINGS}")
    for place, string in enumerate(stop):
        name = f"sampling.stop[{place}]"
        if not isinstance(string, str):
            yield InvalidRequestError(name, f"is a {type(string).__name__}; give a string")
        elif not string:
            yield InvalidRequestError(name, "is empty; give at least 1 character, or leave it out")
        elif len(string) > MAX_STOP_STRING_CHARS:
            yield InvalidRequestError(name, f"has {len(string)} characters; give at most {MAX_STOP_STRING_CHARS}")


def _shown(value: float) -> str:
    # Python refuses to print an integer of more than 4300 digits.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


class _TokenCounts:
    """Which tokens prompt and answer have, and how often the answer has each; grows by one token in O(1)."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        unique = np.unique(np.asarray(prompt_ids, dtype=np.intp))
        self._places = {int(token_id): place for place, token_id in enumerate(unique)}
        self._num = unique.size
        self._ids = np.zeros(max(64, 2 * self._num), dtype=np.intp)
        self._ids[: self._num] = unique
        self._counts = np.zeros(self._ids.size, dtype=np.int64)

    @property
    def ids(self) -> NDArray[np.intp]:
        return self._ids[: self._num]

    @property
    def answer_counts(self) -> NDArray[np.int64]:
        return self._counts[: self._num]

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self._num)
        if place == self._num:
            if place == self._ids.size:
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token_id
            self._num += 1
        self._counts[place] += 1


_Penalty = Callable[[NDArray[np.float32]], NDArray[np.float32]]
# Token ids still to choose from (None: all, in order) and their logits, to the same after one more option.
_Filter = Callable[[NDArray[np.intp] | None, FloatArray], tuple[NDArray[np.intp] | None, FloatArray]]


class Sampler:
    """Chooses one request's tokens. Its random numbers are its own, so that nothing else that runs can change them."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """`params` have passed `validate`. Without a seed, a new one comes from the operating system."""
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._is_greedy = params.temperature == 0
        self._counts: _TokenCounts | None = None
        self._penalties: list[_Penalty] = []
        self._filters: list[_Filter] = []
        self._add_penalties(params, prompt_ids)
        self._add_filters(params)

    def _add_penalties(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        repetition, presence, frequency = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        if repetition == 1 and presence == 0 and frequency == 0:
            return
        self._counts = counts = _TokenCounts(prompt_ids)
        if repetition != 1:
            self._penalties.append(lambda logits: apply_repetition_penalty(logits, counts.ids, repetition))
        if presence != 0 or frequency != 0:
            self._penalties.append(
                lambda logits: apply_answer_penalties(logits, counts.ids, counts.answer_counts, presence, frequency)
            )

    def _add_filters(self, params: SamplingParams) -> None:
        # The field's usual order is temperature, top-k, top-p, min-p. The temperature keeps the order of logits, so
        # top-k keeps the same tokens before it, and leaves it only k numbers to divide.
        if params.top_k != 0:
            self._filters.append(_narrowing(lambda logits: top_k_places(logits, params.top_k)))
        if params.temperature not in (0, 1):
            self._filters.append(lambda ids, logits: (ids, apply_temperature(logits, params.temperature)))
        if params.top_p != 1:
            self._filters.append(_narrowing(lambda logits: top_p_places(logits, params.top_p)))
        if params.min_p != 0:
            self._filters.append(_narrowing(lambda logits: min_p_places(logits, params.min_p)))

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token and count it for the penalties. Greedy ties go to the lowest id.

        logits: float32 (V,); not changed. Raises NonFiniteLogitsError.
        """
        for penalise in self._penalties:
            logits = penalise(logits)
        likeliest = int(np.argmax(logits))  # of a NaN, if there is one
        if not math.isfinite(logits[likeliest]):
            raise NonFiniteLogitsError(f"the model's largest logit is {logits[likeliest]}; it must be finite")
        token_id = likeliest if self._is_greedy else self._draw(logits)
        if self._counts is not None:
            self._counts.add(token_id)
        return token_id

    def _draw(self, all_logits: NDArray[np.float32]) -> int:
        ids: NDArray[np.intp] | None = None
        logits: FloatArray = all_logits
        for narrow in self._filters:
            ids, logits = narrow(ids, logits)
        place = draw(logits, self._random.random())
        return place if ids is None else int(ids[place])


def _narrowing(find_places: Callable[[FloatArray], NDArray[np.intp]]) -> _Filter:
    def narrow(ids: NDArray[np.intp] | None, logits: FloatArray) -> tuple[NDArray[np.intp] | None, FloatArray]:
        places = find_places(logits)
        return (places if ids is None else ids[places]), logits[places]

    return narrow

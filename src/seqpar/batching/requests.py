"""What a caller asks for, checked when it is said, and how far each request has come, as host integers."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from sys import float_info
from types import NoneType

__all__ = ["Progress", "Request", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn from its logits.

    Two requests that differ in nothing but their batch draw the same tokens: what is random depends on the seed and on
    the token's number alone.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: draw among so many of the likeliest; None among all.
        top_p: of those, among the fewest whose probabilities reach this share.
        seed: of this request.

    Raises:
        TypeError: a `top_k` or a seed that is no integer, others that are no numbers.
        ValueError: a parameter out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not isinstance(self.top_k, (int, NoneType)):
            raise TypeError(f"`top_k` and `seed` must be integers, got {self.top_k!r} and {self.seed!r}")
        if not isinstance(self.temperature, (int, float)) or not isinstance(self.top_p, (int, float)):
            raise TypeError(f"`temperature` and `top_p` must be numbers, got {self.temperature!r} and {self.top_p!r}")
        if not 0 <= self.temperature <= float_info.max:
            raise ValueError(f"`temperature` must be finite and >= 0, got {self.temperature}; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}; leave it out to draw among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"`seed` must be in [0, 2**64), got {self.seed}")


@dataclass(frozen=True)
class Request:
    """A prompt, and how to go on.

    Args:
        id: anything hashable; distinct among the requests that are live.
        prompt: token ids.
        max_new_tokens: the most tokens to generate.
        sampling: how they are drawn.
        stop_tokens: tokens after which the request is finished; they are part of its output.
        stop_strings: texts after which it is finished; the tokens that complete one are part of its output, but none of
            its text (`Generation.text`).
        generated: tokens of its output that are there already, from a loop that has ended; the next is drawn as that
            loop would have drawn it.

    Raises:
        TypeError: an id that is not hashable, tokens or their number that are no integers, stop strings that are none.
        ValueError: an empty prompt, no tokens to generate, negative token ids, an empty stop string, an id that does
            not equal itself; generated tokens that have reached the most, or a stop token.
    """

    id: Hashable
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: Collection[int] = frozenset()
    stop_strings: Sequence[str] = ()
    generated: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._check_id()
        self._check_lists()
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        object.__setattr__(self, "generated", tuple(self.generated))
        self._check_types()
        if not self.prompt:
            raise ValueError(f"`prompt` must have at least one token, got none for request {self.id!r}")
        if min(self.known) < 0:
            raise ValueError(f"`prompt` must hold token ids >= 0, got {min(self.known)} for request {self.id!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens} for request {self.id!r}")
        if "" in self.stop_strings:
            raise ValueError(f"`stop_strings` must not be empty texts, got one for request {self.id!r}")
        if len(self.generated) >= self.max_new_tokens or set(self.stop_tokens) & set(self.generated):
            raise ValueError(
                f"`generated` must be fewer than {self.max_new_tokens} tokens and no stop token, got "
                f"{len(self.generated)} for request {self.id!r}; it has ended"
            )

    # Refused now is what would raise in the middle of a step, with others beside it.

    def _check_id(self) -> None:
        try:
            hash(self.id)
        except TypeError:
            raise TypeError(f"`id` must be hashable, got {type(self.id).__name__}") from None
        if self.id != self.id:
            raise ValueError(f"`id` must equal itself, got {self.id!r}")

    def _check_lists(self) -> None:
        for name in ("prompt", "stop_tokens", "stop_strings"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise TypeError(f"`{name}` must be a list, got {type(given).__name__} for request {self.id!r}")

    def _check_types(self) -> None:
        if not all(isinstance(token, int) for token in (*self.known, self.max_new_tokens)):
            raise TypeError(f"`prompt` and `max_new_tokens` must be integers, got others for request {self.id!r}")
        if not all(isinstance(token, int) for token in self.stop_tokens):
            raise TypeError(f"`stop_tokens` must be integers, got others for request {self.id!r}")
        if not all(isinstance(stop, str) for stop in self.stop_strings):
            raise TypeError(f"`stop_strings` must be texts, got others for request {self.id!r}")

    @property
    def known(self) -> tuple[int, ...]:
        """Tokens of the prompt, and those that were generated before the request joined."""
        return (*self.prompt, *self.generated)

    @property
    def most_cached(self) -> int:
        """The most tokens that a cache ever holds of it: the last one generated is never appended."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(slots=True, eq=False)
class Progress:
    """How far one live request has come: all that composing a step needs to know of it.

    `computed <= scheduled <= tokens`: between a step's begin and its end the two differ by the step's tokens. Where
    several steps are in flight, what is in flight is what is scheduled and not computed.

    Args:
        id: the request's.
        tokens: known so far, of its prompt and generated.
        limit: the most tokens that a cache will hold of it.
        scheduled: of the tokens, those that steps have been given so far.
        computed: of them, those whose keys are in the cache.
        served: number of the last step that it took part in.
        shared: of the pages that its scheduled tokens take, those that an older request holds too, so that it takes
            none for them and gives none back; of one that waits, those that it will share. It is looked at where
            requests join and where they give way, and may be out of date elsewhere.
    """

    id: Hashable
    tokens: int
    limit: int
    scheduled: int = 0
    computed: int = 0
    served: int = -1
    shared: int = 0

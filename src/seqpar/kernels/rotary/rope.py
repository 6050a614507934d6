"""Frequencies and tables of rotary embeddings, bit for bit those of Hugging Face models.

Sources: RoPE arXiv:2104.09864; position interpolation ("linear") arXiv:2306.15595; YaRN arXiv:2309.00071;
LongRoPE arXiv:2402.13753; "dynamic" (NTK-aware) and "llama3" as their models' configs define them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["RopeConfig", "rope_table"]

RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]

_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeConfig:
    """How angles grow with position; the names are those of Hugging Face's `rope_parameters`.

    Raises:
        ValueError: the rope type is unknown, a field that it needs is missing, a number is not positive and finite, or
            the rotated dims are odd.
    """

    head_dim: int
    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            raise ValueError(f"`rope_type` must be one of {', '.join(get_args(RopeType))}, got {self.rope_type!r}")
        needed = _NEEDS[self.rope_type]
        if self.rope_type in ("yarn", "longrope") and self.factor is None:
            needed = (*needed, "max_position_embeddings")  # the factor is their ratio
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"`rope_type` {self.rope_type!r} needs {', '.join(missing)}, got none")
        for name, value in self._numbers():
            least = 1.0 if name == "rope_theta" else 0.0
            if not (least < value < math.inf or (name.startswith("mscale") and value == 0)):  # some say 0 for none
                raise ValueError(f"`{name}` must be finite and more than {least:g}, got {value}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"`head_dim` * `partial_rotary_factor` must be an even number of dims, got {self.rotary_dim}"
            )
        if self.rope_type == "llama3" and not (self.low_freq_factor or 0) < (self.high_freq_factor or 0):
            raise ValueError(
                f"`low_freq_factor` must be below `high_freq_factor` ({self.high_freq_factor}), got "
                f"{self.low_freq_factor}"
            )
        if self.rope_type == "dynamic" and self.rotary_dim == 2:
            raise ValueError("`rope_type` 'dynamic' needs at least 4 dims that turn, got 2")
        if self.rope_type in ("yarn", "longrope") and self.original_max_position_embeddings == 1:
            raise ValueError(f"`rope_type` {self.rope_type!r} needs more original positions than one, got 1")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise ValueError(f"`{name}` must have one entry per pair ({self.rotary_dim // 2}), got {len(factors)}")

    def _numbers(self) -> Iterator[tuple[str, float]]:
        """All that is a number, by name."""
        for field in fields(self):
            value = getattr(self, field.name)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, (int, float)) and not isinstance(each, bool):
                    yield field.name, each

    @classmethod
    def from_dict(
        cls, parameters: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int | None = None
    ) -> RopeConfig:
        """From Hugging Face's `rope_parameters` (or the older `rope_scaling`, which says "type").

        Raises:
            ValueError: a parameter that is not known here.
        """
        given = {name: _plain(name, value) for name, value in parameters.items() if value is not None}
        given.setdefault("rope_type", given.pop("type", "default"))
        unknown = given.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"`parameters` must be rope parameters known here, got {', '.join(sorted(unknown))}")
        given.setdefault("max_position_embeddings", max_position_embeddings)
        return cls(head_dim=head_dim, **given)

    @property
    def rotary_dim(self) -> int:
        """Leading dims of a head that are turned."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def depends_on_length(self) -> bool:
        """Whether the table changes with the longest sequence seen."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def attention_scaling(self) -> float:
        """Factor on cos and sin."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "yarn" and self.mscale and self.mscale_all_dim:
            return _mscale(self._stretch, self.mscale) / _mscale(self._stretch, self.mscale_all_dim)
        if self.rope_type == "yarn":
            return _mscale(self._stretch)
        assert self.original_max_position_embeddings is not None
        if self._stretch <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(self._stretch) / math.log(self.original_max_position_embeddings))

    def inv_freq(self, seq_len: int | None = None, device: torch.device | str = "cpu") -> Float[Tensor, " pairs"]:
        """Angle per position of each pair, in float32.

        Args:
            seq_len: The longest sequence seen; "dynamic" stretches and "longrope" switches with it.
            device: Where to compute; a GPU's powers may differ from the CPU's in the last bit.
        """
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        match self.rope_type:
            case "linear":
                assert self.factor is not None
                return 1.0 / self.rope_theta**exponent / self.factor
            case "dynamic":
                return 1.0 / self._dynamic_theta(seq_len) ** exponent
            case "yarn":
                return self._yarn(self.rope_theta**exponent)
            case "longrope":
                return 1.0 / (self._longrope_factors(seq_len, device) * self.rope_theta**exponent)
            case "llama3":
                return self._llama3(1.0 / self.rope_theta**exponent)
        return 1.0 / self.rope_theta**exponent

    @property
    def _stretch(self) -> float:
        """How many times longer sequences may be than in pre-training."""
        if self.factor is not None:
            return self.factor
        assert self.max_position_embeddings is not None and self.original_max_position_embeddings is not None
        return self.max_position_embeddings / self.original_max_position_embeddings

    def _dynamic_theta(self, seq_len: int | None) -> Tensor:
        assert self.factor is not None and self.max_position_embeddings is not None
        longest = torch.tensor(max(seq_len or 0, self.max_position_embeddings))  # float32 arithmetic, as the models do
        stretch = self.factor * longest / self.max_position_embeddings - (self.factor - 1)
        return self.rope_theta * stretch ** (self.rotary_dim / (self.rotary_dim - 2))

    def _longrope_factors(self, seq_len: int | None, device: torch.device | str) -> Tensor:
        assert self.original_max_position_embeddings is not None
        long = seq_len is not None and seq_len > self.original_max_position_embeddings
        return torch.tensor(self.long_factor if long else self.short_factor, dtype=torch.float32, device=device)

    def _yarn(self, wavelength: Tensor) -> Tensor:
        """Interpolate the slow pairs, keep the fast ones, and ramp in between."""
        pairs = self.rotary_dim // 2
        low, high = self._turns_at(self.beta_fast or 32.0), self._turns_at(self.beta_slow or 1.0)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001  # as the paper's code does: a step, not a division by zero
        ramp = (torch.arange(pairs, dtype=torch.float32, device=wavelength.device) - low) / (high - low)
        keep = 1 - ramp.clamp(0, 1)
        return 1.0 / (self._stretch * wavelength) * (1 - keep) + 1.0 / wavelength * keep

    def _turns_at(self, turns: float) -> float:
        """The (fractional) pair that turns this often within the pre-training length."""
        assert self.original_max_position_embeddings is not None
        ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return (self.rotary_dim * math.log(ratio)) / (2 * math.log(self.rope_theta))

    def _llama3(self, inv_freq: Tensor) -> Tensor:
        """Stretch the wavelengths beyond the pre-training length, keep the short ones, and blend in between."""
        assert self.factor is not None and self.original_max_position_embeddings is not None
        assert self.low_freq_factor is not None and self.high_freq_factor is not None
        length = self.original_max_position_embeddings
        wavelength = 2 * math.pi / inv_freq
        slow, fast = wavelength > length / self.low_freq_factor, wavelength < length / self.high_freq_factor
        stretched = torch.where(slow, inv_freq / self.factor, inv_freq)
        smooth = (length / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - smooth) * stretched / self.factor + smooth * stretched
        return torch.where(slow | fast, stretched, blended)


def rope_table(
    config: RopeConfig,
    positions: Int[Tensor, " t"],
    *,
    dtype: torch.dtype = torch.float32,
    seq_len: int | None = None,
) -> tuple[Float[Tensor, "t r"], Float[Tensor, "t r"]]:
    """Tables, cos and sin, of the angles of each position, computed in float32.

    Args:
        config: How angles grow.
        positions: Rotary position of each token.
        dtype: Of the tables, that of the queries and keys.
        seq_len: The longest sequence seen, for the rope types that depend on it.
    """
    angles = positions[:, None].float() * config.inv_freq(seq_len, positions.device)
    cos, sin = angles.cos() * config.attention_scaling, angles.sin() * config.attention_scaling
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype)


def _plain(name: str, value: Any) -> Any:
    """A parameter as the fields have it: JSON writes lists, and whole floats as integers."""
    if isinstance(value, list | tuple):
        return tuple(float(entry) for entry in value)
    whole = isinstance(value, int) and not isinstance(value, bool) and not name.endswith("max_position_embeddings")
    return float(value) if whole else value


def _mscale(stretch: float, mscale: float = 1.0) -> float:
    return 1.0 if stretch <= 1 else 0.1 * mscale * math.log(stretch) + 1.0

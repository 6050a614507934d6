"""Values of any annotation that the library uses: most of them ordinary, some at the ends of what the type allows."""

from __future__ import annotations

import collections.abc
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from enum import Enum
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["Never", "Unknown", "Values"]

INTS = (0, 1, 1, 2, 2, 3, 4, 4, 5, 6, 8, 12, -1, -3, 257)
FLOATS = (0.0, 1.0, 1.0, 0.5, 2.0, 1e-3, 10.0, -1.0, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "a", "tp", "none", "ä\x00", "x" * 50)
SIZES = (0, 1, 2, 2, 3, 4, 5, 8)


class Never(Exception):
    """Nothing that was drawn makes an instance."""


_BELOW = [st.nothing(), *(st.integers(0, most) for most in range(99))]


class Unknown(TypeError):
    """An annotation that there are no values of."""


@cache
def _names(module: str) -> dict[str, Any]:
    """What annotations of a module may name: also what it imports for type checkers alone."""
    import seqpar.comm
    import seqpar.kv
    import seqpar.plan
    import seqpar.ragged

    found: dict[str, Any] = {"Sequence": Sequence, "Path": Path}
    for package in (seqpar.comm, seqpar.kv, seqpar.ragged, seqpar.plan):
        found |= {name: getattr(package, name) for name in package.__all__}
    return found | vars(sys.modules[module])


def _parameters(fn: Callable[..., Any]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Parameters of a function, a bound method or a constructor, and their annotations, evaluated."""
    if inspect.isclass(fn) and (issubclass(fn, tuple) or is_dataclass(fn)):
        return list(inspect.signature(fn).parameters.values()), typing.get_type_hints(fn, _names(fn.__module__))
    bound = inspect.isclass(fn) or inspect.ismethod(fn)
    return _of_plain(
        inspect.unwrap(fn.__init__ if inspect.isclass(fn) else fn.__func__ if inspect.ismethod(fn) else fn), bound
    )


@cache
def _of_plain(plain: Callable[..., Any], bound: bool) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    try:
        hints = typing.get_type_hints(plain, _names(plain.__module__))
    except NameError as error:
        raise Unknown(str(error)) from None
    return list(inspect.signature(plain).parameters.values())[bound:], hints


def _program(value: Any) -> collections.abc.Generator[Any, Any, Any]:
    """Steps of which there are none."""
    return value
    yield


class Values:
    """Draws the arguments of one call.

    Letters of shapes mean the same number throughout, but for a fifth of them.
    """

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any], given: dict[Any, Any], folder: Path) -> None:
        self._draw, self._given, self._folder = draw, given, folder
        self._letters: dict[str, int] = {}
        self.tensors: list[Tensor] = []

    def one_of(self, values: Sequence[Any]) -> Any:
        return values[self._draw(_BELOW[len(values)])]

    def call(self, fn: Callable[..., Any]) -> dict[str, Any]:
        """Arguments by name; one with a default is left out half of the time."""
        parameters, hints = _parameters(fn)
        found = {}
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            if parameter.default is not parameter.empty and self._draw(st.booleans()):
                continue
            if parameter.name not in hints:
                raise Unknown(f"`{parameter.name}` has no annotation")
            try:
                found[parameter.name] = self.of(hints[parameter.name])
            except Unknown:
                if parameter.default is parameter.empty:
                    raise
        return found

    def make(self, cls: type) -> Any:
        """An instance of a class of the library, in some tries."""
        for _ in range(4):
            arguments = self.call(cls)
            try:
                return cls(**arguments)
            except (ValueError, TypeError, OSError):
                continue
        raise Never(cls.__name__)

    def of(self, hint: Any) -> Any:
        late = re.match(r"<forwardref (\w+)\(.*scope_name='([\w.]+)'", repr(hint))
        if late:  # the type checker of the tests keeps the place of a class that was not there yet
            hint = getattr(sys.modules[late[2]], late[1])
        if hint in self._given:
            given = self._given[hint]
            return given() if isinstance(given, types.FunctionType) else given
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
            return self.one_of((None, 3, "a"))
        if origin is Literal:
            return self.one_of((*args, "none of them")) if isinstance(args[0], str) else self.one_of(args)
        if origin in (Union, types.UnionType) and torch.device in args:
            return torch.device("cpu")  # names of others are PyTorch's to refuse
        if origin in (Union, types.UnionType) and any("PathLike" in str(arg) for arg in args):
            return self.plain(Path)  # nowhere but in the test's own folder
        if origin in (Union, types.UnionType):
            return self.of(self.one_of(args))
        if hint is None or hint is type(None):
            return None
        if hasattr(hint, "dim_str"):
            return self.tensor(hint)
        if origin is not None:
            return self.container(origin, args)
        return self.plain(hint)

    def plain(self, hint: Any) -> Any:
        simple: dict[Any, Callable[[], Any]] = {
            bool: lambda: self._draw(st.booleans()),
            int: lambda: self.one_of(INTS),
            float: lambda: self.one_of(FLOATS),
            Fraction: lambda: self.one_of((Fraction(0), Fraction(1, 3), Fraction(-2))),
            str: lambda: self.one_of(TEXTS),
            bytes: lambda: self.one_of((b"", b"abc")),
            slice: lambda: slice(*sorted(self.one_of(SIZES) for _ in range(2))),
            Path: lambda: self._folder / self.one_of(("none", "", "garbage", "model")),
            torch.dtype: lambda: self.one_of(
                (torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int64)
            ),
            torch.device: lambda: torch.device("cpu"),
            Tensor: lambda: self.floats([self.one_of(SIZES) for _ in range(self.one_of((1, 2, 2, 3)))], torch.float32),
            collections.abc.Hashable: lambda: self.one_of((0, 1, 2, "a", None)),
        }
        if hint in simple:
            return simple[hint]()
        if getattr(hint, "__name__", "") == "PathLike":
            return self.plain(Path)
        if hint in (ValueError, TypeError):
            return hint("`x` must be right, got wrong")
        if (
            not isinstance(hint, type)
            or not hint.__module__.startswith("seqpar.")
            or getattr(hint, "_is_protocol", False)
        ):
            raise Unknown(f"{hint}")
        if issubclass(hint, Enum):
            return self.one_of(list(hint))
        return self.make(hint)

    def container(self, origin: Any, args: tuple[Any, ...]) -> Any:
        if origin is collections.abc.Generator:
            return _program(self.one_of((None, 3)))
        if origin in (type, collections.abc.Callable, collections.abc.Iterator):
            raise Unknown(f"{origin}")
        if getattr(origin, "__name__", "") == "PathLike":
            return self.plain(Path)
        if origin is tuple and args and args[-1] is not Ellipsis:
            return tuple(self.of(each) for each in args)
        count = self.one_of((0, 1, 1, 2, 2, 3, 4))
        if origin in (dict, collections.abc.Mapping):
            return {self.of(args[0]): self.of(args[1]) for _ in range(count)}
        found = [self.of(args[0]) for _ in range(count)]
        return origin(found) if origin in (tuple, set, frozenset, list) else found

    def tensor(self, hint: Any) -> Tensor:
        shape: list[int] = []
        for dim in hint.dim_str.split():
            name = dim.lstrip("*#?_").partition("=")[2] or dim.lstrip("*#?_")
            if dim.startswith("*") or dim == "...":
                shape += [self.one_of(SIZES) for _ in range(self.one_of((0, 1, 2)))]
            elif name.isdigit():
                shape.append(int(name))
            elif name.isidentifier() and self.one_of((0, 0, 0, 0, 1)) == 0:
                shape.append(self._letters.setdefault(name, self.one_of(SIZES)))
            else:
                shape.append(self.one_of(SIZES))
        names = hint.dtypes if isinstance(hint.dtypes, (list, tuple)) else ["float32"]
        known = [getattr(torch, name) for name in names if isinstance(getattr(torch, str(name), None), torch.dtype)]
        usual = [
            each for each in known if each in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32)
        ]
        dtype = self.one_of(usual or known or [torch.float32])
        if dtype == torch.bool:
            return self.keep(self.integers(shape, 2).bool())
        if not dtype.is_floating_point:
            return self.keep(self.integers(shape, self.one_of((1, 4, 9))).to(dtype))
        return self.floats(shape, dtype)

    def integers(self, shape: Sequence[int], below: int) -> Tensor:
        return torch.randint(0, below, tuple(shape), generator=self.generator())

    def floats(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        scale = self.one_of((1.0, 1.0, 0.0, 1e4))
        return self.keep((torch.randn(tuple(shape), generator=self.generator()) * scale).to(dtype))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._draw(st.integers(0, 99)))

    def keep(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

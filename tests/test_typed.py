"""What the checks of annotations see."""

from __future__ import annotations

import ast

import pytest
import torch
from jaxtyping import TypeCheckError

from seqpar.kernels import rms_norm
from seqpar.partition import even_ranges
from tests.typed import checked

SOURCE = """
from dataclasses import dataclass
from jaxtyping import Float
@dataclass(frozen=True)
class A:
    x: int
    def f(self, y: int) -> int:
        def inner(z: int) -> int: ...
    @property
    def g(self) -> Float[Tensor, "n"]: ...
class B: ...
if True:
    def h(x: Float[Tensor, "n"]) -> None: ...
"""


def test_letters_of_shapes_are_bound_across_arguments() -> None:
    with pytest.raises(TypeCheckError):
        rms_norm(torch.ones(2, 3), torch.ones(4), 1e-6)


def test_what_has_no_shapes_is_checked_too() -> None:
    with pytest.raises(Exception, match="violates type hint"):
        even_ranges("3", 2)  # type: ignore[arg-type]


def test_every_function_and_data_class_is_checked_once() -> None:
    marked = {
        node.name: [d.attr for d in node.decorator_list if isinstance(d, ast.Attribute)]
        for node in ast.walk(checked(ast.parse(SOURCE)))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    assert marked == {"A": ["shapes"], "f": ["types"], "inner": [], "g": ["shapes"], "B": [], "h": ["shapes"]}

"""Check every call of the library against its annotations: shapes by jaxtyping, all else by beartype.

jaxtyping's own import hook gives each function the wrapper that binds the letters of shapes, which costs tens of
microseconds a call, also where no shape is in sight. Ranks spent three quarters of their time in it (2 cores, November
2026). This hook gives it to functions whose annotations name an array type, and beartype alone to the others.
Functions inside functions are left alone: they would be wrapped anew at each call. So are Triton's, of which only the
source counts.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, TypeVar

from beartype import beartype
from jaxtyping import config, jaxtyped

__all__ = ["install", "shapes", "types"]

F = TypeVar("F", bound=Callable[..., Any])


def shapes(fn: F) -> F:
    """Check types, and shapes against each other."""
    return jaxtyped(fn, typechecker=beartype)


def types(fn: F) -> F:
    """Check types, unless jaxtyping is told to check nothing."""
    typed = beartype(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (fn if config.jaxtyping_disable else typed)(*args, **kwargs)

    return call  # type: ignore[return-value]


def install(package: str) -> None:
    """Check all modules of a package that are imported from now on."""
    if package in sys.modules:
        raise RuntimeError(f"`{package}` must not be imported before its checks are installed")
    sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """The module's code, compiled anew: what lies in `__pycache__` is not checked."""
        tree = ast.parse(self.get_data(self.path), self.path)
        return compile(checked(tree), self.path, "exec", dont_inherit=True)


def checked(tree: ast.Module) -> ast.Module:
    """The same module with a decorator on every function and data class, next to what it decorates."""
    arrays = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
    }
    _decorate(tree.body, arrays)
    return ast.fix_missing_locations(tree)


def _decorate(body: Sequence[ast.stmt], arrays: set[str]) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef):
            if any("dataclass" in _names(decorator) for decorator in node.decorator_list):
                node.decorator_list.insert(0, _call_of(shapes, node))
            _decorate(node.body, arrays)
        elif isinstance(node, ast.FunctionDef) and not any("jit" in _names(each) for each in node.decorator_list):
            wanted = shapes if arrays & _annotations(node) else types
            node.decorator_list.append(_call_of(wanted, node))
        elif isinstance(node, ast.If):
            _decorate([*node.body, *node.orelse], arrays)


def _annotations(node: ast.FunctionDef) -> set[str]:
    args = node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    found = [arg.annotation for arg in every] + [node.returns]
    return set().union(*(_names(annotation) for annotation in found if annotation is not None))


def _names(node: ast.AST) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} | {
        x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)
    }


def _call_of(decorator: Callable[[F], F], node: ast.stmt) -> ast.expr:
    source = f"__import__('tests.typed').typed.{decorator.__name__}"
    return ast.copy_location(ast.parse(source, mode="eval").body, node)

"""Methods of one instance that do not keep it alive."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["method_of"]


def method_of(owner: object, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with `owner` as its first argument, to be stored on `owner`.

    A bound method would hold its owner, so that only the garbage collector could free its weights.

    Raises:
        ValueError: at a call, where the owner has been dropped.
    """
    reference = weakref.ref(owner)

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        if alive is None:
            raise ValueError(
                f"`{function.__name__}` must be called on a model that is kept in a variable, got one that was dropped"
            )
        return function(alive, *args, **kwargs)

    signature = inspect.signature(function)
    vars(method)["__signature__"] = signature.replace(parameters=list(signature.parameters.values())[1:])
    return method

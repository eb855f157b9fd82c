"""A type checker for jaxtyping's annotations of arrays; it leaves all other annotations alone."""

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jaxtyping import AbstractArray

checked_values: list[Any] = []
"""Annotations of the arrays that were compared with them."""


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compare arguments and results with their annotations."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(name, value, signature.parameters[name].annotation)
        result = function(*args, **kwargs)
        _check("result", result, signature.return_annotation)
        return result

    return wrapper


def _check(name: str, value: Any, annotation: Any) -> None:
    if not _matches(value, annotation):
        raise TypeError(f"{name}: expected {annotation}, found {value}")


def _matches(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in {Union, UnionType}:
        return any(_matches(value, part) for part in parts)
    if annotation is type(None) or (value is None and origin in {list, tuple}):
        return value is None and annotation is type(None)
    if origin is list or parts[1:] == (...,):
        return all(_matches(item, parts[0]) for item in value)
    if origin is tuple:
        return all(_matches(*pair) for pair in zip(value, parts, strict=True))
    if not (isinstance(annotation, type) and issubclass(annotation, AbstractArray)):
        return True
    checked_values.append(annotation)
    return isinstance(value, annotation)

"""beartype as the tests use it: a name from a list is any text, so that klft itself says what a wrong one gets."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

Decorator = Callable[[Callable], Callable]


def any_text(hint: Any) -> Any:
    """The hint with str in the place of a Literal."""
    if get_origin(hint) is Literal:
        return str
    return reduce(or_, map(any_text, get_args(hint))) if get_origin(hint) in (Union, UnionType) else hint


def any_text_for_names(check: Decorator) -> Decorator:
    """The type checker, for functions whose Literals it shall not look at."""

    def checked(function: Callable) -> Callable:
        function.__annotations__ = {name: any_text(hint) for name, hint in function.__annotations__.items()}
        return check(function)

    return checked

"""Query tokens: the part of a prompt that says what will be asked of the rest."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, TypeAdapter, ValidationError
from torch import Tensor

from lazyllm.errors import InputError

TokenRange = tuple[int, int]
Unit = Literal["line", "sentence", "paragraph"]
"""A kind of piece that a text is made of."""

AUTO_TOKENS = 32
"""How many tokens at the end are the query where nothing more is known."""


def _check(query: "int | TokenRange | str") -> "int | TokenRange | str":
    if isinstance(query, int) and query < 1:
        raise ValueError(f"a query of the last tokens has at least one, not {query}")
    if isinstance(query, str) and not query:
        raise ValueError("a query must not be empty")
    if isinstance(query, tuple) and not 0 <= query[0] < query[1]:
        raise ValueError(f"a query's token range is (start, stop) with 0 <= start < stop, not {query}")
    return query


Query = Annotated[Literal["auto"] | int | TokenRange | str, AfterValidator(_check)]
"""`"auto"`, a number of tokens at the end, a token range, or a substring of the prompt (its last occurrence)."""


def check_query(query: object) -> Query:
    """The query a caller names, checked.

    Raises:
        InputError: when it is no query.
    """
    try:
        checked: Query = TypeAdapter[Query](Query).validate_python(query)
    except ValidationError as error:
        faults = {fault["msg"] for fault in error.errors() if fault["type"] == "value_error"}
        reason = "; ".join(sorted(fault.removeprefix("Value error, ") for fault in faults)) or "it is of no known kind"
        raise InputError(
            f"the query {query!r} cannot be used: {reason}. Give a substring of the prompt, "
            "a token range (start, stop), a number of tokens at the end, or 'auto'"
        ) from None
    return checked


def query_tokens(query: Query, ranges: Sequence[TokenRange], context_tokens: int, *, rolling: bool) -> Tensor:
    """Indices [w] of the query tokens of a context, ascending.

    Args:
        query: what the scorer asks for.
        ranges: what the prompt's text said, if it was known.
        context_tokens: number of tokens seen so far.
        rolling: take the last tokens, reply included, whatever the prompt said (a decode step).
    """
    known = [part for part in ranges if part[1] <= context_tokens]
    if isinstance(query, tuple) and not known and query[1] <= context_tokens:
        known = [query]
    if known and not rolling:
        return torch.cat([torch.arange(*part) for part in known]).unique()
    last = query if isinstance(query, int) else AUTO_TOKENS
    return torch.arange(max(0, context_tokens - last), context_tokens)

"""What the reference shows of docstrings and policies, beyond what can be read off the source as it stands."""

import re
from collections.abc import Iterator
from typing import Any

from griffe import (
    Attribute,
    Class,
    Expr,
    ExprBinOp,
    ExprCall,
    ExprKeyword,
    ExprSubscript,
    ExprTuple,
    Extension,
    Function,
    Module,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)

VALUE = "lazyllm.policies.base.Value"
"""Base of the classes whose fields may be given by position or by name."""
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
"""A line of a docstring's section that describes several names at once, and the lines that go on with it."""


class Reference(Extension):
    """Gives each name a line of its own, and frozen values the constructor that their fields make."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Splits lines that describe several names."""
        if obj.docstring is not None:
            obj.docstring.value = SHARED.sub(_split, obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Makes constructors, once all bases are known."""
        for cls in _classes(pkg):
            bases = [cls, *cls.mro()]
            if any(base.path == VALUE for base in bases) and cls.path != VALUE:
                fields = {name: field for base in reversed(bases) for name, field in _fields(base)}
                cls.set_member("__init__", _constructor(cls, fields))


def _split(line: re.Match[str]) -> str:
    return "\n".join(f"{line[1]}{name}: {line[3]}" for name in line[2].split(", "))


def _classes(module: Module) -> Iterator[Class]:
    for member in list(module.members.values()):
        if isinstance(member, Class):
            yield member
        elif isinstance(member, Module):
            yield from _classes(member)


def _fields(cls: Class) -> Iterator[tuple[str, Attribute]]:
    """The annotated attributes of a class that are no class variables."""
    for name, member in cls.members.items():
        if isinstance(member, Attribute) and "instance-attribute" in member.labels:
            yield name, member


def _constructor(cls: Class, fields: dict[str, Attribute]) -> Function:
    kind = ParameterKind.positional_or_keyword
    given = [
        Parameter(name, annotation=_plain(field.annotation), kind=kind, default=_default(field.value))
        for name, field in fields.items()
        if field.annotation is not None
    ]
    return Function("__init__", parameters=Parameters(Parameter("self", kind=kind), *given), parent=cls)


def _plain(annotation: str | Expr) -> str | Expr:
    """A type without its bounds, which the list of attributes has."""
    if isinstance(annotation, ExprSubscript) and str(annotation.left) == "Annotated":
        parts = annotation.slice
        return _plain(parts.elements[0]) if isinstance(parts, ExprTuple) else annotation
    if isinstance(annotation, ExprBinOp):
        return ExprBinOp(_plain(annotation.left), annotation.operator, _plain(annotation.right))
    return annotation


def _default(value: str | Expr | None) -> str | Expr | None:
    """What a field has when nothing is given; of a factory, what it makes."""
    if not (isinstance(value, ExprCall) and str(value.function) == "Field"):
        return value
    for argument in value.arguments:
        if isinstance(argument, ExprKeyword) and argument.name == "default_factory":
            made = str(argument.value)
            return made.removeprefix("lambda: ") if made.startswith("lambda") else f"{made}()"
    return None

"""Follows the syntax tree of a chat template for one conversation, without running it.

A template is a program that lies in the checkpoint, and no such program is run, not even in a sandbox: three nested
loops could keep one busy for hours. jinja2 only parses it. The statements and expressions of which chat templates are
made are followed here, within a bound on steps and characters; any other construct that is reached is an error.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

MAX_STEPS = 1 << 18  # expressions and characters for one conversation: InternVL's template takes 2,000

Names = dict[str, Any]


class TemplateWalkError(Exception):
    """The template cannot be parsed, or goes where it is not followed."""


class _Generation(Extension):
    """The statement of transformers that marks what is trained on; it changes no text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own type

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def parse_template(template: str) -> list[nodes.Node]:
    """Parses as transformers does. Raises TemplateWalkError."""
    try:
        extensions = (_Generation, loopcontrols)
        return Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions).parse(template).body
    except (TemplateError, ValueError, RecursionError) as error:
        raise TemplateWalkError(f"it cannot be parsed ({error})") from error


def render_template(body: list[nodes.Node], names: Names) -> str:
    """Returns the text for the given variables: texts, whole numbers, truth values, and lists and dicts of these.

    Raises TemplateWalkError.
    """
    walk = _Walk()
    try:
        walk.run(body, dict(names))
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise TemplateWalkError(f"it cannot be followed ({error})") from error
    return "".join(walk.output)


class _Undefined:
    """jinja2's undefined value: false, empty, and no text."""

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __str__(self) -> str:
        return ""


_UNDEFINED = _Undefined()
_Scalar = str | int | float | _Undefined | None
_TESTS: dict[str, Callable[[Any], bool]] = {
    "defined": lambda value: value is not _UNDEFINED,
    "undefined": lambda value: value is _UNDEFINED,
    "none": lambda value: value is None,
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, dict),
    "sequence": lambda value: isinstance(value, str | list | dict),
    "iterable": lambda value: isinstance(value, str | list | dict | _Undefined),
    "true": lambda value: value is True,
    "false": lambda value: value is False,
}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "lteq": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gteq": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}
_FILTERS: dict[str, Callable[[Any], Any]] = {"trim": str.strip, "length": len, "count": len}
_METHODS = {
    method.__name__: method for method in (str.strip, str.lstrip, str.rstrip, str.startswith, str.endswith, str.split)
}


class _Macro(NamedTuple):
    node: nodes.Macro
    names: Names  # of the scope that defines it


class _Walk:
    def __init__(self) -> None:
        self.output: list[str] = []
        self._steps_left = MAX_STEPS

    def run(self, body: list[nodes.Node], names: Names) -> None:
        """Follows statements. names: the variables of their scope, which assignments change."""
        for node in body:
            self._spend(1)
            match node:
                case nodes.Output():
                    self.output += [self._text(part, names) for part in node.nodes]
                case nodes.If():
                    branches = ((each.test, each.body) for each in (node, *node.elif_))
                    self.run(next((body for test, body in branches if self.value(test, names)), node.else_), names)
                case nodes.For(target=nodes.Name(name=name), recursive=False):
                    self._loop(node, name, names)
                case nodes.Assign(target=nodes.Name(name=name)):
                    names[name] = self.value(node.node, names)
                case nodes.AssignBlock(target=nodes.Name(name=name), filter=None):
                    names[name] = self._block(node.body, names)
                case nodes.Assign(target=nodes.NSRef(name=name, attr=attr)):
                    names[name][attr] = self.value(node.node, names)
                case nodes.Macro(name=name):
                    names[name] = _Macro(node, names)
                case _:
                    raise _unknown(node)

    def value(self, node: nodes.Node, names: Names) -> Any:
        """Evaluates an expression. A text or list costs its length each time: whatever is done with it is paid for."""
        self._spend(1)
        value = self._evaluate(node, names)
        if isinstance(value, str | list | dict):
            self._spend(len(value))
        return value

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise TemplateWalkError(f"it takes more than {MAX_STEPS:,} steps")

    def _loop(self, node: nodes.For, name: str, names: Names) -> None:
        def scope(item: Any, **more: Any) -> Names:
            self._spend(1 + len(names))
            return {**names, name: item, **more}

        found = self.value(node.iter, names)
        items = [item for item in found if node.test is None or self.value(node.test, scope(item))]
        padded = [_UNDEFINED, *items, _UNDEFINED]
        for index, item in enumerate(items):
            loop = {"index": index + 1, "index0": index, "first": index == 0, "last": index == len(items) - 1}
            loop |= {"length": len(items), "previtem": padded[index], "nextitem": padded[index + 2]}
            self.run(node.body, scope(item, loop=loop))  # what the body assigns ends with it
        if not items:
            self.run(node.else_, names)

    def _call(self, macro: "_Macro", args: list[Any]) -> str:
        """Returns what a macro writes. Its defaults belong to its last parameters."""
        names, node = macro.names, macro.node
        parameters = [each.name for each in node.args]
        if len(args) > len(parameters):
            raise TypeError(f"{node.name} takes {len(parameters)} arguments and is given {len(args)}")
        defaults = zip(reversed(parameters), reversed(node.defaults), strict=False)
        scope = {**names, **dict.fromkeys(parameters, _UNDEFINED)}
        scope |= {name: self.value(default, names) for name, default in defaults}
        return self._block(node.body, scope | dict(zip(parameters, args, strict=False)))

    def _block(self, body: list[nodes.Node], names: Names) -> str:
        """Follows statements in a scope of their own, and returns what they write."""
        outer, self.output = self.output, []
        self._spend(1 + len(names))
        self.run(body, dict(names))
        text, self.output = "".join(self.output), outer
        return text

    def _text(self, node: nodes.Node, names: Names) -> str:
        if isinstance(node, nodes.TemplateData):
            self._spend(len(node.data))
            return node.data
        value = self.value(node, names)
        if not isinstance(value, _Scalar):
            raise TypeError(f"a {type(value).__name__} in line {node.lineno} is written out")
        return str(value)

    def _evaluate(self, node: nodes.Node, names: Names) -> Any:
        match node:
            case nodes.Const():
                return node.value
            case nodes.Name():
                return names.get(node.name, _UNDEFINED)
            case nodes.Getattr():
                return _item(self.value(node.node, names), node.attr)
            case nodes.Getitem(arg=nodes.Slice(start=start, stop=stop, step=step)):
                ends = [None if end is None else self.value(end, names) for end in (start, stop, step)]
                return self.value(node.node, names)[slice(*ends)]
            case nodes.Getitem():
                return _item(self.value(node.node, names), self.value(node.arg, names))
            case nodes.List() | nodes.Tuple():
                return [self.value(item, names) for item in node.items]
            case nodes.And():
                return self.value(node.left, names) and self.value(node.right, names)
            case nodes.Or():
                return self.value(node.left, names) or self.value(node.right, names)
            case nodes.Not():
                return not self.value(node.node, names)
            case nodes.CondExpr():
                chosen = node.expr1 if self.value(node.test, names) else node.expr2
                return _UNDEFINED if chosen is None else self.value(chosen, names)
            case nodes.Concat():
                return "".join([self._text(part, names) for part in node.nodes])
            case nodes.Add() | nodes.Sub() | nodes.Mod():
                return _sum(node, self.value(node.left, names), self.value(node.right, names))
            case nodes.Neg():
                return -self.value(node.node, names)
            case nodes.Compare():
                left, result = self.value(node.expr, names), True
                for operand in node.ops:
                    right = self.value(operand.expr, names)
                    result, left = result and _compare(operand.op, left, right), right
                return result
            case nodes.Test(name=name, args=[], kwargs=[]) if name in _TESTS:
                return _TESTS[name](self.value(node.node, names))
            case nodes.Filter(node=nodes.Expr() as inner, name=name, args=[], kwargs=[]) if name in _FILTERS:
                return _FILTERS[name](self.value(inner, names))
            case nodes.Call(node=nodes.Name(name="namespace"), args=[]):
                return {each.key: self.value(each.value, names) for each in node.kwargs}
            case nodes.Call(node=nodes.Name(name=name), kwargs=[]) if isinstance(names.get(name), _Macro):
                return self._call(names[name], [self.value(each, names) for each in node.args])
            case nodes.Call(node=nodes.Getattr(node=owner, attr=attr), kwargs=[]) if attr in _METHODS:
                return _METHODS[attr](self.value(owner, names), *(self.value(each, names) for each in node.args))
            case _:
                raise _unknown(node)


def _unknown(node: nodes.Node) -> TemplateWalkError:
    called = f" of {node.node.name}" if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) else ""
    return TemplateWalkError(f"the {type(node).__name__.lower()}{called} in line {node.lineno} is not followed")


def _item(owner: Any, key: Any) -> Any:
    if isinstance(owner, dict):
        return owner.get(key, _UNDEFINED)
    if isinstance(owner, str | list) and isinstance(key, int):
        return owner[key] if -len(owner) <= key < len(owner) else _UNDEFINED
    raise TypeError(f"a {type(owner).__name__} is asked for an item")


def _sum(node: nodes.BinExpr, left: Any, right: Any) -> Any:
    if isinstance(node, nodes.Add) and isinstance(left, str) and isinstance(right, str):
        return left + right
    if not isinstance(left, int) or not isinstance(right, int):  # no list grows, and no text is formatted
        raise TypeError(f"{type(left).__name__} {node.operator} {type(right).__name__} in line {node.lineno}")
    return (
        left + right if isinstance(node, nodes.Add) else left - right if isinstance(node, nodes.Sub) else left % right
    )


def _compare(operation: str, left: Any, right: Any) -> bool:
    """Compares texts, numbers and so on, but no lists, whose comparison may take exponentially long."""
    inner = right if isinstance(right, list | dict) and operation in ("in", "notin") else [right]
    if not isinstance(left, _Scalar) or not all(isinstance(each, _Scalar) for each in inner):
        raise TypeError(f"a {type(left).__name__} is compared with a {type(right).__name__}")
    return _COMPARISONS[operation](left, right)

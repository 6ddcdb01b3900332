"""Chat templates of strangers, rendered within limits of work and size.

The sandbox of transformers keeps a template from the machine; it does not end one that loops or
grows. Here loops, calls and whatever they make are counted, in the thread that renders, so that it
works on every platform. What makes much in a single step, such as a text times a number, is looked
at before it is done; functions of that kind that no known template uses are not there.
"""

import contextvars
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_TEMPLATE = 200_000  # characters of a template; the longest in use have 30,000
# Of one rendering, about a second. A dialogue of a hundred turns takes some ten thousand.
MOST_STEPS = 5_000_000
MOST_CHARACTERS = 20_000_000  # of one value
CHARACTERS_A_STEP = 100  # a text that is made, or may be written, counts as that many steps
MOST_NUMBER = 1_000  # to pad or indent by
REMOVED_FILTERS = ("batch", "slice", "urlize", "xmlattr", "pprint", "wordwrap", "format", "center")
REMOVED_GLOBALS = ("lipsum", "cycler", "joiner")
REMOVED_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format_map")
# Filters that write out a container that they are given.
WRITING = frozenset(
    "string tojson join e escape safe forceescape upper lower trim capitalize title replace indent "
    "urlencode wordcount truncate striptags".split()
)
_WIDE = re.compile(r"[0-9]{4}|\*|\{[^{}]*\{")  # a width of four digits, or one that is given


class TooMuchError(jinja2.TemplateError):
    """A template takes too many steps, or makes too much."""


class _Meter:
    """Counts what one rendering does."""

    def __init__(self, template: int):
        self.steps = 0
        # Each round of a loop, and each call of a macro, may write the template's own text.
        self.round = 1 + template // CHARACTERS_A_STEP

    def add(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise TooMuchError(f"it takes more than {MOST_STEPS:,} steps")

    def made(self, value: Any, deep: bool = True) -> Any:
        """Returns what a step made, after counting it, and what is in it where `deep`."""
        if isinstance(value, str | bytes):
            self._text(len(value))
        elif isinstance(value, list | tuple | dict):
            waiting = [value] if deep else []
            self.add(1 + len(value) // CHARACTERS_A_STEP)
            # What is shared counts each time: written out, it would be there each time.
            while waiting:
                value_in = waiting.pop()
                self.add(1)
                if isinstance(value_in, str):
                    self._text(len(value_in))
                elif isinstance(value_in, dict):
                    waiting += [*value_in.keys(), *value_in.values()]
                elif isinstance(value_in, list | tuple):
                    self.add(len(value_in))
                    waiting += value_in
        return value

    def _text(self, length: int) -> None:
        if length > MOST_CHARACTERS:
            raise TooMuchError(f"it makes {length:,} characters; at most {MOST_CHARACTERS:,}")
        self.add(1 + length // CHARACTERS_A_STEP)


_METER: contextvars.ContextVar[_Meter] = contextvars.ContextVar("meter of the rendering")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of chat templates, with a meter."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metered().visit(source), *args, **kwargs)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, a method or a macro for a template."""
        meter = _METER.get()
        meter.add(20 + meter.round)  # a call takes about as long as twenty rounds of a loop
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(obj, LoopContext) and args:
            args = (_counted(args[0]), *args[1:])  # a loop that calls itself
        elif isinstance(owner, str | bytes):
            if name in REMOVED_METHODS:
                raise TooMuchError(f"it uses '{name}' of texts, which may make any amount of text")
            _check_text(name, owner, [*args, *kwargs.values()])
        return meter.made(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable | None:
        """Returns `format` of a text, which refuses wide fields; None for other methods."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def narrow(*args: Any, **kwargs: Any) -> str:
            _check_text("format", text, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return functools.update_wrapper(narrow, wrapped)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes `+`, `*`, `**` or `%` for a template."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "*" and not numbers:
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and hasattr(one, "__len__"):
                    unit = MOST_CHARACTERS if isinstance(one, str) else MOST_CHARACTERS // 100
                    if len(one) * other > unit:
                        raise TooMuchError(f"it repeats {len(one):,} items {other:,} times")
        elif operator == "%" and isinstance(left, str | bytes):
            _check_text("%", left, [right])
        elif numbers and max(map(_bits, (left, right))) > (9 if operator == "**" else 4096):
            raise TooMuchError("it makes a number of more than a thousand digits")
        value = super().call_binop(context, operator, left, right)
        return _METER.get().made(value, deep=operator == "%")


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 0


def _check_text(name: str, text: str | bytes, given: list) -> None:
    """Checks what a method, a filter or `%` would make of a text, before it does.

    Raises:
      TooMuchError: too much.
    """
    meter = _METER.get()
    for value in given:
        if name in ("format", "%"):
            meter.made(value)
    longest = max((len(v) for v in given if isinstance(v, str | bytes)), default=0)
    if name in ("format", "%"):
        mark = "{" if name == "format" else "%"
        if _WIDE.search(str(text)):
            raise TooMuchError("it pads a text to a width of four digits, or to any width")
        made = len(text) + str(text).count(mark) * longest
    elif name == "replace" and len(given) > 1 and isinstance(given[0], type(text)):
        made = len(text) + text.count(given[0]) * longest
    elif name == "join" and given:
        items = given[0] if isinstance(given[0], list | tuple | dict) else ()
        made = len(text) * len(items) + sum(len(i) for i in items if isinstance(i, str))
    elif name in ("indent", "tojson"):
        numbers = [v for v in given if isinstance(v, int)]
        if max(numbers, default=0) > MOST_NUMBER:
            raise TooMuchError(f"it indents by more than {MOST_NUMBER:,}")
        made = len(text) + str(text).count("\n") * max([longest, *numbers])
    else:
        return
    if made > MOST_CHARACTERS:
        raise TooMuchError(f"it makes {made:,} characters; at most {MOST_CHARACTERS:,}")


def _metered(name: str, function: Callable) -> Callable:
    """Returns a filter that is checked, and whose result is counted."""
    skipped = int(hasattr(function, "jinja_pass_arg"))  # the context or environment comes first

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.add(5)
        value, given = args[skipped], [*args[skipped + 1 :], *kwargs.values()]
        if name == "join" and not isinstance(value, str):
            value = [meter.made(v) for v in value]
            separators = [v for v in given if isinstance(v, str)][:1]
            _check_text("join", separators[0] if separators else "", [value])
            args = (*args[:skipped], value, *args[skipped + 1 :])
        elif name in WRITING:
            meter.made(value)
            if name == "tojson":
                _check_json(value, given)
            elif isinstance(value, str):
                _check_text(name, value, given)
        return meter.made(function(*args, **kwargs), deep=False)

    return bounded


def _check_json(value: Any, given: list) -> None:
    """Checks what JSON is written with: indents and separators of a few characters."""
    for option in given:
        sizes = option if isinstance(option, list | tuple) else [option]
        for size in sizes:
            if (len(size) if isinstance(size, str) else int(size or 0)) > 16:
                raise TooMuchError("it writes JSON with wide indents or separators")


def _counted(items: Any) -> Iterator[Any]:
    """Yields what a loop goes through, counting it."""
    meter = _METER.get()
    for item in items:
        meter.add(meter.round)
        yield item


def _made(value: Any) -> Any:
    return _METER.get().made(value)


_OWN = {"counted loop": _counted, "made here": _made}  # no template can name these


class _Metered(jinja2.visitor.NodeTransformer):
    """Passes loops, and whatever is put together without a call, through the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _passed(node.iter, "counted loop")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [
            n if isinstance(n, nodes.TemplateData) else _passed(n, "made here") for n in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_passed(n, "made here") for n in node.nodes]
        return _passed(node, "made here")

    def _container(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _passed(node, "made here")

    visit_List = visit_Tuple = visit_Dict = _container  # noqa: N815


def _passed(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    """Compiles a template for an environment like that of transformers."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    base = _compile_jinja_template("").environment
    environment = _Environment(
        trim_blocks=base.trim_blocks,
        lstrip_blocks=base.lstrip_blocks,
        extensions=[type(extension) for extension in base.extensions.values()],
    )
    environment.filters = _OWN | {
        name: _metered(name, function)
        for name, function in base.filters.items()
        if name not in REMOVED_FILTERS
    }
    environment.globals = {k: v for k, v in base.globals.items() if k not in REMOVED_GLOBALS}
    # What is constant would be computed while compiling, before there is a meter.
    environment.optimized = False
    return environment.from_string(text)


def render(text: str, variables: Mapping[str, Any]) -> str:
    """Renders a chat template as transformers does, within limits.

    Args:
      text: the template.
      variables: what it is given, of JSON's types.

    Raises:
      TooMuchError: it takes more steps, or makes more text, than any template of use.
      jinja2.TemplateError: it is broken, or refuses the dialogue.
    """
    if len(text) > MOST_TEMPLATE:
        raise TooMuchError(f"it has {len(text):,} characters; at most {MOST_TEMPLATE:,} are read")
    token = _METER.set(_Meter(len(text)))
    try:
        return _compiled(text).render(**variables)
    except (RecursionError, MemoryError, OverflowError) as error:
        raise TooMuchError(f"it ends in {type(error).__name__}") from None
    finally:
        _METER.reset(token)

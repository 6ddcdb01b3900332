"""The form of the code: how calls are written, docstrings start and signatures are typed.

Every test runs once per room, a top-level folder of the package ("top": the files beside them),
so that `pytest tests/test_style.py -k models` looks at one room.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

import pytest
from signatures import (
    CALLERS,
    FUNCTIONS,
    PACKAGE,
    Module,
    Tree,
    decorated,
    parameters,
    positional_calls,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A docstring's first word is a verb or part of a noun phrase; none of these begins either.
HEADLESS = re.compile(r"(As|At(?! (least|most))|By|For|From|In|Of|On|So|To|With)(?=[\s,])")
WITHOUT_NOUN = (
    r"\bso (many|much|few)\b",
    r"\bthese(?=[.,;:)]|$)",
    r"\bsuch(?=[.,;:)]|$)",
    r"\bnobody\b",
    r"(?<!each )\bothers?'s\b",
)


@functools.cache
def tree() -> Tree:
    return Tree(ROOT)


def room_of(module: Module) -> str:
    top, *inner = module.path.relative_to(ROOT).parts
    if top != PACKAGE:
        return top
    return inner[0] if len(inner) > 1 else "top"


def room(name: str) -> list[Module]:
    return [module for module in tree().modules.values() if room_of(module) == name]


def place(module: Module, node: ast.AST) -> str:
    return f"{module.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def public(module: Module) -> Iterator[tuple[str, ast.AST, bool]]:
    """What a module offers: (name, definition, whether it is a method)."""
    for node in module.tree.body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_"):
            yield node.name, node, False
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, FUNCTIONS) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method, True


ROOMS = sorted({room_of(x) for x in tree().modules.values()} - set(CALLERS))


@pytest.mark.parametrize("name", [*ROOMS, *CALLERS])
def test_long_signatures_are_called_by_keyword(name):
    wrong = [
        f"{place(module, call.node)} {call.name}"
        for module in room(name)
        for call in positional_calls(tree(), module)
    ]
    assert not wrong, "\n".join(["more than three arguments by position:", *wrong])


@pytest.mark.parametrize("name", ROOMS)
def test_docstrings_have_a_head(name):
    wrong = []
    for module in room(name):
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                if HEADLESS.match(line) or any(re.search(x, line) for x in WITHOUT_NOUN):
                    wrong.append(f"{place(module, node)} {line}")
        missing = [(x, node) for x, node, _ in public(module) if x.split(".")[-1] != "setup"]
        if module.tree.body:
            missing.append(("the module", module.tree))
        wrong += [f"{place(module, n)} {x}: none" for x, n in missing if not ast.get_docstring(n)]
    assert not wrong, "\n".join(["docstrings:", *wrong])


@pytest.mark.parametrize("name", ROOMS)
def test_found_is_no_name(name):
    wrong = [
        place(module, node)
        for module in room(name)
        for node in ast.walk(module.tree)
        if "found" in (getattr(node, x, None) for x in ("id", "arg", "attr", "name", "asname"))
    ]
    assert not wrong, "\n".join(["named `found`:", *wrong])


@pytest.mark.parametrize("name", ROOMS)
def test_public_functions_are_annotated(name):
    wrong = []
    for module in room(name):
        for owner, node, method in public(module):
            if isinstance(node, FUNCTIONS):
                bound = method and not decorated(node, "^staticmethod$")
                variadic = filter(None, (node.args.vararg, node.args.kwarg))
                taken = (*parameters(node.args)[bound:], *variadic)
                bare = [x.arg for x in taken if x.annotation is None]
                wrong += [f"{place(module, node)} {owner}: {', '.join(bare)}"] if bare else []
    assert not wrong, "\n".join(["parameters without a type:", *wrong])

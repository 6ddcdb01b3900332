"""Calls in the package and its callers, resolved to the signatures of what they call.

Only syntax is read. What a call through an unknown object reaches is not known, and is left out.
"""

import ast
import pathlib
import re
from typing import NamedTuple

PACKAGE = "fedsafe_jax"
CALLERS = ("tests", "benchmarks", "configs")
# A signature is long with more parameters than this, or a record with more fields; a call of it
# passes at most POSITIONAL arguments by position.
MOST_PARAMETERS, MOST_FIELDS, POSITIONAL = 5, 4, 3
# Functions decorated with one of these are exempt: jax finds their static, donated, mapped or
# non-differentiated arguments by position. With `static_argnames` alone they are not exempt.
TRANSFORMED = re.compile(r"argnums|in_axes|in_shardings|[vp]map|shard_map|custom_[vj][vj]p|grad\b")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Module(NamedTuple):
    """A parsed file, with what its top-level names stand for."""

    path: pathlib.Path
    tree: ast.Module
    package: str
    names: dict


class Definition(NamedTuple):
    """A function or class; `bound`: the function's first parameter is given by the object."""

    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bound: bool = False


class Instance(NamedTuple):
    """An object of a class (`self`), or of its bases only (`super()`)."""

    of: Definition
    bases_only: bool = False


class Call(NamedTuple):
    """A call of a long signature; `arguments`: those the callee gets by position."""

    node: ast.Call
    name: str
    arguments: list[ast.expr]
    parameters: list[str]
    record: bool
    partial: bool

    @property
    def starred(self) -> bool:
        """Whether `*xs` is passed, other than as the one argument that rebuilds a record."""
        alone = self.record and len(self.arguments) == 1 and not self.node.keywords
        return not alone and any(isinstance(x, ast.Starred) for x in self.arguments)


def scope_of(body: list, module: Module) -> dict:
    """The names that a body binds: definitions, dotted names of imports, None for the rest."""
    names: dict = {}

    def bind(name: str, value: object) -> None:
        names[name] = value if names.get(name, value) == value else None

    nodes = list(body)
    while nodes:
        node = nodes.pop(0)
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bind(node.name, Definition(module, node))
                continue
            case ast.Import():
                for alias in node.names:
                    first = alias.name.split(".")[0]
                    bind(alias.asname or first, alias.name if alias.asname else first)
            case ast.ImportFrom():
                parents = module.package.split(".")[: 1 - node.level or None] if node.level else []
                for alias in node.names:
                    parts = [*parents, *filter(None, [node.module]), alias.name]
                    bind(alias.asname or alias.name, ".".join(parts))
            case ast.Name(ctx=ast.Store() | ast.Del()):
                bind(node.id, None)
            case ast.ExceptHandler(name=str()):
                bind(node.name, None)
        if not isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """The parameters that have a name of their own, in order."""
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def decorated(node: ast.AST, pattern: str | re.Pattern) -> bool:
    return any(re.search(pattern, ast.unparse(x)) for x in node.decorator_list)


class Tree:
    """The files of the package and of its callers, and what a name in them stands for."""

    def __init__(self, root: pathlib.Path):
        self.root, self.modules = root, {}
        for path in sorted(x for top in (PACKAGE, *CALLERS) for x in (root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[0] != PACKAGE:
                parts = parts[-1:]  # Tests and benchmarks import one another as plain files.
            name = ".".join(parts).removesuffix(".__init__")
            module = Module(path, ast.parse(path.read_text()), ".".join(parts[:-1]), {})
            module.names.update(scope_of(module.tree.body, module))
            self.modules[name] = module

    def resolve(self, dotted: str) -> object:
        """The definition behind a dotted name, or the name of a module or of something foreign."""
        parent, _, name = dotted.rpartition(".")
        if parent in self.modules and name in (names := self.modules[parent].names):
            value = names[name]
            return self.resolve(value) if isinstance(value, str) and value != dotted else value
        return dotted

    def target(self, node: ast.expr, scopes: list[dict]) -> object:
        """A Definition, an Instance, a dotted name, or None where the object is not known."""
        match node:
            case ast.Name():
                value = next((s[node.id] for s in reversed(scopes) if node.id in s), None)
                return self.resolve(value) if isinstance(value, str) else value
            case ast.Call(func=ast.Name(id="super"), args=[]):
                owner = next((s["super"] for s in reversed(scopes) if "super" in s), None)
                return owner and Instance(owner, bases_only=True)
            case ast.Attribute():
                base = self.target(node.value, scopes)
                if isinstance(base, str):
                    return self.resolve(f"{base}.{node.attr}")
                if isinstance(base, Instance):
                    return self.method(base.of, node.attr, base.bases_only)
                if isinstance(base, Definition) and isinstance(base.node, ast.ClassDef):
                    method = self.method(base, node.attr)
                    static = method and decorated(method.node, r"^(static|class)method$")
                    return method if static else None
        return None

    def bases(self, owner: Definition) -> list[Definition]:
        bases = [self.target(base, [owner.module.names]) for base in owner.node.bases]
        return [x for x in bases if isinstance(x, Definition) and isinstance(x.node, ast.ClassDef)]

    def method(self, owner: Definition, name: str, bases_only: bool = False) -> Definition | None:
        """A class's method, its own or inherited."""
        for node in [] if bases_only else owner.node.body:
            if isinstance(node, FUNCTIONS) and node.name == name:
                free = decorated(node, r"property$|\.setter$")
                bound = not decorated(node, "^staticmethod$")
                return None if free else Definition(owner.module, node, bound)
        return next(filter(None, (self.method(x, name) for x in self.bases(owner))), None)

    def record(self, owner: Definition) -> bool:
        """Whether a class's constructor takes its fields: NamedTuple, dataclass or flax Module."""
        by_base = any(
            re.search(r"\b(NamedTuple|Module)$", ast.unparse(x)) for x in owner.node.bases
        )
        own = by_base or decorated(owner.node, r"\bdataclass\b")
        return own or any(self.record(x) for x in self.bases(owner))

    def fields(self, owner: Definition) -> list[str]:
        names = [name for base in self.bases(owner) for name in self.fields(base)]
        for node in owner.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if not re.search(r"ClassVar|init=False", ast.unparse(node)):
                    names.append(node.target.id)
        return list(dict.fromkeys(names))

    def signature(self, callee: object) -> tuple[list[str], bool] | None:
        """What a long signature takes by position, and whether it is a record's; None if short."""
        if not isinstance(callee, Definition):
            return None
        if isinstance(callee.node, ast.ClassDef):
            init = self.method(callee, "__init__")
            if init is None:
                names = self.fields(callee) if self.record(callee) else []
                return (names, True) if len(names) > MOST_FIELDS else None
            callee = init
        arguments = callee.node.args
        if arguments.posonlyargs or decorated(callee.node, TRANSFORMED):
            return None
        many = len(parameters(arguments)) - callee.bound > MOST_PARAMETERS
        return ([x.arg for x in arguments.args[callee.bound :]], False) if many else None


class Calls(ast.NodeVisitor):
    """The calls in one module of signatures that are long, with the scopes they stand in."""

    def __init__(self, tree: Tree, module: Module):
        self.tree, self.module, self.calls = tree, module, []
        self.scopes, self.owner = [module.names], None
        self.visit(module.tree)

    def within(self, scope: dict, nodes: list, owner: Definition | None = None) -> None:
        outer, self.owner = self.owner, owner
        self.scopes.append(scope)
        for node in nodes:
            self.visit(node)
        self.scopes.pop()
        self.owner = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outside in (*node.decorator_list, node.args):
            self.visit(outside)
        arguments = parameters(node.args)
        variadic = filter(None, (node.args.vararg, node.args.kwarg))
        scope: dict = {x.arg: None for x in (*arguments, *variadic)}
        if self.owner and arguments and not decorated(node, "^staticmethod$"):
            by_class = decorated(node, "^classmethod$")
            scope[arguments[0].arg] = self.owner if by_class else Instance(self.owner)
            scope["super"] = self.owner
        for name, value in scope_of(node.body, self.module).items():
            scope[name] = None if name in scope else value
        self.within(scope, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        variadic = filter(None, (node.args.vararg, node.args.kwarg))
        self.within({x.arg: None for x in (*parameters(node.args), *variadic)}, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outside in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outside)
        self.within({}, node.body, Definition(self.module, node))

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, COMPREHENSIONS):
            stored = (x for g in node.generators for x in ast.walk(g.target))
            names = {x.id: None for x in stored if isinstance(x, ast.Name)}
            self.within(names, list(ast.iter_child_nodes(node)))
        else:
            super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        callee, arguments = node.func, node.args
        partial = self.tree.target(callee, self.scopes) == "functools.partial"
        if partial and arguments:
            callee, *arguments = arguments
        signature = self.tree.signature(self.tree.target(callee, self.scopes))
        if signature:
            names, record = signature
            name = ast.unparse(callee)
            self.calls.append(
                Call(node, name, arguments, parameters=names, record=record, partial=partial)
            )
        self.generic_visit(node)


def positional_calls(tree: Tree, module: Module) -> list[Call]:
    """A module's calls of long signatures that pass more than three arguments by position."""
    calls = Calls(tree, module).calls
    return [x for x in calls if x.starred or len(x.arguments) > POSITIONAL]

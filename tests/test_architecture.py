"""Imports go one way: the table of docs/architecture.md, with every file governed."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / "fedsafe_jax"
TOP = {"__init__", "__main__", "main", "experiment", "finetune", "config"}
TOP |= {"own_folder", "whole_files"}
LEAVES = {
    "random_streams",
    "registry",
}  # files at the top that import nothing, and that every room may import
# Lowest first: a room (a package, or a file at the top) and what it may import beside itself.
BELOW_TEXT = {"models"}
SCIENCE = {"models", "data", "inference", "filters", "federated", "cai", "evals"}
MAY_IMPORT = {
    "aot": SCIENCE | {"config", "pipeline"},
    "models": {"own_folder", "whole_files"},
    "data": set(),
    "fetch": {"data", "whole_files"},
    "interop": {"data", "whole_files"},
    "config": set(),
    "own_folder": {"whole_files"},
    "whole_files": set(),
    "federated": {"models", "data"},
    "filters": {"models", "data", "whole_files"},
    "inference": {"models", "data"},
    "serving": {"models", "data", "inference", "evals"},
    "cai": {"models", "data", "filters", "inference"},
    "evals": {"models", "data", "filters", "inference", "whole_files"},
    "runtime": {"federated", "own_folder", "whole_files"},
    "report": {"cai", "evals", "filters", "runtime", "whole_files"},
    "finetune": {"models", "data", "inference", "federated"},
    "attacks": {"models", "data", "inference", "evals", "finetune"},
    "guarding": {"models", "data", "inference", "evals", "filters"},
    "pipeline": SCIENCE | {"guarding", "runtime", "report", "config", "whole_files"},
    "demo": SCIENCE,
    "validation": SCIENCE
    | {"runtime", "report", "config", "pipeline", "aot"}
    | {"attacks", "guarding", "whole_files"},
    "experiment": SCIENCE
    | {"runtime", "config", "pipeline", "report", "validation", "own_folder", "whole_files"},
    "flower": SCIENCE
    | {"runtime", "config", "pipeline", "report", "validation", "experiment"}
    | {"own_folder", "whole_files"},
    "__init__": {"finetune", "inference", "federated", "models", "runtime"},
    "cli": None,  # everything
    "main": {"cli"},
    "__main__": {"cli"},
}
# The steps of the paper, in data's order: a step imports earlier ones alone. What to evaluate is
# known first, as nothing may be trained on that is near it.
STEPS = (
    "arms",
    "evaluation",
    "answer_files",
    "read_files",
    "workdir",
    "pools",
    "safe_lora_step",
    "inputs",
    "clients",
    "new_answers",
    "filtering",
    "round_setup",
    "rounds",
    "federation",
    "ledger_lines",
    "replay",
    "refusal_probe",
    "attribution",
    "own_answers",
    "revision_rows",
    "constitutional",
    "harm_by_client",
    "results",
    "export",
    "dry_run",
)
# The only module of `federated` that knows examples; the others see batches.
FEDERATED_SEES = {"data.packing"}
CONFIG_SEEN_BY = {"pipeline", "experiment", "validation", "flower", "cli"}


def modules():
    """Yields `(room, module, path)` of every file, such as `("data", "data.chat", ...)`."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield parts[0], ".".join(parts), path


def imported(path):
    """Yields the modules of the package that a file imports, such as "data.chat"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "fedsafe_jax":
                for alias in node.names:
                    inner = f"{module}.{alias.name}".strip(".")
                    file = ROOT / f"{inner.replace('.', '/')}"
                    is_module = file.is_dir() or file.with_suffix(".py").is_file()
                    yield inner if is_module else module or "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "fedsafe_jax":
                    yield alias.name.partition(".")[2] or "__init__"


def test_few_files_stay_on_top_and_every_room_is_governed():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP | LEAVES
    assert {room for room, _, _ in modules()} == set(MAY_IMPORT) | LEAVES


def test_no_import_points_up():
    for room, module, path in modules():
        allowed = set() if room in LEAVES else MAY_IMPORT[room]
        for target in imported(path):
            first = target.partition(".")[0]
            if allowed is not None and first != room:
                assert first in allowed | LEAVES, f"{module} imports {target}"


def test_steps_of_the_paper_import_earlier_ones_alone():
    files = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert files == set(STEPS)
    for step in STEPS:
        for target in imported(ROOT / "pipeline" / f"{step}.py"):
            room, _, other = target.partition(".")
            if room == "pipeline" and other:
                assert STEPS.index(other) < STEPS.index(step), f"{step} imports {other}"


def test_the_config_is_seen_from_the_pipeline_up():
    for room, module, path in modules():
        if "config" in {target.partition(".")[0] for target in imported(path)}:
            assert room in CONFIG_SEEN_BY, f"{module} imports config"


def test_imports_make_no_circle():
    graph = {module: set(imported(path)) for _, module, path in modules()}
    packages = {module.removesuffix(".__init__"): module for module in graph}
    done: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for target in sorted(graph[module]):
                target = packages.get(target, target)
                if target in graph and target != "__init__":
                    visit(target, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_nnx_is_never_imported():
    for path in ROOT.rglob("*.py"):
        assert "nnx" not in path.read_text(), path


def test_no_benchmark_is_named_outside_its_file():
    # The output of `fedsafe attack` has a field of that name.
    allowed = {"config.py", "data/readers.py", "cli/attack.py"}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name not in allowed and not name.startswith("evals/tasks/"):
            text = path.read_text()
            assert "advbench" not in text and "over_refusal" not in text, name


def test_test_files_have_names_of_their_own():
    """pytest imports them by name alone, and of two with one name it runs one."""
    files = pathlib.Path(__file__).parent.rglob("*.py")
    names = [path.name for path in files if path.name != "conftest.py"]  # loaded by its folder
    assert sorted(names) == sorted(set(names))

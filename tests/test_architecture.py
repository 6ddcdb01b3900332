"""Imports go one way: the table in the README's architecture section."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / "fedsafe_jax"
MAY_IMPORT = {
    "models": {"models"},
    "data": {"data"},
    "decoding": {"models", "data", "sampling"},
    "generation": {"models", "data", "sampling", "decoding"},
    "sampling": set(),
    "federated": {"federated", "models", "data"},
    "filters": {"filters", "models", "data"},
    "cai": {"cai", "models", "data", "generation"},
    "evals": {"evals", "data", "models", "generation", "filters"},
    "checkpoint": {"federated"},
    "config": set(),
    "validation": {"cai", "config", "data", "federated", "filters"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("fedsafe_jax")
        ):
            parts = node.module.split(".")
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (alias.name for alias in node.names)


def test_no_import_points_up():
    for room, allowed in MAY_IMPORT.items():
        target = ROOT / room
        files = sorted(target.rglob("*.py")) if target.is_dir() else [target.with_suffix(".py")]
        assert files
        for path in files:
            found = set(imported(path)) - allowed
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_nnx_is_never_imported():
    for path in ROOT.rglob("*.py"):
        assert "nnx" not in path.read_text(), path

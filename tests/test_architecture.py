"""The house of docs/design.md held to the code: which room may import which, and where heavy packages may come in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tidar_mega.config import METHODS

PACKAGE = Path(__file__).parent.parent / "tidar_mega"

# room -> rooms it may import; a room may always import itself
MAY_IMPORT = {
    "config": set(),
    "rows": set(),
    "plan": {"config", "parallel", "arguments"},  # of parallel only balance.py, which needs no torch
    "lifetime": set(),
    "launch": {"config", "plan", "lifetime"},
    "device": {"config"},
    "parallel": {"config", "rows", "device"},
    "data": {"config", "rows"},
    "losses": {"rows", "parallel"},
    "methods": {"config", "rows", "losses"},
    "model": {"config", "rows", "device", "parallel"},
    "checkpoint": {"config", "lifetime", "parallel", "model", "device"},
    "train": {"config", "plan", "rows", "device", "parallel", "data", "losses", "methods", "model", "checkpoint"},
    "decode": {"config", "rows", "device", "parallel", "data", "methods", "model", "checkpoint"},
}
MAY_IMPORT["arguments"] = {"config"}
MAY_IMPORT["evaluation"] = MAY_IMPORT["decode"] | {"decode", "losses", "arguments"}
MAY_IMPORT["bench"] = MAY_IMPORT["evaluation"] | MAY_IMPORT["train"] | {"evaluation", "train", "launch"}
MAY_IMPORT["doctor"] = {"config", "data", "model"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) | {"bench", "doctor"}
MAY_IMPORT["__init__"] = set()

# package -> rooms that may import it
ONE_ROOM = {
    "omegaconf": {"config"},
    "submitit": {"launch"},
    "webdataset": {"data"},
    "tokenizers": {"data"},
    "megatron.core.models": {"model"},
    "megatron.core.transformer": {"model"},
    "megatron.core.dist_checkpointing": {"checkpoint"},
    "transformer_engine": {"model"},
    "torch.utils.tensorboard": {"train"},
    "tensorboard": {"train"},
    "lm_eval": {"evaluation"},
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full dotted names of everything that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_the_design_allows(path):
    own = {name.split(".")[1] for name in imports(path) if name.startswith("tidar_mega.")}
    assert own - {room(path)} <= MAY_IMPORT[room(path)]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_in_their_room(path):
    for name in imports(path):
        for package, rooms in ONE_ROOM.items():
            if name == package or name.startswith(f"{package}."):
                assert room(path) in rooms, f"{name} belongs to {rooms}"


def test_config_plan_and_launch_need_no_torch():
    plan = [*(PACKAGE / "plan").glob("*.py"), PACKAGE / "parallel" / "balance.py"]
    for path in [*(PACKAGE / "config").glob("*.py"), *(PACKAGE / "launch").glob("*.py"), *plan]:
        assert not any(i.split(".")[0] in ("torch", "megatron") for i in imports(path))
    for path in plan:
        ours = {i for i in imports(path) if i.startswith("tidar_mega.parallel.")}
        assert all(i.startswith("tidar_mega.parallel.balance.") for i in ours)


def test_functions_are_short():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 100, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_every_method_of_ours_is_in_the_table_of_settings():
    assert sorted(METHODS) == sorted(p.stem for p in (PACKAGE / "methods").glob("*.py") if p.stem != "__init__")

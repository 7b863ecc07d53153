"""The rooms keep to their import directions, and the lower ones work without what they must not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("actors", "configs", "drafters", "engine", "policies", "services")
BLOCKED = {"engine": ("ray", "fastapi"), "drafters": ("ray", "fastapi"), "policies": ("torch", "ray"), "configs": ("torch", "ray")}

PROBE = """
import importlib, pkgutil, sys
blocked, room = set(sys.argv[2:]), sys.argv[1]

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Wall())
package = importlib.import_module(room)
for module in pkgutil.walk_packages(package.__path__, room + "."):
    importlib.import_module(module.name)
"""


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def test_contracts() -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("room", BLOCKED)
def test_room_imports_without(room: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, room, *BLOCKED[room]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_type_checking_imports() -> None:
    hidden = [str(path) for path in sources() if "TYPE_CHECKING" in path.read_text()]
    assert not hidden


def test_environment_is_read_in_configs_only() -> None:
    readers = {str(path.relative_to(ROOT)) for path in sources() if path.parent.name != "configs" and reads_environment(path)}
    assert not readers


def reads_environment(path: Path) -> bool:
    """Whether the module calls os.getenv, os.environ.get or loads os.environ[...]; setting a variable for a child is no read."""
    return any(is_read(node) for node in ast.walk(ast.parse(path.read_text())))


def is_read(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        return isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "os.environ"
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.getenv", "os.environ.get")

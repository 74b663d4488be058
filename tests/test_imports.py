"""The import direction between packages, rooms and files, and what may not be imported at a module's top level."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("cfsp", "exporters", "runtime_bench", "phoneready")
ROOMS = {
    "cfsp": (
        {"errors", "progress", "precision", "child_process"},
        {"files", "reading", "validation", "units", "plugins", "settings"},
        {"records", "devices", "memory"},
        {"models"},
        {"text"},
        {"evaluation"},
        {"pruning"},
        {"recovery"},
    ),
    "exporters": (
        {"recipe"},
        {"export_record"},
        {"family"},
        {"checkpoint_reader", "proof"},
        {"job", "quantize"},
        {"gguf", "onnx"},
        {"families"},
    ),
    "runtime_bench": (
        {"counters", "workload"},
        {"records"},
        {"engines", "environment", "devices"},
        {"worker", "conditions"},
        {"process"},
        {"native", "browser"},
        {"targets"},
        {"measuring", "presentation"},
    ),
    "phoneready": (
        {"console", "text"},
        {"figures", "model_checks"},
        {"evaluation", "exporting"},
        {"settings", "room"},
        {"release"},
        {"report"},
        {"publish", "history"},
        {"releasing", "tracking"},
        {"search"},
        {"commands"},
        {"main"},
        {"__main__"},
    ),
}
"""Rooms and files of each package in layers, the lowest first: each knows lower layers alone."""
OPTIONAL = {
    "llama_cpp",
    "datasets",
    "pyarrow",
    "peft",
    "accelerate",
    "lm_eval",
    "mlflow",
    "playwright",
}
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, those under `if TYPE_CHECKING` left out."""
    for node in tree.body:
        if isinstance(node, ast.If | ast.Try):
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                yield from node.body
            yield from node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def test_packages_import_downwards_and_optional_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        layer = path.relative_to(ROOT).parts[0]
        names = set(imported(tree))
        above = LAYERS[LAYERS.index(layer) + 1 :]
        found = {name for name in names if name.split(".")[0] in above}
        if "remote_code" not in path.parts:  # copied into checkpoints, where no package surrounds it
            found |= {name for name in names if name.startswith(".")}
        at_import = {name for node in top_level(tree) for name in imported(node)}
        found |= {name for name in at_import if name.split(".")[0] in OPTIONAL}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(found)]
    assert not wrong


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports anywhere, its own type annotations included."""
    known = {module_of(other) for other in MODULES}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & known


def strangers_above(package: str, arrows: Iterable[tuple[str, str]]) -> list[str]:
    """Arrows of a package from one room to another one that does not lie below it."""
    layers = {room: number for number, rooms in enumerate(ROOMS[package]) for room in rooms}
    wrong = []
    for source, target in arrows:
        rooms = [name.split(".")[1] for name in (source, target) if name.startswith(package + ".")]
        if len(rooms) == 2 and rooms[0] != rooms[1] and layers[rooms[0]] <= layers[rooms[1]]:
            wrong.append(f"{source} -> {target}")
    return wrong


ARROWS = [(module_of(path), target) for path in MODULES for target in sorted(imported_modules(path))]


def test_rooms_know_only_lower_rooms() -> None:
    for package in LAYERS:
        paths = (path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py"))
        there = {path.parts[0].removesuffix(".py") for path in paths}
        assert there - {"__init__"} == set().union(*ROOMS[package])
        assert not strangers_above(package, ARROWS)


def test_no_circle_of_files() -> None:
    below: dict[str, set[str]] = {}
    for source, target in ARROWS:
        if source != target and not target.startswith(source + ".") and source not in LAYERS:
            below.setdefault(source, set()).add(target)
    graph = graphlib.TopologicalSorter(below)
    graph.prepare()  # raises CycleError, which names the circle


def test_the_rules_catch_an_arrow_up_and_sideways() -> None:
    up, side, down = (
        ("cfsp.text.tokens", "cfsp.pruning.plan"),
        ("cfsp.errors", "cfsp.progress"),
        ("cfsp.text.tokens", "cfsp.files"),
    )
    assert strangers_above("cfsp", [up, side, down]) == [" -> ".join(up), " -> ".join(side)]


def test_the_rules_catch_what_they_are_for() -> None:
    tree = ast.parse(
        "try:\n    import pyarrow\nexcept ImportError:\n    pass\ndef f():\n    import llama_cpp\n"
    )
    found = {name for node in top_level(tree) for name in imported(node)}
    assert found == {"pyarrow"}


def test_help_is_shown_without_a_command_and_a_commands_without_torch() -> None:
    code = "import sys; from phoneready.main import main; main(['--help']); "
    code += "commands = [m for m in sys.modules if m.startswith('phoneready.commands.')]; "
    code += (
        "print(commands, 'pydantic' in sys.modules); main(['prune', '--help']); main(['bench', '--help']); "
    )
    code += "print(sorted({'torch', 'transformers', 'llama_cpp', 'gguf'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "['phoneready.commands.options'] False" in result.stdout
    assert result.stdout.endswith("[]\n")

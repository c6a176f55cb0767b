"""The imports of the package: no cycles, and only from layers above; and those of the tests."""

import ast
import graphlib

import pytest
from helpers.paths import ROOT, TESTS

pytestmark = pytest.mark.fast

PACKAGE = ROOT / "starflow2_jax"
# A module imports from its own layer and from those before it. Modules at the package's root that
# are not named here are commands.
LAYERS = (
    ("config", "mesh", "params"),
    ("runtime",),
    ("data",),
    ("importers",),
    ("shapes",),
    ("models", "models/fae", "models/ablations"),
    ("checkpoints", "checkpoints/convert"),
    ("latents",),
    ("training", "training/losses", "training/tasks", "training/logging"),
    ("inference",),
    (
        "evaluation",
        "evaluation/shapes",
        "evaluation/report",
        "evaluation/benchmarks",
        "evaluation/judges",
        "evaluation/image_metrics",
        "evaluation/harnesses",
    ),
    ("serving",),
    ("planning",),
    ("benchmarking",),
    ("commands",),
)
LAYER_OF = {box: number for number, boxes in enumerate(LAYERS) for box in boxes}


def imported_names(tree):
    """Yield every module or name that a file imports, except for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported_names(node)


def imported_files(path):
    """Return the files of the package that a file imports."""
    names = imported_names(ast.parse(path.read_text("utf-8")))
    targets = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {target for target in targets if target != path and target.is_relative_to(PACKAGE)}


def box(path):
    """Return the folder that a module belongs to, or its name if it lies at the package's root."""
    if path.parent != PACKAGE:
        return path.parent.relative_to(PACKAGE).as_posix()
    return path.stem if path.stem in LAYERS[0] else "commands"


@pytest.fixture(scope="module")
def file_imports():
    """Every module of the package, with the modules that it imports."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {path: {f for f in imported_files(path) if f in files} for path in files}


def cycle(graph):
    """Return one cycle of a graph, node by node, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_folder_has_a_layer():
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    missing = {folder.relative_to(PACKAGE).as_posix() for folder in folders} - set(LAYER_OF)
    assert not missing, f"give these folders a place in LAYERS: {sorted(missing)}"


def test_files_import_one_another_in_no_cycle(file_imports):
    names = [path.relative_to(PACKAGE).as_posix() for path in cycle(file_imports)]
    assert not names, " imports ".join(names)


def test_folders_import_one_another_in_no_cycle(file_imports):
    boxes = {}
    for path, targets in file_imports.items():
        boxes.setdefault(box(path), set()).update({box(t) for t in targets} - {box(path)})
    assert not cycle(boxes), " imports ".join(cycle(boxes))


def test_a_module_imports_from_its_own_layer_and_those_before(file_imports):
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {target.relative_to(PACKAGE)}"
        for path, targets in file_imports.items()
        for target in targets
        if LAYER_OF[box(path)] < LAYER_OF[box(target)]
    ]
    assert not upwards, "imports against the order of LAYERS:\n" + "\n".join(sorted(upwards))


def test_a_command_imports_no_other(file_imports):
    commands = {path for path in file_imports if box(path) == "commands"}
    pairs = [
        f"{path.name} imports {target.name}"
        for path in commands
        for target in file_imports[path] & commands
        if path.stem != "__main__"
    ]
    assert not pairs, sorted(pairs)


def test_no_test_module_imports_another():
    modules = {path.stem for path in TESTS.rglob("test_*.py")} | {"conftest"}
    imports = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in TESTS.rglob("*.py")
        for name in imported_names(ast.parse(path.read_text("utf-8")))
        if modules & set(name.split("."))
    ]
    assert not imports, f"put what tests share into tests/helpers: {imports}"


def test_tests_lie_in_the_folders_of_what_they_test():
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    unknown = folders - set(LAYER_OF) - {".", "docs", "experiments", "launch", "peer", "soak"}
    assert not unknown, f"tests mirror the package, which has no {sorted(unknown)}"


def test_every_folder_has_fast_tests():
    fast = {path.parent for path in TESTS.rglob("test_*.py") if "mark.fast" in path.read_text()}
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    slow = {path.relative_to(TESTS).as_posix() for path in folders - fast}
    assert slow <= {"docs", "launch", "peer"}, f"mark some tests in these as fast: {sorted(slow)}"

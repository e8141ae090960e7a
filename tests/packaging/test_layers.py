"""The layers of hkdfast, read from its imports: what no folder may import, and no cycle between modules."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUGGING_FACE = {"transformers", "peft", "trl", "accelerate", "huggingface_hub", "datasets", "tokenizers"}
FORBIDDEN = {  # folder of hkdfast: the folders that it never imports, at module level or later
    "ops": {"engine", "data", "evaluate", "hf", "cli"},
    "kernels": {"engine", "data", "evaluate", "hf", "cli"},
    "engine": {"data", "evaluate", "hf", "cli"},
    "data": {"hf", "cli"},
    "evaluate": {"hf", "cli"},
    "hf": {"cli"},
}


def modules():
    """{dotted name: path} of all modules of hkdfast, those of the kernels by their link."""
    found = {}
    for path in [*(ROOT / "hkdfast").glob("**/*.py"), *(ROOT / "hkdfast/kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name, lazy):
    """Full names of what a module imports; of `from a import b` a.b if that is a module, else a.

    lazy: also the imports inside functions. Those under `if TYPE_CHECKING` never run and are left out.
    """
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)


def folder(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "hkdfast" and len(parts) > 1 else ""


def test_the_modules_are_found():
    assert {"hkdfast", "hkdfast.losses", "hkdfast.hf.seed", "hkdfast.kernels.distill", "hkdfast.cli"} <= MODULES.keys()
    assert {folder(name) for name in MODULES} >= {*FORBIDDEN, "cli"}
    assert "hkdfast.engine.terms" in imports("hkdfast.losses", lazy=False)
    assert "hkdfast.kernels.scale" in imports("hkdfast.engine.autograd", lazy=True)
    assert "hkdfast.kernels.scale" not in imports("hkdfast.engine.autograd", lazy=False)


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_no_folder_imports_a_layer_above_it(layer):
    for name in MODULES:
        if folder(name) == layer:
            wrong = {other for other in imports(name, lazy=True) if folder(other) in FORBIDDEN[layer]}
            assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_data_and_evaluate_import_no_hugging_face_library():
    for name in MODULES:
        if folder(name) in ("data", "evaluate"):
            assert not {other.split(".")[0] for other in imports(name, lazy=True)} & HUGGING_FACE, name


def test_no_module_level_import_cycle():
    graph = {name: {other for other in imports(name, lazy=False) if other in MODULES} for name in MODULES}
    graph = {name: others - {name} for name, others in graph.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))

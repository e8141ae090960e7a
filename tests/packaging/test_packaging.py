"""What the layout promises: what an import costs, which file may import what, one place for each fact."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hkdfast

ROOT = Path(__file__).parents[2]
HUGGING_FACE = {"transformers", "peft", "trl", "accelerate"}


def test_kernels_is_no_package():
    # with an __init__.py it would hide Hugging Face's `kernels` package from transformers
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels/__init__.py").exists()


def test_kernels_are_reached_through_the_link():
    assert (ROOT / "hkdfast/kernels").is_symlink()
    assert (ROOT / "hkdfast/kernels").resolve() == ROOT / "kernels"


IMPORT = """
import sys, torch
def probed(*arguments, **options): raise SystemExit("import hkdfast asks for a GPU")
for module in (torch.cuda, torch._C):
    for name in dir(module):
        if name in ("is_available", "device_count", "init", "_cuda_getDeviceCount", "_cuda_init"):
            setattr(module, name, probed)
before = set(sys.modules)
import hkdfast
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_import_needs_torch_alone_and_no_gpu():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "hkdfast" in loaded
    assert not loaded & (HUGGING_FACE | {"triton", "PIL", "tqdm", "matplotlib", "pytest"}), loaded


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).glob("**/*.py"))]


def imported(path):
    """Top-level names of the packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_only_hf_imports_hugging_face_and_only_kernels_import_triton():
    files = sources("hkdfast", "kernels")
    assert len(files) > 20
    for path in files:
        place = path.relative_to(ROOT)
        if place.parts[:2] != ("hkdfast", "hf"):
            assert not imported(path) & HUGGING_FACE, place
        if place.parts[0] != "kernels" and place.parts[:2] != ("hkdfast", "kernels"):
            assert "triton" not in imported(path), place


def test_csrc_includes_no_torch():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert {path.parent.name for path in files} == {"common", "cpu", "cuda", "instances"}
    for path in files:
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M):
            assert not re.match(r"(torch|ATen|c10|caffe2)\b", header), f"{path.name} includes {header}"


def test_the_version_stands_in_one_place():
    pattern = re.compile(r"""^\s*(__version__|version)\s*=\s*["']\d""", re.M)
    files = [*sources("hkdfast", "kernels"), ROOT / "pyproject.toml", ROOT / "setup.py"]
    assert [path.relative_to(ROOT).as_posix() for path in files if pattern.search(path.read_text())] == [
        "hkdfast/__init__.py"
    ]
    assert re.fullmatch(r"\d+\.\d+\.\d+", hkdfast.__version__)


def test_every_package_folder_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in sources("hkdfast")} | {ROOT / "hkdfast/kernels"}
    assert sorted(listed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_constraints_pin_what_the_extras_ask_for():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.match(r"[\w.-]+", requirement).group() for requirement in asked}
    # flash-attn builds against the user's own CUDA; build only makes archives
    assert names - pinned == {"hkdfast", "flash-attn", "build"}


@pytest.mark.parametrize("module", ["hkdfast", "hkdfast.hf"])
def test_public_names_exist_and_explain_themselves(module):
    if module == "hkdfast.hf":
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    package = importlib.import_module(module)
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        thing = getattr(package, name)
        if callable(thing):
            assert (thing.__doc__ or "").strip(), f"{module}.{name} has no docstring"
            # a dataclass without a docstring gets its signature for one
            assert not thing.__doc__.startswith(f"{name}("), f"{module}.{name} has no docstring"


def readme_command(name):
    done = subprocess.run([ROOT / ".ci/readme-command", name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("name", "job"), [("seed", "benchmarks/quality/run.py seed"), ("tests", "pytest")])
def test_readme_commands_set_everything_up_in_one_line(name, job):
    command = readme_command(name)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ")
    assert command.endswith(job)
    assert (ROOT / "constraints.txt").is_file()
    for script in re.findall(r"\S+\.py", command):
        assert (ROOT / script).is_file()


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text()
    assert "command=$(.ci/readme-command tests)\n" in script
    assert 'bash -c "$command"' in script
    # and no copy of it that could drift
    assert readme_command("tests") not in script
    assert "set -euo pipefail" in script


def test_an_unknown_readme_command_fails():
    done = subprocess.run([ROOT / ".ci/readme-command", "lunch"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "<!-- command: lunch -->" in done.stderr

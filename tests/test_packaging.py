"""The package as a user gets it: sdist and wheel are built, installed in a new environment and run.

Everything happens in temporary folders, from a copy of the source tree, without the network. A new
environment borrows torch, numpy and triton from the running one by their folder. That folder's .pth
files are not read, so a development install of this package cannot stand in for the wheel.
"""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import build  # noqa: F401  without it this file must fail, not skip
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Not part of the source: what git ignores, and any environment, whatever its name.
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "runs"
)

# A row that is ignored and one that counts, forward and backward, on the CPU.
TINY_LOSS = """
import drkl_triton, torch
student = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 0.0]], requires_grad=True)
teacher = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
loss = drkl_triton.drkl(
    student, teacher, torch.tensor([1, -100]), gamma=0.5, backend={backend!r}
)
loss.backward()
if not (loss.item() > 0 and student.grad[0].abs().min() > 0 and (student.grad[1] == 0).all()):
    raise SystemExit(f"wrong result: {{loss.item()}}, {{student.grad.tolist()}}")
"""


def run(*command, cwd, **variables):
    """Run a command without the variables that would lend it this process's modules or backend."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "PYTEST_CURRENT_TEST")
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def must(result):
    if result.returncode != 0:
        pytest.fail(f"{result.args}\n{result.stdout}{result.stderr}", pytrace=False)
    return result.stdout


class Environment:
    """A new virtual environment that sees the running one's torch, numpy, triton and setuptools."""

    def __init__(self, folder):
        venv.create(folder, symlinks=os.name != "nt")  # without pip, which takes seconds
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        purelib = must(self.execute(where, folder)).strip()
        borrowed = {
            str(Path(spec.origin).parents[1])
            for spec in map(find_spec, ("torch", "numpy", "triton", "setuptools"))
            if spec
        }
        (Path(purelib) / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")

    def install(self, *what):
        must(
            run(
                *(sys.executable, "-m", "pip", "--python", self.python, "--no-input"),
                *("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"),
                *what,
                cwd=self.folder,
            )
        )

    def execute(self, code, cwd, **variables):
        """Run Python code from the folder cwd."""
        return run(self.python, "-c", textwrap.dedent(code), cwd=cwd, **variables)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the source tree: building writes beside setup.py, and must not in the real one."""
    folder = tmp_path_factory.mktemp("source") / "drkl-triton"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCE)
    return folder


@pytest.fixture(scope="session")
def built(source, tmp_path_factory):
    """(sdist, wheel). The wheel is built from the unpacked sdist: the sdist suffices."""
    out = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    must(run(*command, cwd=out))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def wheel_env(built, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("wheel") / "env")
    environment.install(built[1])
    return environment


def modules(folder, prefix=""):
    """Every .py file below folder, as a path inside the installed package."""
    return {
        prefix + path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    }


def test_wheel_holds_the_two_packages_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    expected = modules(ROOT / "drkl_triton", "drkl_triton/")
    expected |= modules(ROOT / "kernels", "drkl_triton/kernels/")
    assert names == expected | {"drkl_triton/py.typed"}
    assert "drkl_triton/kernels/__init__.py" in names


def test_wheel_metadata(built):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    version = (ROOT / "drkl_triton/_version.py").read_text().split('"')[1]
    assert (metadata["Name"], metadata["Version"]) == ("drkl-triton", version)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"torch>=2.8", "numpy", 'triton>=3.4; platform_system == "Linux"'}
    assert set(metadata.get_all("Provides-Extra")) == {
        *("test", "bench", "examples", "dev", "trl", "cache")
    }
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text("utf-8").strip()


def test_sdist_holds_what_building_and_testing_need(built):
    with tarfile.open(built[0]) as archive:
        members = [member.name.split("/", 1)[1] for member in archive if member.isfile()]
    expected = {"Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    expected |= {"setup.py", "pyproject.toml", "README.md", ".ci/run", "drkl_triton/py.typed"}
    for folder in ("drkl_triton", "kernels", "tests", "bench", "examples", "hub"):
        expected |= modules(ROOT / folder, f"{folder}/")
    assert not expected - set(members)
    assert not [name for name in members if "__pycache__" in name or name.endswith(".pyc")]


def test_installed_wheel_runs(wheel_env, tmp_path):
    code = """
    import importlib.metadata, importlib.util, pathlib, sys
    import drkl_triton
    home = pathlib.Path(drkl_triton.__file__).resolve()
    assert pathlib.Path(sys.prefix).resolve() in home.parents, home
    assert drkl_triton.__version__ == importlib.metadata.version("drkl-triton")
    assert (home.parent / "py.typed").is_file()
    if importlib.util.find_spec("triton"):
        import drkl_triton.kernels
        assert home.parent in pathlib.Path(drkl_triton.kernels.__file__).resolve().parents
    """
    must(wheel_env.execute(code, tmp_path))
    must(wheel_env.execute(TINY_LOSS.format(backend="auto"), tmp_path))
    # The name of Hugging Face's package: had ours taken it, it would lie in this environment.
    assert not list(wheel_env.folder.rglob("site-packages/kernels*"))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_installed_wheel_runs_its_kernels(wheel_env, tmp_path):
    must(wheel_env.execute(TINY_LOSS.format(backend="triton"), tmp_path, TRITON_INTERPRET="1"))


def test_runs_without_triton(wheel_env, tmp_path):
    # With None there, `import triton` raises ModuleNotFoundError and find_spec answers None.
    hide = """
import sys
sys.modules["triton"] = None
import importlib.util
assert importlib.util.find_spec("triton") is None
"""
    must(wheel_env.execute(hide + TINY_LOSS.format(backend="auto"), tmp_path))
    asked_for = wheel_env.execute(hide + TINY_LOSS.format(backend="triton"), tmp_path)
    assert asked_for.returncode != 0
    assert "triton" in asked_for.stderr.splitlines()[-1]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_missing_kernels_are_a_broken_install(built, wheel_env, tmp_path):
    """Triton is there and drkl_triton.kernels is not: an error, never the tiled backend instead."""
    broken, empty = tmp_path / "broken", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(broken)
    shutil.rmtree(broken / "drkl_triton" / "kernels")
    code = TINY_LOSS.format(backend="triton")
    result = wheel_env.execute(code, empty, TRITON_INTERPRET="1", PYTHONPATH=str(broken))
    assert result.returncode != 0
    error, _, message = result.stderr.splitlines()[-1].partition(": ")
    assert error in ("ImportError", "ModuleNotFoundError") and "kernels" in message, result.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_editable_install_maps_kernels(source, tmp_path):
    """`pip install -e .` finds drkl_triton.kernels in kernels/, and an edit needs no reinstall."""
    environment = Environment(tmp_path / "env")
    environment.install("-e", source)
    code = """
    import importlib.util
    import drkl_triton, drkl_triton.kernels
    from drkl_triton import added_later as one
    from drkl_triton.kernels import added_later as two
    for module in (drkl_triton, drkl_triton.kernels, one, two):
        print(module.__file__)
    print(importlib.util.find_spec("kernels"))
    """
    empty = tmp_path / "empty"
    empty.mkdir()
    expected = [
        source / "drkl_triton" / "__init__.py",
        source / "kernels" / "__init__.py",
        source / "drkl_triton" / "added_later.py",
        source / "kernels" / "added_later.py",
    ]
    for added in expected[2:]:
        added.write_text("")
    try:
        lines = must(environment.execute(code, empty)).splitlines()
    finally:
        for added in expected[2:]:
            added.unlink()
    assert lines[:-1] == list(map(str, expected))
    assert str(source) not in lines[-1]  # nothing, or Hugging Face's package


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
def test_style_is_the_same_after_an_installation(tmp_path):
    """pip install . leaves a folder build/, which is no module of this project."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(Path(__file__), tmp_path / "tests" / "test_packaging.py")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

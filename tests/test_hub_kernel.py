"""`make hub-kernel` writes a tree that Hugging Face's `kernels` loads, with the same numbers."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drkl_triton

kernels = pytest.importorskip("kernels")
ROOT = Path(__file__).resolve().parents[1]


def build(out):
    command = [sys.executable, ROOT / "hub" / "build.py", "--out", out]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "tree"
    result = build(out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module", params=["get_local_kernel", "LOCAL_KERNELS"])
def kernel(request, tree, tmp_path_factory):
    if request.param == "get_local_kernel":
        return kernels.get_local_kernel(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", f"someone/drkl-triton={tree}")
        return kernels.get_kernel("someone/drkl-triton", version=0)


def test_the_loaded_kernel_gives_the_same_numbers(kernel, backend):
    assert kernel.__name__ != "drkl_triton" and kernel.drkl is not drkl_triton.drkl
    assert set(kernel.__all__) == set(drkl_triton.__all__)
    labels = torch.tensor([3, -100, 0])
    student, teacher = torch.randn(3, 37, requires_grad=True), torch.randn(3, 37)
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(37, 8)

    def run(package):
        losses = [
            package.drkl(student, teacher, labels, gamma=0.3, backend=backend),
            package.reverse_kl(student, teacher, labels, backend=backend),
            package.softmax(student, backend=backend)[:, 0].sum(),
            package.linear_drkl(hidden, weight, labels, teacher_logits=teacher, backend=backend),
        ]
        return losses, torch.autograd.grad(sum(losses), (student, hidden))

    torch.testing.assert_close(run(kernel), run(drkl_triton), rtol=0, atol=0)


def test_it_compiles_beside_the_installed_package(kernel):
    labels = torch.tensor([3, -100, 0])
    student, teacher = torch.randn(3, 37), torch.randn(3, 37)
    for package in (kernel, drkl_triton):
        compiled = torch.compile(package.drkl, fullgraph=True, backend="aot_eager")
        expected = package.drkl(student, teacher, labels)
        torch.testing.assert_close(compiled(student, teacher, labels), expected)


def test_every_variant_is_complete_and_has_an_id_of_its_own(tree):
    from kernels._rust import Metadata
    from kernels.variants import get_variants_local

    variants = {v.variant_str for v in get_variants_local(tree / "build")}
    assert variants == {"torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"}
    ids = set()
    for name in variants:
        about = Metadata.read_from_file(tree / "build" / name / "metadata.json")
        assert (about.name.python_name, about.python_depends) == ("drkl_triton", [])
        assert about.license == "Apache-2.0" and str(about.kernels_minver) == "0.17.0"
        ids.add(about.id)
        assert (tree / "build" / name / "kernels" / "row_grad.py").exists()
    assert len(ids) == len(variants) and all(id.isidentifier() for id in ids)
    assert (tree / "README.md").exists() and (tree / "LICENSE").exists()


@pytest.mark.parametrize(
    "mine", ["thesis.tex", "README.md", "build/lib/mine.o", "build/torch-cpu/mine.py", "build"]
)
def test_a_folder_of_other_things_is_left_alone(mine, tmp_path):
    path = tmp_path / mine
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    result = build(tmp_path)
    assert result.returncode != 0 and "Pass another --out" in result.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


def test_what_is_no_folder_is_left_alone(tmp_path):
    file, elsewhere, linked = tmp_path / "file", tmp_path / "elsewhere", tmp_path / "linked"
    file.write_text("mine")
    elsewhere.mkdir(), linked.mkdir()
    (linked / "build").symlink_to(elsewhere)
    for out in (file, linked):
        assert "Pass another --out" in build(out).stderr
    assert file.read_text() == "mine" and not any(elsewhere.iterdir())


def test_an_earlier_result_is_replaced(tree):
    stale = tree / "build" / "torch-cpu" / "stale.py"
    stale.write_text("")
    assert build(tree).returncode == 0 and not stale.exists()
    assert (tree / "build" / "torch-cpu" / "functional.py").exists()


def test_an_absolute_import_of_the_package_is_refused():
    absolute_imports = runpy.run_path(str(ROOT / "hub" / "build.py"))["absolute_imports"]
    code = b"import torch\nfrom drkl_triton import drkl\nimport kernels.row_sums\nfrom . import x\n"
    assert absolute_imports("a.py", code) == ["a.py:2: drkl_triton", "a.py:3: kernels.row_sums"]

"""The code of README and of docs/add-a-divergence.md runs, and what stands beside it is true."""

import csv
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import drkl_triton

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / name for name in ("CONTRIBUTING.md", "examples/README.md", "bench/README.md")),
]
README = PAGES[0].read_text(encoding="utf-8")
V = 37


def code_of(page):
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


class Model(torch.nn.Module):
    """As much of a Hugging Face model as a training step needs."""

    def __init__(self, vocabulary=V):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, 8)
        self.head = torch.nn.Linear(8, vocabulary)

    def forward(self, input_ids):
        self.logits = self.head(self.embed(input_ids))
        return self


def test_the_training_step_trains_on_the_next_token():
    step, mixture = code_of(README)
    student, teacher = Model(), Model()
    ids = torch.randint(V, (3, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    batches = [{"input_ids": ids, "labels": labels.clone()} for _ in range(40)]
    names = dict(
        torch=torch,
        student=student,
        teacher=teacher,
        batches=batches,
        optimizer=torch.optim.Adam(student.parameters(), lr=0.05),
    )

    def loss():
        logits = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
        return drkl_triton.reference.drkl(*logits, labels[:, 1:]).item()

    before = loss()
    exec(step, names)
    assert loss() < 0.2 * before
    assert "shift=True" in step
    names["labels"] = labels
    exec(mixture, names)
    assert names["loss"].isfinite()


def test_the_page_on_divergences(tmp_path):
    """Each block as a module, which is where such functions belong."""
    text = (ROOT / "docs" / "add-a-divergence.md").read_text(encoding="utf-8")
    student, teacher = torch.randn(4, V).requires_grad_(), torch.randn(4, V)
    labels = torch.randint(V, (4,))
    source = "import torch\nfrom inputs_of_the_test import *\n" + "\n".join(code_of(text))
    inputs = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("inputs_of_the_test", loader=None)
    )
    vars(inputs).update(student_logits=student, teacher_logits=teacher, labels=labels)
    path = tmp_path / "added.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("added", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.sys.modules, "inputs_of_the_test", inputs)
        spec.loader.exec_module(module)
    q, p = student.softmax(-1), teacher.softmax(-1)
    hellinger = 1 - (p * q).sqrt().sum(-1)
    jeffreys = ((p - q) * (p.log() - q.log())).sum(-1)
    expected = (0.5 * hellinger + 0.5 * jeffreys).mean()
    assert module.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    module.loss.backward()
    assert student.grad.isfinite().all()


def test_the_page_on_sparse_teachers(tmp_path, monkeypatch):
    """With a recorded response, and a cache that is there again the second time."""
    first, cache = code_of((ROOT / "docs" / "sparse-teachers.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    sample = ROOT / "tests" / "data" / "vllm_prompt_logprobs.json"
    (tmp_path / "response.json").write_text(sample.read_text(encoding="utf-8"))
    student, teacher = Model(10000), Model()
    names = dict(student=student)
    exec(first, names)
    assert names["logits"].shape == (1, 5, 10000) and names["loss"] > 0
    assert student.head.weight.grad.abs().sum() > 0
    corpus = {f"text {i}": torch.randint(V, (1, 5 + i)) for i in range(3)}
    names = dict(torch=torch, corpus=corpus, teacher_model=teacher, tokenizer="a hash")
    for _ in range(2):
        exec(cache, names)
        batch = names["teacher"]
        assert batch.ids.shape == (2, 6, 20) and len(names["cache"]) == 3
    logits = torch.randn(2, 6, V)
    labels = torch.full((2, 6), -100)
    for row, ids in zip(labels, list(corpus.values())[:2], strict=True):
        row[: ids.shape[1]] = ids[0]
    assert drkl_triton.drkl(logits, batch, labels, shift=True) > 0


def test_every_public_name_is_documented():
    for name in drkl_triton.__all__:
        if name != "__version__":
            assert re.search(rf"`{name}\b", README), name
            assert getattr(drkl_triton, name).__doc__


def test_options_are_those_of_the_functions():
    text = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(\w+)` \| `", text, re.MULTILINE))
    for function in (drkl_triton.reverse_kl, drkl_triton.drkl):
        keywords = inspect.signature(function).parameters.values()
        assert {p.name for p in keywords if p.kind is p.KEYWORD_ONLY} - {"gamma", "skew"} == table


@pytest.mark.parametrize("page", PAGES[:2] + PAGES[-1:], ids=lambda page: page.name)
def test_the_commit_that_was_measured_is_named(page):
    text = page.read_text(encoding="utf-8")
    for target in set(re.findall(r"\]\(([^)]*bench/results/[^)]+\.csv)\)", text)):
        with open(page.parent / target, newline="") as file:
            commits = {row["commit"][:7] for row in csv.DictReader(file)}
        for commit in commits:
            assert f"`{commit}`" in text, (target, commit)


@pytest.mark.parametrize("name", ["README.md", "docs/faithfulness.md"])
def test_intervals_are_those_that_were_measured(name):
    """A "mean [low, high]" of these pages is a rounded difference in a table, or 100 times it."""
    rows = []
    for table in (ROOT / "bench/results/pretrained").rglob("intervals.csv"):
        with open(table, newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["minus"]]
    measured = [[float(row[key]) for key in ("mean", "low", "high")] for row in rows]
    text = (ROOT / name).read_text(encoding="utf-8").replace("−", "-")
    number = r"([+-]?\d+\.\d+)"
    found = re.findall(rf"{number}\s\[{number}, {number}\]", text)
    assert len(found) == len(re.findall(r"\[[+-]?\d+\.\d+,", text)) > 5
    for printed in found:
        half = 0.5000001 * 10.0 ** -len(printed[0].split(".")[1])
        assert any(
            all(abs(float(p) - scale * x) <= half for p, x in zip(printed, of_row, strict=True))
            for of_row in measured
            for scale in (1, 100)
        ), printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_linked_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]*)?\)", text):
        assert (page.parent / target).exists(), target

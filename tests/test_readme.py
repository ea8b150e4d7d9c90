"""README's code runs, and what stands beside it is true."""

import re
from pathlib import Path

import torch

import drkl_triton

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_before_and_after_agree():
    before, after = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    labels = torch.tensor([3, -100, 0, 36])
    student, teacher = torch.randn(4, 37), torch.randn(4, 37)

    def run(code):
        names = dict(
            student_logits=student.clone().requires_grad_(), teacher_logits=teacher, labels=labels
        )
        exec(code, names)
        return names

    old, new = run(before), run(after.split("loss = drkl")[0] + "loss.backward()")
    torch.testing.assert_close(new["loss"], old["loss"])
    torch.testing.assert_close(new["student_logits"].grad, old["student_logits"].grad)
    assert run(after)["student_logits"].grad.isfinite().all()


def test_every_public_name_is_documented():
    for name in drkl_triton.__all__:
        if name != "__version__":
            assert f"`{name}" in README, name
            assert getattr(drkl_triton, name).__doc__


def test_options_are_those_of_the_functions():
    import inspect

    table = set(re.findall(r"^\| `(\w+)` \| `", README, re.MULTILINE))
    for function in (drkl_triton.reverse_kl, drkl_triton.drkl):
        keywords = inspect.signature(function).parameters.values()
        assert {p.name for p in keywords if p.kind is p.KEYWORD_ONLY} - {"gamma"} == table


def test_the_commit_that_was_measured_is_named():
    import csv

    root = Path(__file__).parents[1]
    for target in set(re.findall(r"\]\((bench/results/[^)]+\.csv)\)", README)):
        with open(root / target, newline="") as file:
            commits = {row["commit"][:7] for row in csv.DictReader(file)}
        for commit in commits:
            assert f"`{commit}`" in README, (target, commit)


def test_files_that_are_linked_exist():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target

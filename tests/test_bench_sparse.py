"""bench/sparse.py: what it writes, and that its check finds what is wrong."""

import csv
import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))  # as `python bench/sparse.py` would have it
spec = importlib.util.spec_from_file_location("bench_sparse", BENCH / "sparse.py")
sparse = sys.modules["bench_sparse"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sparse)

TINY = "--device cpu --vocab 1000 1501 --k 1 20 --tokens 12 --repeats 2"


def run(folder, arguments):
    """(exit status, the CSV's rows that were timed, the others)."""
    status = sparse.bench.main(f"{TINY} {arguments} --out {folder} --name here".split())
    with (folder / "here.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == sparse.bench.columns
    assert [path.name for path in folder.iterdir()] == ["here.csv"]
    return status, [r for r in rows if r["ms"]], [r for r in rows if not r["ms"]]


def replace(monkeypatch, name, op, make):
    """Provider ``name`` computes ``op`` with what ``make(its own function)`` is instead."""

    def changed(provider):
        own = provider.ops[op]
        ops = provider.ops | {op: lambda: make(own())}
        return dataclasses.replace(provider, ops=ops)

    providers = [changed(p) if p.name == name else p for p in sparse.ALL]
    monkeypatch.setattr(sparse.bench, "providers", providers)


def halved(function):
    """Half of the gradient."""
    return lambda student, *known: function((student + student.detach()) / 2, *known)


def test_a_run_writes_csv_and_table(tmp_path, capsys):
    arguments = "--providers dense missing tiled triton trl verl --dtype float32 bfloat16"
    status, rows, absent = run(tmp_path, arguments)
    assert status == 0
    # three providers of four ops, two of one; two vocabularies, two K, two dtypes
    assert len(rows) == (3 * 4 + 2) * 2 * 2 * 2
    assert {row["check"] for row in rows} == {"ok"}
    cases = {}
    for row in rows:
        case = tuple(row[key] for key in sparse.bench.tell)
        cases.setdefault(case, {})[row["provider"]] = float(row["ms"])
        assert float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert (row["runs"], row["tokens"], row["mode"]) == ("2", "12", "both")
        gradient = 12 * int(row["vocab"]) * (4 if row["dtype"] == "float32" else 2)
        assert float(row["peak_mb"]) * 1e6 >= gradient
        assert row["torch"] == torch.__version__ and row["threads"] and row["device"]
        assert row["command"].startswith("python bench/sparse.py --device cpu")
    for row in rows:
        for name, ms in cases[tuple(row[key] for key in sparse.bench.tell)].items():
            assert math.isclose(float(row[f"x_{name}"]), float(row["ms"]) / ms, rel_tol=1e-3)
    notes = {(r["op"], r["provider"]): r["note"] for r in absent}
    assert notes["drkl", "triton"] == "needs a GPU"
    assert notes["drkl", "trl"] == "does not compute drkl"
    shown = capsys.readouterr().out
    for text in ("log_probs_at, bfloat16, both, 12 tokens", "×missing", "1,501"):
        assert text in shown


def test_torch_compile_takes_part(tmp_path):
    status, rows, absent = run(tmp_path, "--op drkl --k 20 --vocab 1000 --providers dense compile")
    assert status == 0 and absent == []
    assert {r["provider"]: r["check"] for r in rows} == {"dense": "ok", "compile": "ok"}


EACH = [("trl", "forward_kl"), ("verl", "forward_kl"), *(("tiled", op) for op in sparse.OPS)]


@pytest.mark.parametrize("name, op", EACH)
def test_a_wrong_provider_is_caught(name, op, tmp_path, monkeypatch, capsys):
    replace(monkeypatch, name, op, halved)
    more = f"--op {op} --dtype float32 bfloat16 --vocab 1000 --providers dense {name}"
    status, rows, _ = run(tmp_path, more)
    assert status == (name == "tiled")  # another project's error is shown, not ours to fail on
    assert {(r["provider"], r["check"]) for r in rows} == {("dense", "ok"), (name, "WRONG")}
    assert all(float(r["grad_error"]) > 1 for r in rows if r["provider"] == name)
    assert "WRONG: " in capsys.readouterr().out


def test_verl_is_no_bucket_and_the_others_no_truncated_sum():
    """Each is held against its own definition."""
    case = sparse.Sparse("forward_kl", torch.float32, 1000, 12, 20, torch.device("cpu"))
    right = case.truth()
    for name, apart in (("dense", False), ("trl", False), ("tiled", False), ("verl", True)):
        provider = next(p for p in sparse.ALL if p.name == name)
        student = case.leaves[0].detach().requires_grad_()
        out = provider.ops["forward_kl"]()(student, *case.tensors[1:])
        (grad,) = torch.autograd.grad(out, student, torch.full_like(out, case.scale))
        rounds = provider.rounds_on(case.device)
        assert (sparse.APART in rounds) == apart
        assert max(right.errors(out.detach(), grad, rounds=rounds)) <= 1, name
        other = () if apart else (sparse.APART,)
        assert max(right.errors(out.detach(), grad, rounds=other)) > 10, name


@pytest.mark.parametrize("op", sparse.OPS)
def test_one_element_off_is_caught(op):
    """Of the last row's gradient: at the label, and in the tail."""
    case = sparse.Sparse(op, torch.float32, 1000, 12, 20, torch.device("cpu"))
    student = case.leaves[0].detach().requires_grad_()
    out = sparse.ours(op, "tiled")(student, *case.tensors[1:])
    (grad,) = torch.autograd.grad(out, student, case.upstream(out, case.scale))
    right = case.truth()
    assert max(right.errors(out.detach(), grad)) <= 1
    assert min(right.errors(out.detach() * 1.01, grad * 1.01)) > 1
    tail = torch.ones(1000).scatter(0, case.known.ids[3], 0.0)
    tail[case.known.label[3]] = 0.0
    for column in (case.known.ids[3, 0], (grad[11].abs() * tail).argmax()):
        off = grad.clone()
        off[11, column] *= 1.01
        assert right.errors(out.detach(), off)[1] > 1


@pytest.mark.parametrize("wrong", ["--k 0", "--k 999", "--tokens 0", "--op nothing"])
def test_the_command_line(wrong, capsys):
    with pytest.raises(SystemExit):
        sparse.bench.parse(f"{TINY} {wrong}".split())
    shown = capsys.readouterr().err
    assert "must be positive" in shown or "invalid choice" in shown
    assert sparse.bench.parse("--device cpu".split()).part == ""
    assert sparse.bench.parse("--device cpu --k 20".split()).part == "-part"

"""bench/linear.py: what it writes, that its check finds what is wrong, that ratios are right."""

import csv
import dataclasses
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("matplotlib", "tqdm"):
    pytest.importorskip(name)

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))  # as `python bench/linear.py` would have it
plots, providers, truth = (
    importlib.import_module(f"linear_{name}") for name in ("plots", "providers", "truth")
)
_spec = importlib.util.spec_from_file_location("bench_linear", BENCH / "linear.py")
linear = sys.modules["bench_linear"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(linear)

CPU = torch.device("cpu")
TINY = "--device cpu --hidden 16 --tokens 130 70 --vocab 500 301 --repeats 2".split()
ONE = "--tokens 70 --vocab 301 --op reverse_kl".split()


def bench(folder, *arguments):
    """(exit status, the CSV's rows that were timed, the others)."""
    status = linear.main([*TINY, *arguments, "--out", str(folder), "--name", "here"])
    with (folder / "here.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == linear.COLUMNS
    return status, [r for r in rows if r["ms"]], [r for r in rows if not r["ms"]]


def replace(monkeypatch, name, function, **options):
    """Provider ``name`` computes reverse_kl with ``function`` instead."""
    options |= {"ops": {"reverse_kl": lambda: function}}
    changed = tuple(
        dataclasses.replace(p, **options) if p.name == name else p for p in providers.ALL
    )
    monkeypatch.setattr(providers, "ALL", changed)


def test_a_run_writes_csv_table_and_plots(tmp_path, capsys):
    chosen = "products dense tiled triton recompute liger".split()
    more = ["--teacher-hidden", "24", "--ignored", "0.25"]
    status, rows, absent = bench(tmp_path, "--providers", *chosen, *more)
    assert status == 0
    shapes = [("130", "500"), ("130", "301"), ("70", "500")]
    found = dict.fromkeys((r["tokens"], r["vocab"]) for r in rows)
    assert set(found) == set(shapes) and next(iter(found)) == shapes[0]
    cases = {}
    for row in rows:
        case = row["op"], row["tokens"], row["vocab"]
        cases.setdefault(case, {})[row["provider"]] = float(row["ms"])
        assert row["check"] == ("" if row["provider"] == "products" else "ok")
        counted = int(row["tokens"]) - round(int(row["tokens"]) * 0.25)
        assert int(row["flops"]) == 2 * counted * int(row["vocab"]) * (3 * 16 + 24)
        speed = int(row["flops"]) / float(row["ms"]) / 1e6
        assert float(row["gflop_per_s"]) == pytest.approx(speed, rel=1e-3)
        assert (row["hidden"], row["teacher_hidden"], row["ignored"]) == ("16", "24", "0.25")
        # both gradients are returned
        returned = 4 * 16 * (int(row["tokens"]) + int(row["vocab"]))
        assert float(row["peak_mb"]) * 1e6 >= returned
        assert row["command"].startswith("python bench/linear.py --device cpu")
    assert len(cases) == 2 * 3
    for row in rows:  # each ratio is over the time of the same case
        times = cases[row["op"], row["tokens"], row["vocab"]]
        for name, ms in times.items():
            ratio = float(row["ms"]) / ms
            assert float(row[f"x_{name}"]) == pytest.approx(ratio, rel=1e-3)
    assert {r["note"] for r in absent if r["provider"] == "triton"} == {"needs a GPU"}

    shown = capsys.readouterr().out
    for text in ("hidden size 16, the teacher's 24, 25% of the tokens ignored", "×products", "ok"):
        assert text in shown
    for kind in ("time", "floor", "memory"):
        assert (tmp_path / f"here-{kind}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("op", providers.OPS)
def test_the_check_passes_what_is_right_and_nothing_else(op, ignored, dtype):
    case = truth.Case(op, dtype, 200, 1000, 32, 48, ignored, CPU)
    right = truth.Truth(case)
    for name in ("dense", "tiled", "recompute"):
        provider = providers.BY_NAME[name]
        entry = linear.Entry(provider, provider.ops[op]())
        step = linear.Measurement(case, [entry], clock=None)._step
        loss, hidden, weight = step(entry, truth.UPSTREAM)
        errors = right.errors(loss, hidden, weight, provider.rounds)
        assert max(errors) <= 1, name
        # ten per cent are over it in each of the results, also where logits are rounded
        wrong = right.errors(loss * 1.1, hidden * 1.1, weight * 1.1, provider.rounds)
        assert min(wrong) > 1, name
        assert max(right.errors(loss, hidden * 0, weight * 0, provider.rounds)) > 5
        # a token's row, a word's row: one among many
        hidden[case.labels.ne(providers.IGNORED).nonzero()[-1]] *= 0.5
        weight[case.distinct_labels[3]] *= 0.5
        assert min(right.errors(loss, hidden, weight, provider.rounds)[1:]) > 1


def test_rows_are_summed_as_often_as_they_count():
    """A slice of tokens taken twice, in place of another, shows in d weight."""
    case = truth.Case("reverse_kl", torch.float32, 512, 300, 16, 16, 0.0, CPU)
    dense = providers.dense(providers.providers.reverse_kl_rows)
    tensors = [x.clone() for x in case.tensors]
    for x in (tensors[0], tensors[2], tensors[4]):
        x[128:256] = x[:128]
    weight = tensors[1].requires_grad_()
    (grad,) = torch.autograd.grad(dense(*tensors), weight)
    assert truth.Truth(case)._weight(grad * truth.UPSTREAM, ()) > 1


def half_of_d_weight(student_hidden, student_weight, *others):
    half = student_weight / 2
    dense = providers.dense(providers.providers.reverse_kl_rows)
    return dense(student_hidden, half + half.detach(), *others)


def without_the_mask(*tensors):
    *tensors, labels = tensors
    return providers.dense(providers.providers.reverse_kl_rows)(*tensors, labels.clamp_min(0))


@pytest.mark.parametrize("function", [half_of_d_weight, without_the_mask])
def test_a_wrong_provider_is_flagged_and_still_timed(function, tmp_path, monkeypatch, capsys):
    replace(monkeypatch, "compile", function)
    arguments = [*ONE, "--ignored", "0.5", "--providers", "products", "dense", "compile"]
    status, rows, _ = bench(tmp_path, *arguments)
    assert status == 0  # another's error is shown, not ours to fail on
    checks = {row["provider"]: row["check"] for row in rows}
    assert checks == {"products": "", "dense": "ok", "compile": "WRONG"}
    assert float(rows[-1]["weight_error"]) > 1
    assert "WRONG: loss" in capsys.readouterr().out


def test_this_package_being_wrong_is_an_error(tmp_path, monkeypatch):
    replace(monkeypatch, "tiled", half_of_d_weight)
    assert bench(tmp_path, *ONE, "--providers", "products", "tiled")[0] == 1


def test_what_fails_or_does_not_fit_is_listed(tmp_path, monkeypatch, capsys):
    def broken(*tensors):
        raise RuntimeError("no such kernel")

    replace(monkeypatch, "recompute", broken, own=False)
    monkeypatch.setattr(linear, "free_memory", lambda device: 13 * 4 * 70 * 301)
    arguments = [*ONE, "--providers", "dense", "compile", "recompute", "products"]
    replace(monkeypatch, "compile", providers.dense(providers.providers.reverse_kl_rows))
    status, rows, absent = bench(tmp_path, *arguments)
    assert status == 0
    assert {row["provider"] for row in rows} == {"compile", "products"}  # four tensors fit
    notes = {row["provider"]: row["note"] for row in absent}
    assert notes["recompute"] == "failed: RuntimeError: no such kernel"
    assert notes["dense"].startswith("skipped: about") and "half of the free" in notes["dense"]
    assert "skipped: about" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_makes_the_four_products(dtype, monkeypatch):
    """In slices, the last one shorter, with the logits in the gradient's place."""
    case = truth.Case("reverse_kl", dtype, 100, 3001, 16, 24, 0.3, CPU)
    monkeypatch.setattr(providers, "default_chunk_bytes", lambda device: 30 * 8 * 3008)
    monkeypatch.setattr(providers, "PART", 512)
    student, matrix, *_, labels = case.tensors
    hidden, weight = providers.products()(*case.tensors)
    kept = (labels != providers.IGNORED)[:, None].double()
    logits = (student.double() @ matrix.double().t()) * kept
    assert hidden.dtype == weight.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, right in (
        (hidden, logits @ matrix.double()),
        (weight, logits.t() @ student.double()),
    ):
        assert (ours.double() - right).abs().max() <= tolerance * right.abs().max()


def test_every_provider_has_a_look():
    assert list(plots.LOOKS) == [provider.name for provider in providers.ALL]


def test_the_command_line(tmp_path, capsys):
    command = [sys.executable, str(BENCH / "linear.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert "--teacher-hidden" in done.stdout
    for wrong, text in (("--tokens 0", "positive"), ("--ignored 1", "must leave a token")):
        with pytest.raises(SystemExit):
            linear.parse(wrong.split())
        assert text in capsys.readouterr().err

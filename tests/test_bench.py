"""bench/run.py: what it writes, that it finds a wrong provider, and that it counts memory truly."""

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
sys.path.append(str(BENCH))  # as `python bench/run.py` would have it
plots, providers, real_rows, tables, timing, truth = (
    importlib.import_module(name)
    for name in ("plots", "providers", "real_rows", "tables", "timing", "truth")
)
_spec = importlib.util.spec_from_file_location("bench_run", BENCH / "run.py")  # the demo has a run
run = sys.modules["bench_run"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

CPU = torch.device("cpu")
TINY = "--device cpu --vocab 1000 1501 --tokens 12 --repeats 2 --copy-mb 4 --dtype float32".split()


def bench(folder, *arguments):
    """(exit status, the CSV's rows that were timed, the others)."""
    status = run.main([*TINY, *arguments, "--out", str(folder), "--name", "here"])
    with (folder / "here.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == tables.COLUMNS
    return status, [r for r in rows if r["ms"]], [r for r in rows if not r["ms"]]


def replace(monkeypatch, name, function):
    """Provider ``name`` computes reverse_kl with ``function`` instead."""
    changed = tuple(
        dataclasses.replace(p, ops={"reverse_kl": lambda: function}) if p.name == name else p
        for p in providers.ALL
    )
    monkeypatch.setattr(providers, "ALL", changed)


def test_a_run_writes_csv_table_and_plots(tmp_path, capsys):
    chosen = "dense kl_div tiled triton liger".split()
    ops = ["reverse_kl", "drkl"]
    status, rows, absent = bench(tmp_path, "--op", *ops, "--providers", *chosen)
    assert status == 0
    # reverse_kl has three providers without a GPU, drkl two; two vocabularies, three modes
    assert len(rows) == (3 + 2) * 2 * 3
    assert {row["check"] for row in rows} == {"ok"}
    for row in rows:
        ms, tensors = float(row["ms"]), {"forward": 2, "backward": 3, "both": 5}[row["mode"]]
        assert float(row["ms_q1"]) <= ms <= float(row["ms_q3"]) and row["runs"] == "2"
        assert int(row["bytes"]) == tensors * 12 * int(row["vocab"]) * 4
        assert float(row["gb_per_s"]) == pytest.approx(int(row["bytes"]) / ms / 1e6, rel=1e-3)
        share = float(row["gb_per_s"]) / float(row["copy_gb_per_s"])
        assert float(row["percent_of_copy"]) == pytest.approx(100 * share, rel=1e-3)
        assert float(row[f"x_{row['provider']}"]) == 1 and float(row["x_dense"]) > 0
        assert row["torch"] == torch.__version__ and row["threads"] and row["device"]
        assert row["command"].startswith("python bench/run.py --device cpu")
    assert {(r["op"], r["provider"]): r["note"] for r in absent}["drkl", "triton"] == "needs a GPU"
    liger = {r["op"]: r["note"] for r in absent if r["provider"] == "liger"}
    assert liger["reverse_kl"] in ("not installed", "needs a GPU")
    assert liger["drkl"] == "does not compute drkl"

    shown = capsys.readouterr().out
    for text in ("reverse_kl, float32, both, 12 tokens", "×dense", "1,501", "needs a GPU: triton"):
        assert text in shown
    for kind in ("time", "memory", "bandwidth"):
        assert (tmp_path / f"here-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_torch_compile_takes_part(tmp_path):
    arguments = "--vocab 1000 --op drkl --mode both --providers dense compile".split()
    status, rows, absent = bench(tmp_path, *arguments)
    assert status == 0 and absent == []
    assert [(r["provider"], r["check"]) for r in rows] == [("dense", "ok"), ("compile", "ok")]


def test_every_provider_has_a_colour_and_a_csv_column():
    names = [provider.name for provider in providers.ALL]
    assert list(plots.COLOURS) == names == [column[2:] for column in tables.RATIOS]


def forward_kl(student, teacher, labels):
    return providers.dense_reverse_kl(teacher.detach(), student, labels)


def half_the_gradient(student, teacher, labels):
    half = student / 2
    return providers.dense_reverse_kl(half + half.detach(), teacher, labels)


def in_half_precision(student, teacher, labels):
    return providers.dense_reverse_kl(student.bfloat16(), teacher.bfloat16(), labels)


@pytest.mark.parametrize("function", [forward_kl, half_the_gradient, in_half_precision])
def test_a_wrong_provider_is_flagged_and_still_timed(function, tmp_path, monkeypatch, capsys):
    replace(monkeypatch, "kl_div", function)
    arguments = "--op reverse_kl --mode both --providers dense kl_div".split()
    status, rows, _ = bench(tmp_path, *arguments)
    assert status == 0  # another project's error is shown, not ours to fail on
    assert {r["check"] for r in rows if r["provider"] == "dense"} == {"ok"}
    wrong = [r for r in rows if r["provider"] == "kl_div"]
    assert {r["check"] for r in wrong} == {"WRONG"} and float(wrong[0]["grad_error"]) > 1
    assert "WRONG: result" in capsys.readouterr().out


def test_this_package_being_wrong_is_an_error(tmp_path, monkeypatch):
    replace(monkeypatch, "tiled", half_the_gradient)
    assert bench(tmp_path, *"--op reverse_kl --mode both --providers dense tiled".split())[0] == 1


def test_a_provider_that_fails_is_listed(tmp_path, monkeypatch, capsys):
    def broken(student, teacher, labels):
        raise RuntimeError("no such kernel")

    replace(monkeypatch, "kl_div", broken)
    arguments = "--op reverse_kl --mode both --providers dense kl_div".split()
    _, rows, absent = bench(tmp_path, *arguments)
    assert {r["provider"] for r in rows} == {"dense"}
    assert {r["note"] for r in absent} == {"failed: RuntimeError: no such kernel"}
    assert "failed: RuntimeError: no such kernel" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    repeat, calls = run.Measurement.repeat, []

    def interrupted(self, entry):
        calls.append(entry)
        if len(calls) == 7:  # two providers, two repeats: inside the second vocabulary
            raise KeyboardInterrupt
        repeat(self, entry)

    monkeypatch.setattr(run.Measurement, "repeat", interrupted)
    arguments = "--op reverse_kl --mode both --providers dense kl_div".split()
    status, rows, _ = bench(tmp_path, *arguments)
    assert status == 130
    assert [(r["vocab"], r["provider"], r["runs"]) for r in rows] == [
        ("1000", "dense", "2"),
        ("1000", "kl_div", "2"),
        ("1501", "dense", "1"),
        ("1501", "kl_div", "1"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", providers.OPS)
def test_the_check_passes_what_is_right(op, dtype):
    case = truth.Case(op, dtype, 1000, 20, CPU)
    right = truth.truth_of(case)
    for name in ("dense", "tiled"):
        entries = [run.Entry(providers.BY_NAME[name])]
        measurement = run.Measurement(case, entries, ["both"], clock=None, copy=None)
        (entry,) = measurement.entries
        measurement.prepare(entry, right)
        assert entry.note == "" and max(entry.errors) <= 1


def test_memory_counts_a_known_allocation():
    kept = []

    def forward():
        passing = torch.empty(10 * timing.MB, dtype=torch.uint8)
        kept.append(torch.empty(3 * timing.MB, dtype=torch.uint8))
        del passing
        return torch.empty(1000, dtype=torch.uint8)

    def backward(out):
        torch.empty(4 * timing.MB, dtype=torch.uint8)
        return torch.empty(2 * timing.MB, dtype=torch.uint8)

    peaks = timing.peak_memory(forward, backward, CPU)
    small = 10_000  # what the allocator adds
    assert peaks["forward"] == pytest.approx(13 * timing.MB, abs=small)
    assert peaks["backward"] == pytest.approx(7 * timing.MB, abs=small)
    assert peaks["both"] == peaks["forward"]


def _resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_memory_agrees_with_the_operating_system():
    # Tensors of 34 MB: above malloc's largest threshold, so each is mapped and unmapped by itself.
    case = truth.Case("reverse_kl", torch.float32, 50257, 170, CPU)
    student = case.student.requires_grad_()

    def forward():
        return providers.dense_reverse_kl(student, case.teacher, case.labels)

    def backward(out):
        return torch.autograd.grad(out, student)[0]

    backward(forward())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use
        before = _resident("VmRSS")
    except OSError as error:
        pytest.skip(f"the high-water mark cannot be reset here: {error}")
    backward(forward())
    peak = timing.peak_memory(forward, backward, CPU)["both"]
    assert peak > 4 * case.student.nbytes
    assert peak == pytest.approx(_resident("VmHWM") - before, rel=0.05)


def test_a_part_does_not_replace_the_whole(tmp_path, monkeypatch):
    """The default name of the files says so, for every option that leaves something out."""
    assert run.parse(["--device", "cpu", "--threads", "1"]).part == ""
    for part in ("--op drkl", "--vocab 32000", "--tokens 64", "--repeats 2", "--providers dense"):
        assert run.parse(["--device", "cpu", *part.split()]).part == "-part"
    monkeypatch.setattr(tables, "slug", lambda *_: "here")
    arguments = "--op reverse_kl --mode forward --providers dense --no-plots".split()
    assert run.main([*TINY, *arguments, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here-part.csv"]


def test_the_command_line(tmp_path):
    def said(*arguments):
        command = [sys.executable, str(BENCH / "run.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    assert "--providers" in said("--help").stdout
    assert "must be positive" in said("--tokens", "0").stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labelled"])
def test_real_rows_are_read_once(dtype, labelled):
    """Of the 4,096 that these eight are from, none was read twice (bench/real_rows.py)."""
    student, teacher, labels = real_rows.load()
    assert student.shape == teacher.shape == (8, real_rows.VOCAB)
    rows = student.to(dtype), teacher.to(dtype), labels if labelled else None
    assert real_rows.read_twice(*rows) == 0
    rows[0][0, 7] = -torch.inf  # and the count can see
    assert real_rows.read_twice(*rows) == 1


def test_real_logits_are_measured(tmp_path):
    arguments = "--logits real --op reverse_kl --mode both --providers tiled --tokens 8".split()
    status, rows, _ = bench(tmp_path, *arguments, "--repeats", "1", "--dtype", "bfloat16")
    assert status == 0
    assert [(r["logits"], r["vocab"], r["check"]) for r in rows] == [("real", "49152", "ok")]

"""bench/run.py and bench/linear.py: what they write, that their check finds what is wrong and no
more, and that memory is counted truly.
"""

import csv
import dataclasses
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drkl_triton import objectives

for name in ("matplotlib", "tqdm"):
    pytest.importorskip(name)

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))  # as `python bench/run.py` would have it
command, divergences, linear_providers, linear_truth, plots, providers, real_rows, tables = (
    importlib.import_module(name)
    for name in ("command", "divergences", "linear_providers", "linear_truth", "plots",
                 "providers", "real_rows", "tables")
)  # fmt: skip
timing, truth = (importlib.import_module(name) for name in ("timing", "truth"))


def load(script):
    """Under a name of its own: the demo has a run.py, too."""
    spec = importlib.util.spec_from_file_location(f"bench_{script}", BENCH / f"{script}.py")
    module = sys.modules[f"bench_{script}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bench


LOGITS, HIDDEN = load("run"), load("linear")
CPU = torch.device("cpu")
TINY = {
    LOGITS: "--vocab 1000 1501 --tokens 12 --repeats 2 --copy-mb 4 --dtype float32",
    HIDDEN: "--hidden 16 --tokens 130 70 --vocab 500 301 --repeats 2",
}
ONE = {
    LOGITS: "--op reverse_kl --mode both",
    HIDDEN: "--tokens 70 --vocab 301 --op reverse_kl",
}
both = pytest.mark.parametrize("bench", TINY, ids=["logits", "hidden"])


def run(bench, folder, arguments):
    """(exit status, the CSV's rows that were timed, the others)."""
    words = f"--device cpu {TINY[bench]} {arguments} --out {folder} --name here".split()
    status = bench.main(words)
    with (folder / "here.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == bench.columns
    return status, [r for r in rows if r["ms"]], [r for r in rows if not r["ms"]]


def replace(monkeypatch, bench, name, function, **options):
    """Provider ``name`` computes reverse_kl with ``function`` instead."""
    options |= {"ops": {"reverse_kl": lambda: function}}
    changed = tuple(
        dataclasses.replace(p, **options) if p.name == name else p for p in bench.providers
    )
    monkeypatch.setattr(bench, "providers", changed)


def by_name(bench, name):
    return next(provider for provider in bench.providers if provider.name == name)


# --- what is written ---


def read_plots(folder, bench):
    for kind in bench.figures:
        assert (folder / f"here-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_writes_csv_table_and_plots(tmp_path, capsys):
    arguments = "--op reverse_kl drkl --providers dense kl_div tiled triton liger"
    status, rows, absent = run(LOGITS, tmp_path, arguments)
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
    notes = {(r["op"], r["provider"]): r["note"] for r in absent}
    assert notes["drkl", "triton"] == "needs a GPU"
    assert notes["reverse_kl", "liger"] in ("not installed", "needs a GPU")
    assert notes["drkl", "liger"] == "does not compute drkl"
    shown = capsys.readouterr().out
    for text in ("reverse_kl, float32, both, 12 tokens", "×dense", "1,501", "needs a GPU: triton"):
        assert text in shown
    read_plots(tmp_path, LOGITS)


def test_a_run_from_hidden_states_writes_csv_table_and_plots(tmp_path, capsys):
    arguments = "--providers products dense tiled triton recompute liger"
    arguments += " --teacher-hidden 24 --ignored 0.25"
    status, rows, absent = run(HIDDEN, tmp_path, arguments)
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
    read_plots(tmp_path, HIDDEN)


def test_every_loss_is_measured_and_right(tmp_path):
    arguments = "--op all --vocab 1000 --mode both --repeats 1 --no-plots"
    status, rows, absent = run(LOGITS, tmp_path, arguments + " --providers dense tiled kl_div trl")
    assert status == 0
    assert {(r["op"], r["provider"]) for r in rows if r["provider"] in ("dense", "tiled")} == {
        (op, name) for op in LOGITS.ops for name in ("dense", "tiled")
    }
    assert {r["op"] for r in rows if r["provider"] == "kl_div"} == {"reverse_kl", "forward_kl"}
    assert {row["check"] for row in rows} == {"ok"}
    assert {int(r["bytes"]) for r in rows if r["op"] == "entropy"} == {3 * 12 * 1000 * 4}
    assert all(r["note"].startswith(("does not compute", "not installed")) for r in absent)


def test_the_table_has_every_divergence():
    """But one that has no gradient."""
    named = {x for x in objectives.__all__ if type(getattr(objectives, x)).__name__ == "Formula"}
    named |= {"mixed_kl", "symmetric_kl", "js_divergence", "alpha_beta"}
    assert named - {"teacher_entropy"} <= set(divergences.LOSSES)


@both
def test_torch_compile_takes_part(bench, tmp_path):
    arguments = " --vocab 1000 --providers dense compile --no-plots"
    status, rows, absent = run(bench, tmp_path, ONE[bench] + arguments)
    assert status == 0 and absent == []
    assert {(r["provider"], r["check"]) for r in rows} == {("dense", "ok"), ("compile", "ok")}


@both
def test_every_provider_has_a_colour_of_its_own_look_and_a_csv_column(bench):
    names = [provider.name for provider in bench.providers]
    assert [column[2:] for column in bench.columns if column.startswith("x_")] == names
    looks = {(plots.COLOURS[name], plots.MARKERS[name]) for name in names}
    assert len(looks) == len(names)


# --- the check ---


def checked(bench, case, name):
    """(an entry, its results, the errors of given results)."""
    entry, right = command.Entry(by_name(bench, name)), case.truth()
    entry.call = entry.provider.ops[case.op]()
    results = command.Measurement(case, [entry], ["both"], clock=None).results(entry, case.scale)
    return results, lambda *results: right.errors(*results, rounds=entry.provider.rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["reverse_kl", "drkl", "js_divergence", "cross_entropy", "softmax"])
def test_the_check_passes_what_is_right_and_nothing_else(op, dtype):
    case = truth.Logits(op, dtype, 1000, 20, CPU)
    for name in ("dense", "tiled"):
        (out, grad), errors = checked(LOGITS, case, name)
        assert max(errors(out, grad)) <= 1, name
        assert min(errors(out * 1.05, grad * 1.05)) > 1, name
        grad[-1, case.tensors[1][-1].argmax()] *= 1.05  # an element in the last row
        assert errors(out, grad)[1] > 1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("op", ["reverse_kl", "drkl", "js_divergence"])
def test_the_check_of_hidden_states_passes_what_is_right_and_nothing_else(op, ignored, dtype):
    case = linear_truth.Hidden(op, dtype, 200, 1000, 32, 48, ignored, CPU)
    for name in ("dense", "tiled", "recompute"):
        (loss, hidden, weight), errors = checked(HIDDEN, case, name)
        assert max(errors(loss, hidden, weight)) <= 1, name
        # ten per cent are over it in each of the results, also where logits are rounded
        assert min(errors(loss * 1.1, hidden * 1.1, weight * 1.1)) > 1, name
        assert max(errors(loss, hidden * 0, weight * 0)) > 5
        # a token's row, a word's row: one among many
        hidden[case.labels.ne(linear_providers.IGNORED).nonzero()[-1]] *= 0.5
        weight[case.distinct_labels[3]] *= 0.5
        assert min(errors(loss, hidden, weight)[1:]) > 1


def test_rows_are_summed_as_often_as_they_count():
    """A slice of tokens taken twice, in place of another, shows in d weight."""
    case = linear_truth.Hidden("reverse_kl", torch.float32, 512, 300, 16, 16, 0.0, CPU)
    tensors = [x.clone() for x in case.tensors]
    for x in (tensors[0], tensors[2], tensors[4]):
        x[128:256] = x[:128]
    weight = tensors[1].requires_grad_()
    (grad,) = torch.autograd.grad(linear_providers.dense("reverse_kl")(*tensors), weight)
    right = case.truth()
    assert right.errors(right.loss, tensors[0] * 0, grad * truth.UPSTREAM)[2] > 1


def swapped(student, teacher, labels):
    return providers.dense("reverse_kl")(teacher.detach(), student, labels)


def half_the_gradient(student, teacher, labels):
    half = student / 2
    return providers.dense("reverse_kl")(half + half.detach(), teacher, labels)


def in_half_precision(student, teacher, labels):
    return providers.dense("reverse_kl")(student.bfloat16(), teacher.bfloat16(), labels)


def half_of_d_weight(student_hidden, student_weight, *others):
    half = student_weight / 2
    return linear_providers.dense("reverse_kl")(student_hidden, half + half.detach(), *others)


def without_the_mask(*tensors):
    *tensors, labels = tensors
    return linear_providers.dense("reverse_kl")(*tensors, labels.clamp_min(0))


WRONG = [
    (LOGITS, swapped),
    (LOGITS, half_the_gradient),
    (LOGITS, in_half_precision),
    (HIDDEN, half_of_d_weight),
    (HIDDEN, without_the_mask),
]


@pytest.mark.parametrize("bench, function", WRONG)
def test_a_wrong_provider_is_flagged_and_still_timed(
    bench, function, tmp_path, monkeypatch, capsys
):
    replace(monkeypatch, bench, "trl", function, module="torch")
    more = "--ignored 0.5" if bench is HIDDEN else ""
    status, rows, _ = run(bench, tmp_path, f"{ONE[bench]} {more} --providers dense trl --no-plots")
    assert status == 0  # another project's error is shown, not ours to fail on
    assert {r["check"] for r in rows if r["provider"] == "dense"} == {"ok"}
    wrong = [r for r in rows if r["provider"] == "trl"]
    assert {r["check"] for r in wrong} == {"WRONG"}
    assert float(wrong[0][[*bench.checked][-1]]) > 1
    assert "WRONG: " in capsys.readouterr().out


@both
def test_this_package_being_wrong_is_an_error(bench, tmp_path, monkeypatch):
    function = half_the_gradient if bench is LOGITS else half_of_d_weight
    replace(monkeypatch, bench, "tiled", function)
    assert run(bench, tmp_path, ONE[bench] + " --providers dense tiled --no-plots")[0] == 1


# --- what goes wrong ---


def test_what_fails_or_does_not_fit_is_listed(tmp_path, monkeypatch, capsys):
    def broken(*tensors):
        raise RuntimeError("no such kernel")

    replace(monkeypatch, HIDDEN, "recompute", broken, own=False)
    replace(monkeypatch, HIDDEN, "compile", linear_providers.dense("reverse_kl"))
    monkeypatch.setattr(command, "free_memory", lambda device: 13 * 4 * 70 * 301)
    arguments = ONE[HIDDEN] + " --providers dense compile recompute products --no-plots"
    status, rows, absent = run(HIDDEN, tmp_path, arguments)
    assert status == 0
    assert {row["provider"] for row in rows} == {"compile", "products"}  # four tensors fit
    notes = {row["provider"]: row["note"] for row in absent}
    assert notes["recompute"] == "failed: RuntimeError: no such kernel"
    assert notes["dense"].startswith("skipped: about") and "half of the free" in notes["dense"]
    shown = capsys.readouterr().out
    assert "skipped: about" in shown and notes["recompute"] in shown


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    repeat, calls = command.Measurement.repeat, []

    def interrupted(self, entry):
        calls.append(entry)
        if len(calls) == 7:  # two providers, two repeats: inside the second vocabulary
            raise KeyboardInterrupt
        repeat(self, entry)

    monkeypatch.setattr(command.Measurement, "repeat", interrupted)
    status, rows, _ = run(LOGITS, tmp_path, ONE[LOGITS] + " --providers dense kl_div --no-plots")
    assert status == 130
    assert [(r["vocab"], r["provider"], r["runs"]) for r in rows] == [
        ("1000", "dense", "2"),
        ("1000", "kl_div", "2"),
        ("1501", "dense", "1"),
        ("1501", "kl_div", "1"),
    ]


# --- memory ---


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


# In a process of its own: here something that another test has left may go while it measures.
MEASURED = """
import sys
sys.path.append(sys.argv[1])
from pathlib import Path
import providers, timing, torch, truth

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

CPU = torch.device("cpu")
# Tensors of 34 MB: above malloc's largest threshold, so each is mapped and unmapped by itself.
student, *others = truth.Logits("reverse_kl", torch.float32, 50257, 170, CPU).tensors
student.requires_grad_()

def forward():
    return providers.dense("reverse_kl")(student, *others)

def backward(out):
    return torch.autograd.grad(out, student)[0]

backward(forward())
Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use
before = resident("VmRSS")
backward(forward())
peak = timing.peak_memory(forward, backward, CPU)["both"]
print(student.nbytes, peak, resident("VmHWM") - before)
"""


def test_memory_agrees_with_the_operating_system():
    command = [sys.executable, "-c", MEASURED, str(BENCH)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "clear_refs" in done.stderr and "Error" in done.stderr:
        pytest.skip("the high-water mark cannot be reset here")
    assert done.returncode == 0, done.stderr
    one, peak, resident = map(int, done.stdout.split())
    assert peak > 4 * one
    assert peak == pytest.approx(resident, rel=0.05)


# --- the floor ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_makes_the_four_products(dtype, monkeypatch):
    """In slices, the last one shorter, with the logits in the gradient's place."""
    case = linear_truth.Hidden("reverse_kl", dtype, 100, 3001, 16, 24, 0.3, CPU)
    monkeypatch.setattr(linear_providers, "default_chunk_bytes", lambda device: 30 * 8 * 3008)
    monkeypatch.setattr(linear_providers, "PART", 512)
    student, matrix, *_, labels = case.tensors
    hidden, weight = linear_providers.products(*case.tensors)
    kept = (labels != linear_providers.IGNORED)[:, None].double()
    logits = (student.double() @ matrix.double().t()) * kept
    assert hidden.dtype == weight.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, right in (
        (hidden, logits @ matrix.double()),
        (weight, logits.t() @ student.double()),
    ):
        assert (ours.double() - right).abs().max() <= tolerance * right.abs().max()


# --- the command line, real rows ---


def test_a_part_does_not_replace_the_whole(tmp_path, monkeypatch):
    """The default name of the files says so, for every option that leaves something out."""
    assert LOGITS.parse(["--device", "cpu", "--threads", "1"]).part == ""
    for part in ("--op drkl", "--vocab 32000", "--tokens 64", "--repeats 2", "--providers dense"):
        assert LOGITS.parse(["--device", "cpu", *part.split()]).part == "-part"
    monkeypatch.setattr(tables, "slug", lambda *_: "here")
    arguments = f"--op reverse_kl --mode forward --providers dense --no-plots --out {tmp_path}"
    assert LOGITS.main(f"--device cpu {TINY[LOGITS]} {arguments}".split()) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here-part.csv"]


def test_the_command_line(tmp_path, capsys):
    for script, option in (("run", "--providers"), ("linear", "--teacher-hidden")):
        words = [sys.executable, str(BENCH / f"{script}.py"), "--help"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert option in done.stdout
    for bench, wrong, text in (
        (LOGITS, "--tokens 0", "must be positive"),
        (LOGITS, "--op nothing", "invalid choice"),
        (HIDDEN, "--tokens 0", "must be positive"),
        (HIDDEN, "--ignored 1", "must leave a token"),
    ):
        with pytest.raises(SystemExit):
            bench.parse(["--device", "cpu", *wrong.split()])
        assert text in capsys.readouterr().err


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
    arguments = "--logits real --providers tiled --tokens 8 --repeats 1 --dtype bfloat16 --no-plots"
    status, rows, _ = run(LOGITS, tmp_path, f"{ONE[LOGITS]} {arguments}")
    assert status == 0
    assert [(r["logits"], r["vocab"], r["check"]) for r in rows] == [("real", "49152", "ok")]

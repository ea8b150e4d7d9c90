"""bench/gpu_day.sh and bench/tune.py, as far as they go without a GPU."""

import csv
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from pretend_cuda import pretend

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))
gpu_day, tune = (importlib.import_module(name) for name in ("gpu_day", "tune"))


def run(folder, *arguments):
    """(exit status, the summary)."""
    command = ["bash", str(ROOT / "bench" / "gpu_day.sh"), *arguments, str(folder)]
    environment = {**os.environ, "PYTHON": sys.executable, "COMMIT": "0123abcd"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, (folder / "summary.txt").read_text()


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_dry_step(tmp_path):
    status, summary = run(tmp_path, "--dry", "--only", "headline", "--")
    assert status == 0 and re.search(r"^headline +ok", summary, re.M)
    assert summary.startswith("DRY RUN on a pretend CUDA") and "commit 0123abcd" in summary
    assert {path.name for path in tmp_path.iterdir()} == {"summary.txt", "results.tar.gz"}
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        assert set(tar.getnames()) == {"headline.csv", "headline.txt"}
        tar.extract("headline.csv", tmp_path, filter="data")
    rows = rows_of(tmp_path / "headline.csv")
    assert {row["provider"] for row in rows} == {"kernels", "triton", "dense"}
    for row in rows:
        assert row["check"] == "ok" and row["device"] == "Pretend H100" and row["ms"]
        assert row["commit"] == "0123abcd" and row["read_gb_per_s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_real_run_needs_a_gpu(tmp_path):
    status, summary = run(tmp_path)
    assert status == 2 and re.search(r"^versions +FAILED 3", summary, re.M)


def test_limits():
    def whole(steps, limits):
        stages = {}
        for step in steps:
            stages.setdefault(step.name if not step.beside else step.stage, []).append(step.name)
        return sum(max(limits[name] for name in names) for names in stages.values())

    first = {step.name: step.seconds for step in gpu_day.FIRST}
    assert whole(gpu_day.FIRST, first) <= 475  # and what lies between
    second = [step for step in gpu_day.FIRST if step.name in gpu_day.SECOND]
    assert whole(second, gpu_day.SECOND) <= 230
    early = [step for step in gpu_day.FIRST[:2]]
    assert early[1].name == "headline" and whole(early, first) <= 180


@pytest.mark.parametrize("dry", [False, True], ids=["real", "dry"])
@pytest.mark.parametrize("step", gpu_day.FIRST, ids=lambda step: step.name)
def test_scripts_take_the_arguments_of_the_steps(step, dry, tmp_path, monkeypatch):
    for command in (
        [step.command] if " {bench}/" not in step.command else step.command.split("/")[1:]
    ):
        script, _, arguments = command.partition(".py ")
        if script not in ("run", "linear", "tune") or step.dry == "-" and dry:
            continue
        arguments = arguments.format(name="n", seconds=5).split() + step.dry.split() * dry
        spec = importlib.util.spec_from_file_location("script", ROOT / "bench" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "script", module)
        spec.loader.exec_module(module)
        if script == "tune":
            monkeypatch.setattr(module._checks, "INTERPRETING", False)
        with pretend():
            module.parse(arguments)


@pytest.fixture
def day(tmp_path):
    day = gpu_day.Day(tmp_path, dry=False)
    day.due = day.now()  # the clock has been running since the import
    yield day
    day.end()


def step(name, code, seconds=30, **options):
    return gpu_day.Step("s", name, seconds, f"-c {code}", **options)


def test_what_hangs_or_fails_costs_the_others_nothing(day, monkeypatch):
    monkeypatch.setattr(gpu_day, "GRACE", 1)
    deaf = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import time; time.sleep(60)"
    )
    (day.work / "deaf.py").write_text(deaf)
    began = time.monotonic()
    day.together([gpu_day.Step("s", "hangs", 2, "{python} deaf.py")])
    day.together([gpu_day.Step("s", "absent", 2, "no-such-program")])
    day.together([step("fails", "1/0", beside=True), step("works", "print(7)", beside=True)])
    assert time.monotonic() - began < 20
    assert day.failed
    assert (day.statuses["hangs"], day.statuses["fails"], day.statuses["works"]) == (
        "cut off",
        1,
        0,
    )
    summary = (day.folder / "summary.txt").read_text()
    assert re.search(r"^works +ok .* 7$", summary, re.M) and "ZeroDivisionError" in summary
    assert re.search("^absent +not there", summary, re.M)


def test_steps_take_the_package_from_the_tree(day):
    """Not from the root, whose drkl_triton/ has no kernels/; and without git and pip."""
    code = "import('drkl_triton.kernels').kernels.__file__".replace("import", "__import__")
    day.together([step("where", f"print({code})")])
    assert str(day.work / "site" / "drkl_triton" / "kernels") in day.lines[0]


def test_the_table(day):
    head = "op,mode,vocab,provider,ms,copy_gb_per_s,device\n"
    rows = "drkl,forward,128256,kernels,1.6,2900,NVIDIA H100 80GB HBM3\n"
    (day.work / "headline.csv").write_text(head + rows)
    table = "\n".join(day.table())
    assert re.search(r"headline kernels forward 128,256 ms +1.45 +1.60 +1.10$", table, re.M)
    assert re.search(r"headline copy .* 3000.00 +2900.00 +0.97$", table, re.M)
    assert re.search(r"compile compile forward 128,256 ms +", table)


def test_the_commit_is_packed_or_given(day, tmp_path, monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(gpu_day, "git_commit", lambda: "")
    monkeypatch.setattr(gpu_day, "PACKED", tmp_path)
    assert day.commit() == "unknown"
    (tmp_path / "COMMIT").write_text(f"abc {gpu_day.sources()}\n")
    assert day.commit() == "abc"
    monkeypatch.setattr(gpu_day, "git_commit", lambda: "older")
    assert day.commit() == "abc"
    (tmp_path / "COMMIT").write_text("abc of-other-sources\n")
    assert day.commit() == "older"
    monkeypatch.setenv("COMMIT", "def")
    assert day.commit() == "def"


TINY = "--device cpu --kernel row_grad --dtype float32 --vocab 1300 --tokens 1 --repeats 1".split()


def sweep(folder, *arguments):
    status = tune.main([*TINY, *arguments, "--out", str(folder / "tune.csv")])
    return status, rows_of(folder / "tune.csv")


def test_a_wrong_tile_is_flagged_and_not_proposed(tmp_path, monkeypatch, capsys):
    grad = tune.kernels.row_grad

    def wrong(*arguments, **flags):
        out = grad(*arguments, **flags)
        return out * 1.01 if tune.tuning.choose().lanes == 64 else out

    with monkeypatch.context() as patch:
        patch.setattr(tune.kernels, "row_grad", wrong)
        status, rows = sweep(tmp_path)
    assert status == 1
    assert {(row["lanes"], row["check"]) for row in rows} == {("128", "ok"), ("64", "WRONG")}
    assert "MAX_LANES = 128" in capsys.readouterr().out
    assert sweep(tmp_path)[0] == 0


def test_a_tile_that_fails_is_noted(tmp_path, monkeypatch):
    grad = tune.kernels.row_grad

    def failing(*arguments, **flags):
        if tune.tuning.choose().splits == 2:
            raise RuntimeError("out of resources")
        return grad(*arguments, **flags)

    monkeypatch.setattr(tune.kernels, "row_grad", failing)
    status, rows = sweep(tmp_path)
    assert status == 0
    notes = {row["splits"]: row["note"] for row in rows}
    assert notes == {"1": "", "2": "failed: RuntimeError: out of resources"}


def test_time_is_kept(tmp_path):
    status, rows = sweep(tmp_path, "--seconds", "0")
    assert status == 1  # nothing timed
    assert {row["note"] for row in rows} == {tune.NOT_REACHED}


def test_every_kernel_can_be_swept(tmp_path):
    arguments = ["--kernel", *tune.KERNELS, "--lanes", "64"]
    status, rows = sweep(tmp_path, *arguments, "--dtype", "bfloat16")
    assert status == 0 and {row["kernel"] for row in rows} == set(tune.KERNELS)


def test_the_proposal_is_the_fastest_and_names_its_rows(tmp_path):
    """A card on which 256 lanes and eight programs a multiprocessor are best."""
    rows = []
    for tokens in (8192, 132, 8, 1):
        for lanes in (64, 128, 256, 512):
            for splits in [2**i for i in range(9)]:
                programs = min(tokens * splits / 132, 8)
                ms = 1 + abs(lanes - 256) / 256 + 8 / programs + 1e-3 * splits
                rows.append(
                    dict(kernel="row_sums", dtype="bfloat16", vocab=262144, tokens=tokens)
                    | dict(lanes=lanes, warps=lanes // 32, splits=splits, ms=ms, check="ok")
                    | dict(row=len(rows) + 1, note="", chosen="", percent_of_copy=50)
                )
    text = tune.report(rows, 132, tmp_path / "tune.csv")
    assert re.search(r"^MAX_LANES = 256  # .*row \d+ .* ms, row \d+ .* ms, now 128$", text, re.M)
    assert re.search(r"^SCAN_PROGRAMS_PER_SM = 8  # ", text, re.M)
    first = next(row for row in rows if (row["tokens"], row["lanes"]) == (8192, 256))
    assert re.search(rf"8,192 rows +256 +8 +1 .* {first['row']}\b", text)


def test_the_most_important_comes_first():
    options = tune.argparse.Namespace(
        kernel=["row_sums", "row_grad"],
        dtype=["bfloat16", "float32"],
        vocab=tune.VOCABULARIES,
        tokens=tune.ROWS,
    )
    order = tune.problems(options)
    assert len(order) == len(set(order)) == 2 * 2 * 4 * 5
    for i, kernel in enumerate(options.kernel):
        assert order[i] == tune.Problem(kernel, "bfloat16", 128256, 8192)
    # a fifth of the way every number of rows and every dtype has been seen
    assert {p.tokens for p in order[:16]} >= {8192, 1, 132}
    assert {p.dtype for p in order[:16]} == {"bfloat16", "float32"}


def test_each_row_count_gets_splits_that_fill_a_card(monkeypatch):
    """As on an H100. Fewer rows, more splits; as many as a row has tiles at most."""
    monkeypatch.setattr(tune.tuning, "_device_shape", lambda device: (132, 32))
    options = tune.argparse.Namespace(device=torch.device("meta"), lanes=tune.LANES, splits=None)

    def splits(tokens, vocab=128256, lanes=128):
        problem = tune.Problem("row_sums", "bfloat16", vocab, tokens)
        tiles = tune.tiles_for(problem, options)
        return [t.splits for t in tiles[1:] if t.lanes == lanes]

    assert splits(8192) in ([], [1])  # [] where it is the present choice, which comes first
    assert set(splits(132)) == {1, 2, 4, 8, 16} - {
        tune.present_tile(tune.Problem("row_sums", "bfloat16", 128256, 132), options.device).splits
    }
    assert set(splits(1)) == {16, 32, 64}
    assert set(splits(1, vocab=32000, lanes=512)) == {1, 2, 4}


def test_compiling_ahead_covers_all_settings(monkeypatch, capsys):
    """The shares of the processes together are what the sweep launches."""
    launched = []

    class Recorded:
        def __init__(self, problem, device, compile_only):
            self.problem = problem

        def __call__(self, tile):
            launched.append((self.problem.kernel, self.problem.dtype, tile))

    options = tune.parse([*TINY, "--tokens", "4", "1", "--dtype", "float32", "bfloat16"])
    monkeypatch.setattr(tune, "Launch", Recorded)
    monkeypatch.setattr(tune, "START", tune.time.monotonic())
    for part in ("0/3", "1/3", "2/3"):
        tune.compile_part(part, options)
    expected = {
        (problem.kernel, problem.dtype, tile)
        for problem in tune.problems(options)
        for tile in tune.tiles_for(problem, options)
    }
    assert set(launched) == expected

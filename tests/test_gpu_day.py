"""bench/gpu_day.sh and bench/tune.py, as far as they go without a GPU."""

import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))
tune = importlib.import_module("tune")

STAGES = ("tune", "bench", "linear")
FILES = {"summary.txt", "tests.txt", *(f"{s}.{e}" for s in STAGES for e in ("csv", "txt"))}
INTERPRETER = "Triton's interpreter on a CPU"


def gpu_day(out, *arguments, root=ROOT, **environment):
    """(exit status, the summary)."""
    command = ["bash", str(root / "bench" / "gpu_day.sh"), *arguments, str(out)]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "summary.txt" in done.stderr or "--dry" in done.stderr, done.stderr
    return done.returncode, (out / "summary.txt").read_text()


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def statuses(summary):
    pattern = r"^(install|tests|tune|bench|linear) +(ok|not run|cut off|FAILED) +\d+s of +\d+s"
    return dict(re.findall(pattern, summary, re.M))


def test_a_dry_run(tmp_path):
    status, summary = gpu_day(tmp_path, "--dry")
    ran = {"install": "ok", "tests": "not run", "tune": "ok", "bench": "ok", "linear": "ok"}
    assert statuses(summary) == ran
    assert status == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES

    # nothing claims to come from a GPU
    assert summary.startswith("DRY RUN. No GPU was used, and no time in this folder is a GPU's")
    assert re.search(r"^card +none$", summary, re.M) and "Proposed" not in summary
    assert re.search(r"no GPU: \d+ skipped", summary)
    assert not re.search(r"^\S+::\S+ PASSED", (tmp_path / "tests.txt").read_text(), re.M)
    tuned, timed, linear = (rows_of(tmp_path / f"{stage}.csv") for stage in STAGES)
    assert tuned and all(row["device"].startswith(INTERPRETER) for row in tuned)
    assert all(row["driver"] == "" for row in tuned + timed + linear)
    assert tune.NOT_A_GPU in (tmp_path / "tune.txt").read_text()
    assert {row["provider"] for row in timed if row["ms"]} == {"dense", "tiled"}
    assert {row["provider"] for row in linear if row["ms"]} == {"products", "dense", "tiled"}
    for row in timed + linear:
        assert row["note"] == ("needs a GPU" if row["provider"] == "triton" else "")

    for version in (f"torch     {torch.__version__}", f"pytest    {pytest.__version__}"):
        assert version in summary
    for row in tuned:
        assert row["check"] == "ok" and float(row["ms"]) > 0 and row["command"]
    assert {row["kernel"] for row in tuned} == {"row_sums", "row_grad"}
    assert {(row["lanes"], row["splits"]) for row in tuned} >= {("128", "1"), ("64", "2")}


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources without git, which a test may break."""
    root = tmp_path / "tree"
    ignored = shutil.ignore_patterns("results", "__pycache__")
    for folder in ("drkl_triton", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


def test_what_is_missing_fails_or_hangs_costs_the_others_nothing(tree, tmp_path):
    """No pip, pytest, tqdm or matplotlib; and a sweep that does not end by itself."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("pip", "pytest", "tqdm", "matplotlib"):
        (absent / f"{name}.py").write_text("raise ModuleNotFoundError('hidden')")
    (tree / "bench" / "tune.py").write_text("while True:\n    pass\n")
    script = tree / "bench" / "gpu_day.sh"
    text = script.read_text()
    short = "INSTALL=12 TESTS=1 TUNE=1 BENCH=30 LINEAR=30 GRACE=1"
    script.write_text(re.sub(r"INSTALL=20 .* GRACE=3", short, text))
    assert script.read_text() != text

    out = tmp_path / "out"
    environment = {"PYTHONPATH": str(absent), "COMMIT": "0123abcd"}
    status, summary = gpu_day(out, "--dry", root=tree, **environment)
    assert status == 1
    ran = {"install": "ok", "tests": "not run", "tune": "cut off", "bench": "ok", "linear": "ok"}
    assert statuses(summary) == ran
    assert "pytest is not installed" in summary and "pip could not" in summary
    assert re.search(r"^commit +0123abcd$", summary, re.M)
    assert {row["check"] for row in rows_of(out / "bench.csv") if row["ms"]} == {"ok"}
    checks = {row["provider"]: row["check"] for row in rows_of(out / "linear.csv") if row["ms"]}
    assert checks == {"products": "", "dense": "ok", "tiled": "ok"}
    assert {path.name for path in out.iterdir()} <= FILES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_real_run_needs_a_gpu(tmp_path):
    status, summary = gpu_day(tmp_path)
    assert status == 2 and "nothing ran: PyTorch sees no GPU" in summary


TINY = "--device cpu --kernel row_grad --dtype float32 --vocab 1300 --tokens 1 --repeats 1".split()


def sweep(folder, *arguments):
    status = tune.main([*TINY, *arguments, "--out", str(folder / "tune.csv")])
    return status, rows_of(folder / "tune.csv")


def test_a_wrong_tile_is_flagged_and_not_proposed(tmp_path, monkeypatch, capsys):
    grad = tune.kernels.row_grad

    def wrong(*arguments):
        out = grad(*arguments)
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

    def failing(*arguments):
        if tune.tuning.choose().splits == 2:
            raise RuntimeError("out of resources")
        return grad(*arguments)

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
        kernel=["row_sums", "row_grad"], dtype=["bfloat16", "float32"],
        vocab=tune.VOCABULARIES, tokens=tune.ROWS,
    )  # fmt: skip
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
    options = tune.argparse.Namespace(device=torch.device("meta"), lanes=tune.LANES)

    def splits(tokens, vocab=128256, lanes=128):
        problem = tune.Problem("row_sums", "bfloat16", vocab, tokens)
        tiles = tune.tiles_for(problem, options)
        return [t.splits for t in tiles[1:] if t.lanes == lanes]

    assert splits(8192) in ([], [1])  # [] where it is the present choice, which comes first
    assert set(splits(132)) == {1, 2, 4, 8, 16} - {tune.present_tile(
        tune.Problem("row_sums", "bfloat16", 128256, 132), options.device).splits}  # fmt: skip
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

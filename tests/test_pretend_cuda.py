"""The GPU branches of the benchmarks, on a pretend CUDA."""

import csv
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from pretend_cuda import PROPERTIES, pretend

pytest.importorskip("tqdm")
BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))
timing = importlib.import_module("timing")

COMMON = ["--device", "cuda", "--repeats", "1"]
ARGUMENTS = {
    "run": "--op drkl reverse_kl --vocab 301 --tokens 12 --copy-mb 4 --no-plots",
    "linear": "--op drkl --vocab 300 --tokens 70 --hidden 16 --no-plots",
    "tune": "--dtype bfloat16 --vocab 600 --tokens 5 --copy-mb 4 --jobs 0",
}
OWN = {"run": {"triton", "kernels"}, "linear": {"triton", "recompute"}}


def load(script):
    """Under a name of its own: the demo has a run.py, too."""
    name = f"bench_{script}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{script}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def bench(script, folder, *arguments):
    """The CSV's rows."""
    main = load(script).main
    out = folder / "tune.csv" if script == "tune" else folder
    with pretend():
        status = main([*COMMON, *ARGUMENTS[script].split(), *arguments, "--out", str(out)])
    assert status == 0
    (path,) = folder.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_benchmark_runs(script, tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abcd")
    module = load(script)
    if script == "tune":
        monkeypatch.setattr(module._checks, "INTERPRETING", False)
        rows = bench(script, tmp_path)
        assert {row["kernel"] for row in rows} == {"row_sums", "row_grad"}
    else:
        names = ["dense", "products", "triton", "kernels", "recompute"]
        names = [p.name for p in module.bench.providers if p.name in names]
        rows = bench(script, tmp_path, "--providers", *names)
        assert {row["provider"] for row in rows if row["check"] == "ok"} == OWN[script] | {"dense"}
    for row in rows:
        assert row["device"] == PROPERTIES.name and row["commit"] == "0123abcd" and row["ms"]
        assert row["note"] == "" and row.get("read_gb_per_s") != ""


@pytest.mark.parametrize("script", ["run", "linear"])
def test_tiled_is_not_timed_unless_it_is_named(script):
    with pretend():
        options = load(script).parse(["--device", "cuda"])
    assert options.device == torch.device("cuda", 0)
    assert "tiled" not in options.providers and "triton" in options.providers


def test_peak_memory_is_what_was_asked_for(monkeypatch):
    """Not what the allocator's blocks come to."""
    asked = {"requested_bytes.all.peak": 700, "requested_bytes.all.current": 100}
    with pretend():
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: asked)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 << 20)
        with timing.allocations(torch.device("cuda", 0)) as count:
            asked["requested_bytes.all.current"] = 300
    assert (count.peak, count.live) == (600, 200)


def test_the_cache_is_emptied_without_writing():
    """What was written would be on its way to memory while the call runs."""
    with pretend():
        clock = timing.Clock(torch.device("cuda", 0))
        before = clock._evict._version
        clock.ms(lambda: None)
        assert clock._evict._version == before

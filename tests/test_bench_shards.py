"""bench/shards.py: what it writes; bench/scaling.py's page."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[1]
TINY = "--op drkl --vocab 64 --tokens 12 --hidden 8 --ranks 2 --repeats 2 --threads 2"


def bench(script, *arguments):
    command = [sys.executable, ROOT / "bench" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_writes_both_ways_with_what_they_send(tmp_path):
    run = bench("shards.py", *TINY.split(), "--out", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "cpu-shards.csv").open(newline="", encoding="utf-8") as file:
        rows = {(r["source"], r["way"]): r for r in csv.DictReader(file)}
    assert {*rows} == {(s, w) for s in ("logits", "hidden") for w in ("one", "group", "gather")}
    sent = {key: float(row["sent_bytes_per_token"]) for key, row in rows.items()}
    assert sent["logits", "group"] == 8 * 4 and sent["logits", "gather"] == 2 * 64 * 4
    assert sent["hidden", "group"] == (8 + 8) * 4 and sent["hidden", "one"] == 0
    assert all(float(row["loss_error"]) < 1e-5 for row in rows.values())
    assert float(rows["logits", "one"]["x_one"]) == 1


def test_the_ranks_must_divide_the_vocabulary(tmp_path):
    run = bench("shards.py", "--vocab", "63", "--out", tmp_path)
    assert run.returncode == 2 and "got 2 and 63" in run.stderr


def test_the_page_has_the_tables_of_the_model():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = bench("scaling.py").stdout.strip().split("\n\n")
    assert len(tables) == 2 and all(table in page for table in tables)

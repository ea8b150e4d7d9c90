"""A vocabulary shared over the ranks of a process group: two and four processes against one.
shard_ranks.py has what they do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("shard_ranks.py")
SECONDS = 400


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_as_one_process(world):
    run = subprocess.run(
        [sys.executable, SCRIPT, str(world), str(SECONDS)],
        capture_output=True, text=True, timeout=SECONDS + 60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    assert len(said) > 10 and not any(said.values()), run.stdout + run.stderr

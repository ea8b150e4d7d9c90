"""A vocabulary shared over the ranks of a process group: two and four processes against one.
shard_ranks.py has what they do.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drkl_triton import _shard

SCRIPT = Path(__file__).with_name("shard_ranks.py")
SECONDS = 400


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_as_one_process(world):
    run = subprocess.run(
        [sys.executable, SCRIPT, str(world), str(SECONDS)],
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    assert len(said) > 10 and not any(said.values()), run.stdout + run.stderr


def test_a_rank_that_fails_where_nobody_comes_raises_its_own_error(monkeypatch):
    class Nobody(_shard._Meeting):
        def __init__(self):
            self.travelling = {}

        def announce(self, said, patience):
            return []

    monkeypatch.setitem(_shard._meetings, None, Nobody())
    with pytest.raises(KeyError, match="own"), _shard.together(None):
        raise KeyError("own")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_the_example_has_the_losses_of_one_process():
    pytest.importorskip("tokenizers")
    pytest.importorskip("tqdm")
    example = SCRIPT.parents[1] / "examples" / "tensor_parallel.py"
    options = "--steps", "3", "--vocab", "512", "--max-mb", "0.3"
    ranks = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    printed = []
    for launcher in (), ranks:
        run = subprocess.run(
            [sys.executable, *launcher, example, *options],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr
        printed.append([float(x) for x in re.findall(r": (\S+)$", run.stdout, re.M)])
    assert len(printed[0]) == 4 and printed[0] == pytest.approx(printed[1], abs=2e-6)

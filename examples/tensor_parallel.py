"""DRKL with the student's output layer split over processes, on the text of `make demo`:

torchrun --nproc-per-node 2 examples/tensor_parallel.py
python examples/tensor_parallel.py                        # one process: the same losses

The logits are a DTensor split over the vocabulary, as ColwiseParallel leaves them, and go into the
loss as they are. Without an accelerator it takes gloo.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "distill"))

import torch
import torch.distributed as dist
from data import load_corpus, training_batch
from model import ModelConfig, Transformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from drkl_triton import drkl


class Student(nn.Module):
    """The demo's transformer with an output layer of its own."""

    def __init__(self, config):
        super().__init__()
        self.body = Transformer(config)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.body.head(tokens).hidden)


def split(student, mesh):
    plan = {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    return parallelize_module(student, mesh, plan)


def train(corpus, args, mesh=None):
    """The loss of each step."""
    shape = dict(vocab=corpus.vocab, layers=2, heads=4)
    torch.manual_seed(0)  # every process makes the same models, and draws the same batches
    teacher = Transformer(ModelConfig(width=96, **shape)).requires_grad_(False).to(args.device)
    student = Student(ModelConfig(width=64, **shape)).to(args.device)
    if mesh is not None:
        student = split(student, mesh)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, foreach=False)
    losses = []
    for step in range(args.steps):
        tokens = training_batch(corpus.train, args.batch, 64, "tensor parallel", step)
        tokens = tokens.to(args.device)
        loss = drkl(student(tokens), teacher(tokens), tokens, shift=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--max-mb", type=float, default=1.0)
    args = parser.parse_args(argv)
    mesh, rank, count = None, 0, int(os.environ.get("WORLD_SIZE", 1))
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if count > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        mesh = init_device_mesh(args.device, (count,), mesh_dim_names=("tensor",))
        rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as cache:
        corpus = load_corpus(None, cache, args.vocab, args.max_mb)
    losses = train(corpus, args, mesh)
    if rank == 0:
        print(f"{count} process(es), {corpus.vocab:,} tokens in the vocabulary")
        for step in range(0, args.steps, max(1, args.steps // 5)):
            print(f"step {step}: {losses[step]:.6f}")
        print(f"last: {losses[-1]:.6f}")
    if mesh is not None:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()

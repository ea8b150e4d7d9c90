"""What a loss takes in memory: from logits, and from hidden states. Measured, not worked out."""

import os
from dataclasses import replace

import torch
from model import Head
from train import ask_teacher, autocast, loss_of

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints two lines at each use


def peak_of(call, device):
    """Bytes of tensors that a second run of call() allocates at most; None where nothing counts.

    A GPU's allocator keeps the count. A CPU's reports each allocation to torch's profiler.
    """
    call()  # what is set up once is no part of it
    if device.type == "cpu":
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            call()
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak
    allocator = getattr(torch, device.type, None)  # torch.cuda, torch.xpu
    if not hasattr(allocator, "max_memory_allocated"):
        return None
    allocator.synchronize(device)
    allocator.reset_peak_memory_stats(device)
    before = allocator.memory_allocated(device)
    call()
    allocator.synchronize(device)
    return allocator.max_memory_allocated(device) - before


class Ready:
    """A model whose last hidden states exist already."""

    def __init__(self, head):
        self.head = lambda tokens: head


def measure(learner, teacher, tokens, device, dtype):
    """{"loss": bytes, "step": bytes} of one batch, above the parameters.

    "loss": both models' output layers, the objective, and its gradient with respect to the
    student's last hidden states and matrix. "step": the models below them as well.
    """

    def run(learner, teacher, inputs):
        taught = ask_teacher(teacher, tokens, [learner], device, dtype)
        torch.autograd.grad(loss_of(learner, taught, tokens, device, dtype), inputs)

    with torch.no_grad(), autocast(device, dtype):
        ready = Ready(teacher.head(tokens))
        leaf = Head(*(x.detach().requires_grad_() for x in learner.model.head(tokens)))
    alone = replace(learner, model=Ready(leaf))
    parameters = list(learner.model.parameters())
    return {
        "loss": peak_of(lambda: run(alone, ready, leaf), device),
        "step": peak_of(lambda: run(learner, teacher, parameters), device),
    }

"""One training loop for the teacher and for the students.

The students learn side by side, so that the teacher runs once a batch for all of them.
"""

import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cache
import torch
import torch.nn.functional as F
from data import InputError, training_batch
from model import Head
from progress import progress

from drkl_triton import (
    SparseTeacher,
    divergence,
    linear_divergence,
    objectives,
    teacher_topk,
)

CLIP_NORM = 1.0


# An objective: f(student_logits [B, T, V], teacher_logits [B, T, V] or a SparseTeacher, tokens
# [B, T]) -> scalar, the mean over the B (T - 1) predicted tokens.


def cross_entropy(student_logits, _teacher_logits, tokens):
    return F.cross_entropy(student_logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


# name -> (label for the reader, what the package calls it)
OBJECTIVES = {
    "fkl": ("forward KL", objectives.forward_kl),
    "rkl": ("RKL", objectives.reverse_kl),
    "mixed": ("mixed KL", objectives.mixed_kl),
    "jsd": ("JSD", objectives.js_divergence),
    "dkd": ("DKD", objectives.dkd),
}
NAMES = f"ce, {', '.join(OBJECTIVES)} or drkl:GAMMA"


def of_package(name):
    """(label, objective) of any name but "ce"."""
    if name in OBJECTIVES:
        label, make = OBJECTIVES[name]
        return label, make()
    gamma = gamma_of(name)
    return f"DRKL γ={gamma:g}", objectives.drkl(gamma)


def make_objective(name, temperature=1.0, backend="auto"):
    """(label for the reader, function) from a name."""
    if name == "ce":
        return "cross-entropy", cross_entropy
    label, objective = of_package(name)
    options = {"temperature": temperature, "shift": True, "backend": backend}
    return label, lambda s, t, tokens: divergence(objective, s, t, tokens, **options)


def gamma_of(name):
    kind, _, argument = name.partition(":")
    try:
        gamma = float(argument) if kind == "drkl" else math.nan
    except ValueError:
        gamma = math.nan
    if not 0 < gamma < math.inf:
        raise InputError(f'an objective is {NAMES} with GAMMA > 0, got "{name}"')
    return gamma


def make_linear_objective(name, temperature=1.0, backend="auto", chunk_bytes=None):
    """The same loss as f(student Head, teacher Head, tokens), which never has all the logits; None
    for "ce", which does without a teacher. To be called under the models' autocast.
    """
    if name == "ce":
        return None
    _, loss = of_package(name)

    def objective(student, teacher, tokens):
        return linear_divergence(
            loss,
            student.hidden,
            student.matrix,
            tokens,
            teacher_hidden=teacher.hidden,
            teacher_weight=teacher.matrix.detach(),
            temperature=temperature,
            shift=True,
            backend=backend,
            chunk_bytes=chunk_bytes,
        )

    return objective


@dataclass
class Learner:
    model: torch.nn.Module
    objective: object
    from_hidden: bool = False  # the objective takes Heads in place of logits


class TeacherOutput(NamedTuple):
    head: Head | None = None
    logits: torch.Tensor | SparseTeacher | None = None


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch: int
    context: int
    lr: float
    evaluations: int  # looks at the held-out text during training, besides the one at the start
    weight_decay: float = 0.1
    warmup: float = 0.05  # fraction of the steps
    final_lr: float = 0.1  # fraction of lr, reached along a cosine

    def lr_at(self, step):
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (
            self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        )

    def evaluation_steps(self):
        return {
            max(1, round(self.steps * (i + 1) / self.evaluations)) for i in range(self.evaluations)
        }


@contextmanager
def deferred_interrupt():
    """Ctrl-C sets the event, and the loop ends between two steps. A second one ends it now."""
    requested = threading.Event()

    def handle(_signal, _frame):
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    # Python lets the main thread alone set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_optimizer(model, config):
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )


@torch.no_grad()
def ask_teacher(teacher, tokens, learners, device, dtype, topk=0, temperature=1.0):
    """What these learners' objectives read of the teacher: it runs once for all. topk: of its
    logits so many log-probabilities alone, and the next token's.
    """
    with autocast(device, dtype):
        head = teacher.head(tokens)
        wanted = not all(learner.from_hidden for learner in learners)
        logits = head.logits() if wanted else None
    if logits is not None and topk:
        following = torch.roll(tokens, -1, -1)
        logits = teacher_topk(logits, topk, labels=following, temperature=temperature)
    return TeacherOutput(head, logits)


def loss_of(learner, taught, tokens, device, dtype):
    """The learner's objective on tokens [B, T]; taught: a TeacherOutput."""
    with autocast(device, dtype):
        head = learner.model.head(tokens)
        if learner.from_hidden:
            return learner.objective(head, taught.head, tokens)
        logits = head.logits()
    return learner.objective(logits, taught.logits, tokens)


def descend(loss, model, optimizer, lr):
    """One step; returns the norm of the gradient before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


def train(
    learners, tokens, config, *, salt, device, dtype, path, evaluate, teacher=None, topk=0,
    temperature=1.0, desc="training",
):  # fmt: skip
    """Train every learner on the same batches, in place; return (history, seconds).

    learners {name: Learner}; evaluate() -> {name: {metric: number}}. The state goes to path at
    every evaluation and on Ctrl-C, and a call that finds it there goes on from it.

    The history has for each name "loss" and "gradient_norm" (before clipping), one number a step,
    and "held_out", one entry an evaluation, the first of them at step 0.
    """
    optimizers = {name: make_optimizer(one.model, config) for name, one in learners.items()}
    history = {name: {"loss": [], "gradient_norm": [], "held_out": []} for name in learners}
    step, seconds = 0, 0.0
    stored = cache.load(path)
    if stored is not None:
        step, seconds, history = stored["step"], stored["seconds"], stored["history"]
        for name, learner in learners.items():
            learner.model.load_state_dict(stored["models"][name])
            if step < config.steps:
                optimizers[name].load_state_dict(stored["optimizers"][name])
    if step >= config.steps:
        return history, seconds

    start = time.monotonic()
    pending = {name: [] for name in learners}

    def checkpoint():
        # Read back in one go: an .item() at every step would stall a GPU.
        for name, rows in pending.items():
            for loss, norm in torch.stack(rows).tolist() if rows else []:
                history[name]["loss"].append(loss)
                history[name]["gradient_norm"].append(norm)
            rows.clear()
        finished = step >= config.steps
        state = {
            "step": step,
            "seconds": seconds + time.monotonic() - start,
            "history": history,
            "models": {name: learner.model.state_dict() for name, learner in learners.items()},
            "optimizers": {} if finished else {n: o.state_dict() for n, o in optimizers.items()},
        }
        cache.save(path, state)

    def look():
        metrics = evaluate()
        for name in learners:
            if not math.isfinite(metrics[name]["cross_entropy"]):
                raise InputError(f"{name} diverged by step {step}; try a smaller learning rate")
            history[name]["held_out"].append({"step": step, **metrics[name]})
        values = {metrics[name]["cross_entropy"] for name in learners}
        return "held-out CE " + "–".join(f"{v:.2f}" for v in sorted({min(values), max(values)}))

    if step == 0:
        look()
    evaluation_steps = config.evaluation_steps()
    with deferred_interrupt() as interrupted, progress(config.steps, desc, initial=step) as bar:
        while step < config.steps:
            batch = training_batch(tokens, config.batch, config.context, salt, step).to(device)
            taught = TeacherOutput()
            if teacher is not None:
                asked = teacher, batch, learners.values(), device, dtype
                taught = ask_teacher(*asked, topk, temperature)
            for name, learner in learners.items():
                loss = loss_of(learner, taught, batch, device, dtype)
                norm = descend(loss, learner.model, optimizers[name], config.lr_at(step))
                pending[name].append(torch.stack([loss.detach(), norm]))
            step += 1
            bar.update()
            if step in evaluation_steps:
                bar.set_postfix_str(look())
                checkpoint()
            if interrupted.is_set():
                checkpoint()
                raise KeyboardInterrupt
    return history, seconds + time.monotonic() - start


def checkpoint_path(folder, kind, *parts):
    return Path(folder) / f"{kind}-{cache.digest(*parts)}.pt"

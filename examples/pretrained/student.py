"""The objectives that are compared, and the training of one student."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import smollm
import torch
import torch.nn.functional as F
from data import InputError
from progress import progress
from train import TrainConfig, autocast, descend, make_optimizer

from drkl_triton import linear_divergence
from drkl_triton import objectives as o


class Compared(NamedTuple):
    label: str
    objective: object
    favourite: bool = False  # the target is the teacher's likeliest token, not the text's


OBJECTIVES = {
    "forward_kl": Compared("forward KL", o.forward_kl()),
    "reverse_kl": Compared("reverse KL", o.reverse_kl()),
    "js_divergence": Compared("JSD", o.js_divergence()),
    "drkl:0.5": Compared("DRKL γ=0.5", o.drkl(0.5)),
    "mixed_kl": Compared("mixed KL", o.mixed_kl()),
    "skew_kl": Compared("skew forward KL", o.skew_kl()),
    "skew_reverse_kl": Compared("skew reverse KL", o.skew_reverse_kl()),
    "adaptive_kl": Compared("AKL", o.adaptive_kl()),
    "alpha_beta": Compared("α-β (0.2, 0.7)", o.alpha_beta(0.2, 0.7)),
    "dkd": Compared("DKD", o.dkd()),
    "drkl:0.25": Compared("DRKL γ=0.25", o.drkl(0.25)),
    "drkl:1": Compared("DRKL γ=1", o.drkl(1.0)),
    "drkl:2": Compared("DRKL γ=2", o.drkl(2.0)),
    "drkl:favourite": Compared("DRKL γ=0.5, teacher's top", o.drkl(0.5), favourite=True),
}
MAIN = ("forward_kl", "reverse_kl", "js_divergence", "drkl:0.5")
BASELINE = "reverse_kl"


@dataclass(frozen=True)
class Setting:
    """What the training of a student takes besides its objective."""

    teacher_matrix: torch.Tensor  # [V, H]
    cache: object  # of the teacher's hidden states, by window
    batch: int  # windows
    device: torch.device
    dtype: torch.dtype

    def tokens(self, windows):
        """[B, T]"""
        return torch.stack([window.tokens for window in windows]).to(self.device)

    def tensors(self, windows):
        """(tokens [B, T], the teacher's hidden states [B, T, H])"""
        hidden = self.cache.batch([window.key for window in windows])
        return self.tokens(windows), hidden.to(self.device, torch.float32)


def loss_of(compared, student, tokens, teacher_hidden, setting):
    """The mean over the predicted tokens of windows [B, T]; cross-entropy if compared is None."""
    with autocast(setting.device, setting.dtype):
        hidden, matrix = smollm.hidden(student, tokens), smollm.matrix(student)
        if compared is None:
            logits = F.linear(hidden[:, :-1], matrix)
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        labels = tokens
        if compared.favourite:
            with torch.no_grad():
                top = F.linear(teacher_hidden[:, :-1], setting.teacher_matrix).argmax(-1)
            labels = torch.cat([tokens[:, :1], top], 1)
        return linear_divergence(
            compared.objective, hidden, matrix, labels, teacher_hidden=teacher_hidden,
            teacher_weight=setting.teacher_matrix, shift=True,
        )  # fmt: skip


def train(student, compared, order, lr, setting, *, look=None, looks=0, desc=""):
    """Train on the windows in their order, in place; returns (history, seconds).

    look() -> {metric: number} is asked at the start, at the end and evenly in between, ``looks``
    times. The history has "loss" and "gradient_norm" (before clipping), one number a step, and
    "held_out", what look() said, with the number of tokens seen.
    """
    steps = len(order) // setting.batch
    if not steps:
        raise InputError(f"{len(order)} windows are fewer than --batch {setting.batch}; give more")
    config = TrainConfig(steps, setting.batch, len(order[0].tokens), lr, evaluations=max(1, looks))
    optimizer, start = make_optimizer(student, config), time.monotonic()
    student.train()
    rows, held_out, looking = [], [], 0.0

    def look_at(step):
        nonlocal looking
        began = time.monotonic()
        student.eval()
        held_out.append({"tokens": step * setting.batch * config.context, **look()})
        student.train()
        looking += time.monotonic() - began

    if looks:
        look_at(0)
    with progress(steps, desc) as bar:
        for step in range(steps):
            batch = order[step * setting.batch : (step + 1) * setting.batch]
            alone = compared is None
            asked = (setting.tokens(batch), None) if alone else setting.tensors(batch)
            loss = loss_of(compared, student, *asked, setting)
            norm = descend(loss, student, optimizer, config.lr_at(step))
            rows.append(torch.stack([loss.detach(), norm]))
            if looks and step + 1 in config.evaluation_steps():
                look_at(step + 1)
            bar.update()
    student.eval()
    losses, norms = torch.stack(rows).T.tolist()
    history = {"loss": losses, "gradient_norm": norms, "held_out": held_out}
    return history, time.monotonic() - start - looking

"""Classes with the interface of Liger-Kernel's generalised Jensen-Shannon losses
(https://github.com/linkedin/Liger-Kernel, read at 0.8.5), computed by this package: for code that
takes such a class. Liger-Kernel itself is not needed.

Values and gradients are theirs, but for:

- **beta between 0 and 1 with columns at -inf**: theirs are NaN where both sides are (0 times inf).
- **16-bit inputs**: here logits and sums are float32; theirs are rounded to the inputs' dtype.
- **vocabularies that differ**: theirs pads the student's logits with zeros, which gives mass to
  tokens that it does not have. Here ``vocab_mismatch="truncate"`` leaves the teacher's surplus out,
  and the default is an error.
- **LigerJSD**'s gradient is that of logits: it differs from theirs by what the backward pass of
  ``log_softmax`` removes, and is the same before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import objectives
from ..functional import divergence
from ..linear import linear_divergence

__all__ = ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "LigerJSD"]


class LigerFusedLinearJSDLoss(nn.Module):
    """``weight_hard_loss`` times cross-entropy, at temperature 1, plus ``weight_soft_loss`` times
    JSD(beta), both over the tokens whose label is not ``ignore_index``: one
    :func:`drkl_triton.linear_divergence`.

    Args:
        weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature: as Liger's.
        compiled, chunk_size: taken and not used; ``chunk_bytes`` says how much memory a slice of
            both models' logits may take.
        return_soft_hard_loss: return (loss, soft, hard), the last two detached; this computes the
            student's logits once more.
        options: keywords of :func:`drkl_triton.linear_divergence`, such as ``backend``,
            ``student_softcap``, ``vocab_mismatch``.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.return_soft_hard_loss = beta, return_soft_hard_loss
        self.options = dict(options, ignore_index=ignore_index, temperature=temperature)
        terms = [
            weight * term
            for weight, term in (
                (weight_hard_loss, objectives.cross_entropy()),
                (weight_soft_loss, objectives.js_divergence(beta)),
            )
            if weight != 0
        ]
        self.objective = sum(terms) if terms else 0.0 * objectives.js_divergence(beta)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """``[N, H]``, ``[V, H]``, ``[N, H']``, ``[V, H']``, ``[N]``, ``[V]``, ``[V]``; the teacher
        must not require grad.
        """
        student = dict(student_bias=student_bias, **self.options)
        loss = linear_divergence(
            self.objective,
            student_input,
            student_weight,
            true_labels,
            teacher_hidden=teacher_input,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            **student,
        )
        if not self.return_soft_hard_loss:
            return loss
        with torch.no_grad():
            hard = linear_divergence(
                objectives.cross_entropy(), student_input, student_weight, true_labels, **student
            )
            soft = loss.detach() - self.weight_hard_loss * hard
            if self.weight_soft_loss != 0:
                soft = soft / self.weight_soft_loss
        return loss, soft, hard


class LigerFusedLinearJSD(nn.Module):
    """JSD(jsd_beta) from hidden states, over the rows whose label is not ``ignore_index``.

    Args:
        jsd_beta, ignore_index, temperature: as Liger's.
        accum_dtype: taken and not used: sums are float32.
        options: keywords of :func:`drkl_triton.linear_divergence`.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        self.objective = objectives.js_divergence(jsd_beta)
        self.options = dict(options, ignore_index=ignore_index, temperature=temperature)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """``[N, H]``, ``[V, H]``, ``[N, H']``, ``[V, H']``, ``[N]``."""
        return linear_divergence(
            self.objective,
            student_input,
            student_weight,
            shift_labels,
            teacher_hidden=teacher_input.detach(),
            teacher_weight=teacher_weight.detach(),
            **self.options,
        )


class LigerJSD(nn.Module):
    """JSD(beta) of log-probabilities ``log_q`` (student) and ``log_p`` (teacher), ``[N, V]``, over
    the rows whose label is not ``ignore_index``. Logits may be passed as well.

    Args:
        beta, ignore_index: as Liger's.
        options: keywords of :func:`drkl_triton.divergence`.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100, **options: Any):
        super().__init__()
        self.objective = objectives.js_divergence(beta)
        self.options = dict(options, ignore_index=ignore_index)

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return divergence(self.objective, log_q, log_p.detach(), shift_labels, **self.options)

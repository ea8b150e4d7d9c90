"""The losses of DistiLLM (arXiv 2402.03898, https://github.com/jongwooko/distillm) by their names
and with their interface, ``loss(logits, teacher_logits, no_model_batch, ...)``, where
``no_model_batch["label"]`` already lies one token ahead of the input; and DRKL.

All return the sum over the tokens whose label is not -100, over their number; nothing is shifted.
Where the logits are finite they equal the dense float32 formulas of that interface: its
``forward_kl`` and ``skewed_forward_kl`` are cross-entropies, which are a divergence plus the
teacher's entropy, and so are these. They differ in three cases, on purpose:

- **-inf.** The dense formula leaves out the term of a column where either side is infinite, and its
  gradient is NaN in the whole row (0 times -inf in autograd). Here a student at -inf adds 0, the
  same value, with a finite gradient. A teacher at -inf where the student is finite makes reverse KL
  +inf and the row's gradient 0 (a student at -inf, forward KL), because that is the divergence:
  left out, a student with all its
  mass on such a column would have a loss of 0. ``support="teacher"`` leaves such columns out of
  both distributions and stays finite.
- **NaN** in a row without a label stays out of the loss; there it is multiplied by 0, which is NaN.
- **No valid token** gives 0 with zero gradients; there it is 0 / 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import objectives
from ..functional import divergence
from ..objectives import Objective

__all__ = [
    "drkl",
    "forward_kl",
    "js_distance",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "symmetric_kl",
    "tv_distance",
]

Batch = Mapping[str, Tensor]


def reverse_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, **options: Any
) -> Tensor:
    """Reverse KL ``KL(q || p)`` of the student's ``q``.

    Args, here and below:
        logits, teacher_logits: ``[B, T, V]``, float16, bfloat16, float32 or float64. The teacher
            carries no gradient.
        no_model_batch: its ``"label"`` is ``[B, T]`` int64 or int32, not shifted here; tokens at
            -100 do not count. Other entries are not read.
        options: keywords of :func:`drkl_triton.reverse_kl`, such as ``temperature`` or
            ``support``.

    Returns:
        0-dim, float32 (float64 where either side is float64), in nats.

    Raises:
        TypeError, ValueError: ``no_model_batch`` without labels, ``shift``, or as
            :func:`drkl_triton.reverse_kl`.
    """
    return _loss(objectives.reverse_kl(), logits, teacher_logits, no_model_batch, options)


def forward_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, **options: Any
) -> Tensor:
    """Cross-entropy ``-sum p log q`` under the teacher: forward KL plus the teacher's entropy."""
    return _loss(_forward(), logits, teacher_logits, no_model_batch, options)


def symmetric_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.9, **options: Any
) -> Tensor:
    """``(1 - lam)`` :func:`forward_kl` + ``lam`` :func:`reverse_kl`."""
    objective = (1 - lam) * _forward() + lam * objectives.reverse_kl()
    return _loss(objective, logits, teacher_logits, no_model_batch, options)


def js_distance(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.9, **options: Any
) -> Tensor:
    """:func:`drkl_triton.js_divergence` with beta = ``1 - lam``; lam between 0 and 1."""
    objective = objectives.jensen_shannon(1 - lam)
    return _loss(objective, logits, teacher_logits, no_model_batch, options)


def tv_distance(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, **options: Any
) -> Tensor:
    """:func:`drkl_triton.total_variation`."""
    return _loss(objectives.total_variation(), logits, teacher_logits, no_model_batch, options)


def skewed_forward_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.1, **options: Any
) -> Tensor:
    """Cross-entropy ``-sum p log(lam p + (1 - lam) q)``: :func:`drkl_triton.skew_kl` plus the
    teacher's entropy.
    """
    objective = objectives.skew_kl(lam) + objectives.teacher_entropy()
    return _loss(objective, logits, teacher_logits, no_model_batch, options)


def skewed_reverse_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.1, **options: Any
) -> Tensor:
    """:func:`drkl_triton.skew_reverse_kl`."""
    return _loss(objectives.skew_reverse_kl(lam), logits, teacher_logits, no_model_batch, options)


def drkl(
    logits: Tensor,
    teacher_logits: Tensor,
    no_model_batch: Batch,
    gamma: float | Tensor = 0.5,
    **options: Any,
) -> Tensor:
    """Diversity-aware reverse KL (:func:`drkl_triton.drkl`); ``gamma`` weighs the non-target part.
    The target is the label.
    """
    return _loss(objectives.drkl(gamma), logits, teacher_logits, no_model_batch, options)


def _forward() -> Objective:
    return objectives.forward_kl() + objectives.teacher_entropy()


def _loss(
    objective: Objective, logits: Tensor, teacher_logits: Tensor, batch: Batch, options: dict
) -> Tensor:
    labels = _labels(batch, options)
    return divergence(objective, logits, teacher_logits, labels, **options)


def _labels(batch: Mapping[str, Tensor], options: dict) -> Tensor:
    if options.get("shift"):
        raise ValueError(
            "shift must be left out, got True: DistiLLM's data sets have shifted the labels already"
        )
    if not isinstance(batch, Mapping):
        raise TypeError(
            'no_model_batch must be a mapping with the labels at "label", got '
            f"{type(batch).__name__}. DistiLLM's data sets return it beside model_batch."
        )
    if "label" not in batch:
        raise ValueError(
            'no_model_batch must hold the labels at "label", [B, T] with -100 where a token does '
            f"not count; it holds {sorted(map(str, batch))}. For labels under another name pass "
            '{"label": labels}.'
        )
    if not isinstance(batch["label"], Tensor):
        raise TypeError(
            'no_model_batch["label"] must be a torch.Tensor [B, T] of token ids, got '
            f"{type(batch['label']).__name__}; convert it with torch.as_tensor"
        )
    return batch["label"]

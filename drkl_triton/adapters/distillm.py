"""The loss interface of DistiLLM (arXiv 2402.03898): ``loss(logits, teacher_logits,
no_model_batch)``, where ``no_model_batch["label"]`` already lies one token ahead of the input.

Both functions return the sum over the tokens whose label is not -100, over their number; nothing is
shifted. Where the logits are finite they equal the dense float32 formula of that interface. They
differ in three cases, on purpose:

- **-inf.** The dense formula leaves out the term of a column where either side is infinite, and its
  gradient is NaN in the whole row (0 times -inf in autograd). Here a student at -inf adds 0, the
  same value, with a finite gradient. A teacher at -inf where the student is finite makes the loss
  +inf and the row's gradient 0, because that is the divergence: left out, a student with all its
  mass on such a column would have a loss of 0. ``support="teacher"`` leaves such columns out of
  both distributions and stays finite.
- **NaN** in a row without a label stays out of the loss; there it is multiplied by 0, which is NaN.
- **No valid token** gives 0 with zero gradients; there it is 0 / 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import functional

__all__ = ["drkl", "reverse_kl"]


def reverse_kl(
    logits: Tensor, teacher_logits: Tensor, no_model_batch: Mapping[str, Tensor], **options: Any
) -> Tensor:
    """Reverse KL ``KL(q || p)`` of the student's ``q``, sum over valid tokens / their number.

    Args:
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
    labels = _labels(no_model_batch, options)
    return functional.reverse_kl(logits, teacher_logits, labels, **options)


def drkl(
    logits: Tensor,
    teacher_logits: Tensor,
    no_model_batch: Mapping[str, Tensor],
    gamma: float | Tensor = 0.5,
    **options: Any,
) -> Tensor:
    """Diversity-aware reverse KL (:func:`drkl_triton.drkl`) with the arguments of
    :func:`reverse_kl` and the weight ``gamma`` of the non-target part. The target is the label.
    """
    labels = _labels(no_model_batch, options)
    return functional.drkl(logits, teacher_logits, labels, gamma=gamma, **options)


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

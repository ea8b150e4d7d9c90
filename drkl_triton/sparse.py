"""Teachers that come as a few log-probabilities a token: what is known of them, and how it is read.

docs/sparse-teachers.md says where such teachers come from and what is lost.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks, _reduction, _shard, ops
from .graph import LinearCall, LinearLogProbsFunction, LogProbsFunction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._objective import Objective
    from ._options import Rows

__all__ = [
    "SparseTeacher",
    "linear_log_probs_at",
    "log_probs_at",
    "sampled_teacher",
    "teacher_topk",
    "union_ids",
]


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """A teacher of which K log-probabilities a token are known; it takes the place of teacher
    logits in every loss, ``drkl(student_logits, SparseTeacher(ids, log_probs), labels)``, and is
    passed as ``teacher_logits`` to the losses from hidden states.

    The vocabulary is cut into cells: one for each of the K columns, and with ``tail="bucket"`` one
    for all others together. A loss is that of the two distributions over the cells, and so, for the
    KL divergences, a lower bound of the one over the vocabulary; metrics are of the cells, too. The
    terms of an objective that need no teacher (cross-entropy, z-loss, entropy) are of the whole
    vocabulary, and take another scan of the logits.

    Args:
        ids: ``[..., K]`` int32 or int64, columns of the student's logits, in any order. -1 is no
            entry, and so is a log-probability of -inf; of an id that comes twice the first counts.
        log_probs: ``[..., K]`` float16, bfloat16, float32 or float64: log p of those columns, in
            nats, without a gradient.
        tail: what the teacher's mass outside the K columns, ``p_T = 1 - sum p``, is taken for:

            - ``"bucket"``: one cell, of mass p_T in the teacher and q_T in the student. Outside of
              the K columns the gradient of forward KL is ``q_j (1 - p_T / q_T)``: the student
              learns how much mass belongs there, not where.
            - ``"renormalise"``: nothing; both distributions are renormalised over the K columns.
              The gradient is 0 everywhere else, so that nothing holds the student's tail: its mass
              may drift to any column, at no cost, and q_T may grow.
            - ``"drop"``: the K columns' terms of the sum are taken, at their probabilities in the
              whole vocabulary, and those of the rest are left out: ``sum_K p log(p / q)``. That is
              no divergence: it may be negative, and reverse KL falls when the student moves its
              mass off the K columns. For forward KL from samples, whose frequencies sum to 1, it is
              exact. Objectives with DRKL or DKD leave it out of their non-target parts.
            - ``"uniform"``: spread evenly over all other columns. Slower: the teacher's logits are
              written out, a slice of the rows at a time.
        normalised: whether ``log_probs`` are log-probabilities of the whole vocabulary at
            temperature 1. False: logits, known up to a number a row, as they are after a
            renormalisation over K; the tail's mass is then known through ``log_z`` alone, and
            without it ``tail`` must be ``"renormalise"``.
        log_z: the teacher's log-partition, which says what its K columns are at another
            temperature. With ``normalised`` ``[..., 2]``: the logsumexp of its logits at
            temperature 1, and of its logits over the loss's temperature. Without, ``[...]``: the
            latter.
        label_log_probs: ``[...]``: the teacher's log-probability of the label, which gives the
            label a cell of its own where it is not among the ids. Losses that need a label (DRKL,
            DKD) need its cell; a label outside of the cells is an error on the CPU, NaN on a GPU.
            Under ``shift`` it lies where the ids do, at the row that is scored with the label.

    A row without an entry is ignored, as one with a label of ``ignore_index`` is.

    A sum of probabilities above 1, as from 16-bit storage, leaves the tail the smallest mass that
    the sum of float32 numbers can tell from 0, 2^-23.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes or options that do not fit; log-probabilities that require grad.
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    normalised: bool = True
    log_z: Tensor | None = None
    label_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        _checks.sparse_teacher(self)

    def known(self, codes: Tensor) -> Tensor:
        """[...]: the rows that have an entry; codes [...] of the labels."""
        there = ((self.ids != -1) & (self.log_probs != float("-inf"))).any(-1)
        if self.label_log_probs is not None:
            there = there | ((self.label_log_probs != float("-inf")) & (codes >= 0))
        return there

    def cells(
        self, objective: Objective, rows: Rows, V: int, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log_p, columns, the labels' places) of _cells.Cells; for the losses."""
        one = not isinstance(temperature, Tensor) and temperature == 1
        _checks.sparse_temperature(self, one)
        device, dtype = self.ids.device, rows.inv_temperature.dtype
        wide = torch.float64 if device.type in ("cpu", "cuda") else dtype  # some GPUs have none
        columns, log_p, label = ops.cells(
            self.ids, self.log_probs, self.label_log_probs,
            None if one and self.normalised else self.log_z, rows.codes,
            _reduction.inverse(temperature, device, wide), V, self.tail, objective.labels_compared,
            dtype,
        )  # fmt: skip
        return log_p, columns, label


def log_probs_at(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    shift: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    return_tail: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probabilities of K columns a row, and of all others together, in one scan of the
    logits: ``log_softmax(logits / temperature).gather(-1, ids)`` without the log-softmax.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64; strides as in
            :func:`drkl_triton.softmax`.
        ids: ``[..., K]`` int32 or int64, in any order, K of up to some thousand. -1 is no entry; an
            id may come several times. One outside ``[0, V)`` is a ValueError on the CPU; on a GPU,
            where looking would stall the device, the row is NaN.
        temperature: positive number, or 0-dim tensor (not validated, no gradient).
        shift: next-token form for ``[B, T, V]``: row t gets the ids of row t + 1 (token ids
            ``[..., None]``, say), and the last row has none.
        backend: ``"auto"`` (Triton on a GPU, tiled PyTorch elsewhere), ``"triton"`` or ``"tiled"``.
        group, vocab_start: of a vocabulary shared over a group's ranks, as in
            :func:`drkl_triton.reverse_kl`; ids are of the whole vocabulary.
        return_tail: also return the tail.

    Returns:
        ``log_q [..., K]``, float32 (float64 for float64), -inf where there is no entry; and with
        ``return_tail`` ``(log_q, log_tail)``, ``log_tail [...]`` being the logarithm of the sum of
        all other probabilities, which is a sum and no difference from 1. Rows without an entry are
        not read: their tail is 0. A row with NaN or +inf, or -inf everywhere, is NaN.

    Raises:
        TypeError: wrong types, dtypes, layouts; a tensor inside a ``torch.func`` transform.
        ValueError: shapes or devices that do not fit; ids outside of the vocabulary; ``backend``
            unknown or not available here.
        RuntimeError: differentiating the gradient (second derivatives).

    The gradient is that of ``logits``, in their dtype. Between forward and backward O(N K) numbers
    are kept; in all the logits are read twice and the gradient is written once.
    """
    logits, group = _shard.of_dtensor("logits", logits, -1, group)
    _checks.group(group, vocab_start)
    with _shard.together(group) if group is not None else nullcontext():
        _checks.logits("logits", logits, group is not None)
        said = temperature, shift, return_tail
        ids, backend = _ids_of(ids, logits, "logits", *said, backend)
        V, key = logits.shape[-1], ""
        if group is not None:
            shard = _agreed("log_probs_at", group, vocab_start, logits, ids, V, said)
            V, key = shard.vocabulary, shard.key
        acc = torch.promote_types(logits.dtype, torch.float32)
        inv_temperature = _reduction.inverse(temperature, logits.device, acc)
        columns, codes = ops.distinct(ids, V)
        flat = ids.reshape(-1, ids.shape[-1])
        found = LogProbsFunction.apply(logits, flat, columns, codes, inv_temperature, backend, key)
    return _shaped(found, ids, return_tail)


def _agreed(function, group, vocab_start, like, ids, width, said):
    temperature, shift, return_tail = said
    said = {"function": function, "ids": [*ids.shape], "dtype": str(like.dtype), "shift": shift}
    said["temperature"] = "a tensor" if isinstance(temperature, Tensor) else temperature
    said |= {"return_tail": return_tail}
    return _shard.agree(group, said, width, vocab_start)


def linear_log_probs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    shift: bool = False,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    return_tail: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`log_probs_at`, from the last hidden states ``[..., H]`` and the output matrix
    ``[V, H]``; the logits exist a slice at a time, and once more in the backward pass.

    ``bias [V]``, ``scale``, ``softcap`` and ``chunk_bytes`` are those of
    :func:`drkl_triton.linear_reverse_kl`. Rows without an entry are left out before the first
    product, which waits for the device.
    """
    _checks.group(group, vocab_start)
    with _shard.together(group) if group is not None else nullcontext():
        if group is not None:
            weight, bias = (_shard.own_rows(x, group) for x in (weight, bias))
        _checks.head_numbers("", scale, softcap)
        _checks.linear_options(chunk_bytes=chunk_bytes, recompute=False)
        _checks.head("", hidden, weight, bias, group is not None)
        said = temperature, shift, return_tail
        ids, backend = _ids_of(ids, hidden, "hidden", *said, backend)
        dtype = _checks.product_dtype("weight", weight, "hidden", hidden)
        acc = torch.float32
        for x in (hidden, weight, bias):
            acc = acc if x is None else torch.promote_types(acc, x.dtype)
        V, device, key = weight.shape[0], hidden.device, ""
        vocabulary = V
        if group is not None:
            shard = _agreed("linear_log_probs_at", group, vocab_start, hidden, ids, V, said)
            vocabulary, key = shard.vocabulary, shard.key
        columns, codes = ops.distinct(ids, vocabulary)
        wanted = [
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (hidden, weight, bias)
        ]
        call = LinearCall(
            student_dtype=dtype, teacher_dtype=None, V=V, objective="", needs=0,
            wanted=tuple(wanted), may_skip=True, chunk_bytes=chunk_bytes, tail="",
            backend=backend, shard=key, metrics=False,
        )  # fmt: skip
        scale = None if scale == 1 else _reduction.scalar(scale, acc, device)
        softcap = None if softcap is None else _reduction.scalar(softcap, acc, device)
        found = LinearLogProbsFunction.apply(
            call, ids.reshape(-1, ids.shape[-1]), hidden, weight, bias, scale, softcap, *[None] * 6,
            codes, _reduction.inverse(temperature, device, acc), None, None, columns, None,
        )  # fmt: skip
    return _shaped(found, ids, return_tail)


def _ids_of(ids, like, of, temperature, shift, return_tail, backend) -> tuple[Tensor, str]:
    """(the ids of each row, the backend), checked."""
    _checks.positive("temperature", temperature)
    _checks.flag("shift", shift)
    _checks.flag("return_tail", return_tail)
    _checks.one_of("backend", backend, _checks.BACKENDS)
    _checks.token_ids("ids", ids)
    _checks.rows_of_ids(ids, like, of)
    if shift:
        _checks.shift_shape(like, of)
        ids = torch.cat([ids[..., 1:, :], torch.full_like(ids[..., :1, :], -1)], -2)
    return ids, _checks.backend(backend, like)


def _shaped(found, ids: Tensor, return_tail: bool) -> Tensor | tuple[Tensor, Tensor]:
    log_q, log_tail = found[0].view(ids.shape), found[1].view(ids.shape[:-1])
    return (log_q, log_tail) if return_tail else log_q


def teacher_topk(
    logits: Tensor,
    k: int,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    tail: str = "bucket",
    backend: str = "auto",
) -> SparseTeacher:
    """The k largest log-probabilities of a teacher's logits ``[..., V]``, for caching them or for
    comparing with the whole.

    Args:
        labels: ``[...]`` int64 or int32, the columns whose log-probabilities go into
            ``label_log_probs``; a label outside of the vocabulary, such as -100, gets -inf. For a
            loss with ``shift=True`` they are the next tokens, ``torch.roll(tokens, -1, -1)``.
        temperature: that of the loss; where it is not 1, ``log_z`` is filled in.
        tail: of the result, which may be changed later: ``dataclasses.replace(teacher,
            tail="uniform")``.

    Nothing of the size of the logits is made; without a gradient.
    """
    _checks.logits("logits", logits)
    _checks.integer("k", k, "20")
    _checks.positive("temperature", temperature)
    V = logits.shape[-1]
    if not 1 <= k <= V:
        raise ValueError(f"k must be from 1 to the vocabulary of {V}, got {k}; pass fewer")
    logits = logits.detach()
    ids = wanted = logits.topk(k, dim=-1).indices
    if labels is not None:
        _checks.rows(labels, None, False, logits, "logits")
        labels = torch.where((labels < 0) | (labels >= V), -1, labels.long())
        wanted = torch.cat([ids, labels[..., None]], -1)

    def at(temperature):
        options = dict(temperature=temperature, backend=backend, return_tail=False)
        return log_probs_at(logits, wanted, **options)

    log_probs, log_z = at(1.0), None
    if temperature != 1:
        top = logits.gather(-1, ids[..., :1]).to(log_probs.dtype)
        log_z = [top - log_probs[..., :1], top / temperature - at(temperature)[..., :1]]
        log_z = torch.cat(log_z, -1)
    at_label = None if labels is None else log_probs[..., k]
    return SparseTeacher(ids, log_probs[..., :k], tail=tail, log_z=log_z, label_log_probs=at_label)


def union_ids(student_logits: Tensor, teacher: Tensor | SparseTeacher, k: int) -> Tensor:
    """The columns ``[..., 2 k]`` int64 of the k largest of either model, for losses whose terms are
    weighted with the student's probabilities (reverse KL, DRKL): where the student puts its mass is
    where they need the teacher. One that both have stands once, with -1 in its other place.

    Args:
        student_logits: ``[..., V]``.
        teacher: logits ``[..., V]``, or a SparseTeacher of at least k entries, whose ids count.
            What is then missing are its log-probabilities of the student's columns: ask the server
            for those ids.
    """
    _checks.logits("student_logits", student_logits)
    _checks.integer("k", k, "20")
    if isinstance(teacher, SparseTeacher):
        _checks.cells_of(teacher, student_logits, "student_logits")
        there = torch.where(teacher.ids < 0, float("-inf"), teacher.log_probs)
        theirs = teacher.ids.long().gather(-1, there.topk(k, dim=-1).indices)
    else:
        _checks.logits_pair(student_logits, teacher.detach(), "truncate")
        theirs = teacher.topk(k, dim=-1).indices
    ours = student_logits.detach().topk(k, dim=-1).indices
    again = (theirs[..., :, None] == ours[..., None, :]).any(-1)
    return torch.cat([ours, torch.where(again, -1, theirs)], -1)


def sampled_teacher(ids: Tensor) -> SparseTeacher:
    """A teacher of whom samples are known: ids ``[..., S]`` drawn from p (-1: none), each with the
    weight 1 / S, in place of its log-probabilities (random sampling KD, arXiv 2503.16870).

    With forward KL the gradient is that of the whole teacher in expectation; its variance goes with
    1 / S. The value is not: it lacks p's entropy. Other divergences of samples have no such
    meaning.
    """
    _checks.token_ids("ids", ids)
    ids, _ = ids.long().sort(dim=-1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    # the place of the next first one, from the right
    S = ids.shape[-1]
    place = torch.where(first, torch.arange(S, device=ids.device), S)
    following = torch.cat([place[..., 1:], torch.full_like(place[..., :1], S)], -1)
    following = following.flip(-1).cummin(-1).values.flip(-1)
    count = following - torch.arange(S, device=ids.device)
    total = (ids >= 0).sum(-1, keepdim=True)
    there = first & (ids >= 0)
    log_probs = torch.where(there, count, 1).log() - total.clamp_min(1).log()
    return SparseTeacher(
        torch.where(there, ids, -1), torch.where(there, log_probs, float("-inf")), tail="drop"
    )

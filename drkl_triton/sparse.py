"""Teachers that come as a few log-probabilities a token: what is known of them, and how it is read.

docs/sparse-teachers.md says where such teachers come from and what is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import _checks

__all__ = ["SparseTeacher"]


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """A teacher of which K log-probabilities a token are known; it takes the place of teacher
    logits in every loss, ``drkl(student_logits, SparseTeacher(ids, log_probs), labels)``, and is
    passed as ``teacher_logits`` to the losses from hidden states.

    The vocabulary is cut into cells: one for each of the K columns, and with ``tail="bucket"`` one
    for all others together. A loss is that of the two distributions over the cells, and so a lower
    bound of the one over the vocabulary.

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
              no divergence: it may be negative, and reverse KL then falls when the student moves its
              mass off the K columns. For forward KL from samples, whose frequencies sum to 1, it is
              exact.
            - ``"uniform"``: spread evenly over all other columns. Slower: the teacher's logits are
              written out, a slice of the rows at a time.
        normalised: whether ``log_probs`` are log-probabilities of the whole vocabulary at
            temperature 1. False: logits, known up to a number a row, as they are after a
            renormalisation over K; the tail's mass is then known through ``log_z`` alone, and
            without it ``tail`` must be ``"renormalise"``.
        log_z: the teacher's log-partition, which says what its K columns are at another temperature.
            With ``normalised`` ``[..., 2]``: the logsumexp of its logits at temperature 1, and of
            its logits over the loss's temperature. Without, ``[...]``: the latter.
        label_log_probs: ``[...]``: the teacher's log-probability of the label, which gives the
            label a cell of its own where it is not among the ids. Losses that need a label (DRKL,
            DKD) need its cell; a label outside of the cells is an error on the CPU, NaN on a GPU.
            Under ``shift`` it lies where the ids do, at the row that is scored with the label.

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

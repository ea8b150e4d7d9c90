"""What producers of log-probabilities write, as SparseTeacher. No producer is imported.

A *row* is a position of the student's logits: row t says what is known of token t + 1, as
``shift=True`` scores it. Servers list the log-probabilities of a prompt by the token that they are
of, with None first: from those lists row t takes position t + 1, and the last row, of which nothing
is known, has no entry. What comes as tensors by row stays in its place. All results have ids int64
(-1: no entry) and log-probabilities float32, unless they came as tensors, of temperature 1.

The forms are those that the projects' documentation and sources had in November 2026.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sparse import SparseTeacher

__all__ = [
    "axolotl",
    "distillkit",
    "distillkit_parquet",
    "nemo_rl",
    "sglang_logprobs",
    "tinker_prompt_logprobs",
    "trl_server",
    "verl",
    "vllm_prompt_logprobs",
]

INF = float("inf")
ROUNDING = 1e-3  # what 16-bit storage makes of a log-probability of 0

Pairs = list[tuple[int, float]]


def vllm_prompt_logprobs(
    prompt_logprobs: Sequence, prompt_token_ids: Sequence | None = None, *, tail: str = "bucket"
) -> SparseTeacher:
    """vLLM's ``prompt_logprobs``, of one sequence (``[T, K]``) or of a list of them
    (``[B, T, K]``, the shorter ones followed by rows without an entry).

    Each is a list by position: None, then mappings of ids to log-probabilities (numbers, objects
    with ``logprob``, or what they are in JSON, ids as strings included). There are K or K + 1 in a
    mapping: the prompt's own token is added where it is not among the K largest. The
    log-probabilities of prompts are at temperature 1, whatever the request's is.

    Args:
        prompt_token_ids: the sequence, or the list of them; fills ``label_log_probs``.
    """

    def pairs(entry: Mapping, where: str) -> Pairs:
        if not isinstance(entry, Mapping):
            raise _error(where, entry, "a mapping of ids to log-probabilities, or None")
        return [(_id(i, where), _logprob(x, where)) for i, x in entry.items()]

    return _of_prompts(prompt_logprobs, prompt_token_ids, pairs, tail)


def sglang_logprobs(
    input_logprobs: Sequence, input_ids: Sequence | None = None, *, tail: str = "bucket"
) -> SparseTeacher:
    """SGLang's ``input_top_logprobs`` or ``input_token_ids_logprobs``, of one sequence or of a list
    of them: by position None, then lists of ``[logprob, id, text]``. As
    :func:`vllm_prompt_logprobs`.
    """

    def pairs(entry: Sequence, where: str) -> Pairs:
        return [(_id(x[1], where), _logprob(x[0], where)) for x in _list(entry, where)]

    return _of_prompts(input_logprobs, input_ids, pairs, tail)


def tinker_prompt_logprobs(
    topk_prompt_logprobs: Sequence, token_ids: Sequence | None = None, *, tail: str = "bucket"
) -> SparseTeacher:
    """Tinker's ``topk_prompt_logprobs``: by position None, then lists of ``(id, logprob)``. As
    :func:`vllm_prompt_logprobs`.
    """

    def pairs(entry: Sequence, where: str) -> Pairs:
        return [(_id(x[0], where), _logprob(x[1], where)) for x in _list(entry, where)]

    return _of_prompts(topk_prompt_logprobs, token_ids, pairs, tail)


def trl_server(
    logprobs: Sequence | Tensor, token_ids: Sequence | Tensor, *, tail: str = "bucket"
) -> SparseTeacher:
    """The ``logprobs`` and ``logprob_token_ids`` [B, T, K] of TRL's vLLM server, padded with -inf.

    Row t is of the completion's token t: of the student's logits take those from the last token of
    the prompt to the last but one.
    """
    log_probs = _tensor(logprobs, torch.float32)
    ids = _tensor(token_ids, torch.int64)
    _same(log_probs, ids, "logprobs", "token_ids")
    return SparseTeacher(torch.where(log_probs == -INF, -1, ids), log_probs, tail=tail)


def axolotl(rows: Sequence) -> SparseTeacher:
    """Lists ``[T]`` of ``{"token": "token_id:123", "logprob": x}``, as axolotl's KD datasets have
    them. They are renormalised over the K entries, so that nothing is known of the tail: the result
    has ``tail="renormalise"``, and takes any temperature. Each row stays in its place.
    """
    found = []
    for t, row in enumerate(rows):
        where, pairs = f"row {t}", []
        for entry in _list(row, f"row {t}"):
            token = str(entry["token"])
            if not token.startswith("token_id:"):
                raise _error(where, token, 'tokens written as "token_id:123"')
            pairs.append((_id(token.removeprefix("token_id:"), where), float(entry["logprob"])))
        found.append(pairs)
    ids, log_probs = _padded([found])
    return SparseTeacher(ids[0], log_probs[0], tail="renormalise", normalised=False)


def nemo_rl(
    teacher_topk_logits: Tensor, teacher_topk_indices: Tensor, log_z: Tensor | None = None
) -> SparseTeacher:
    """NeMo-RL's ``teacher_topk_logits`` and ``teacher_topk_indices`` [B, T, K]: raw logits and
    columns of the whole vocabulary. With ``log_z`` [B, T], the logsumexp of the teacher's logits
    over the loss's temperature, the tail is a cell; without it both sides are renormalised, which
    is what NeMo-RL does.
    """
    _same(teacher_topk_logits, teacher_topk_indices, "logits", "indices")
    tail = "renormalise" if log_z is None else "bucket"
    return SparseTeacher(
        teacher_topk_indices, teacher_topk_logits, tail=tail, normalised=False, log_z=log_z
    )


def verl(
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    mask: Tensor | None = None,
    *,
    tail: str = "bucket",
) -> SparseTeacher:
    """verl's ``teacher_topk_log_probs`` and ids [B, S, K], padded with log-probabilities of 0.0.

    Args:
        mask: ``[B, S]``, the rows that are no padding. In those that are, and without a mask
            everywhere, a log-probability of exactly 0 is taken for padding where the row has
            another entry: no two columns have probability 1.
    """
    log_probs, ids = teacher_topk_log_probs, teacher_topk_ids
    _same(log_probs, ids, "log-probabilities", "ids")
    if mask is not None and mask.shape != ids.shape[:-1]:
        raise _error("mask", tuple(mask.shape), f"one value a row, {tuple(ids.shape[:-1])}")
    pad = (log_probs == 0) & ((log_probs != -INF).sum(-1, keepdim=True) > 1)
    if mask is not None:
        pad = pad | ~mask.bool()[..., None]
    return SparseTeacher(ids.masked_fill(pad, -1), log_probs.masked_fill(pad, -INF), tail=tail)


def distillkit(
    token_ids: Sequence | Tensor, top_values: Sequence | Tensor, *, tail: str = "bucket"
) -> SparseTeacher:
    """A sequence of DistillKit's datasets: its columns ``token_ids`` and ``top_values`` [T - 1, K],
    log-probabilities of the whole vocabulary. They start at the second token, so that row t is in
    its place; the last row of ``[T, K]`` has no entry.
    """
    log_probs = _tensor(top_values, torch.float32)
    ids = _tensor(token_ids, torch.int64)
    _same(log_probs, ids, "top_values", "token_ids")
    ids = torch.cat([ids, torch.full_like(ids[:1], -1)])
    log_probs = torch.cat([log_probs, torch.full_like(log_probs[:1], -INF)])
    return SparseTeacher(ids, log_probs, tail=tail)


def distillkit_parquet(path: str | Path, *, tail: str = "bucket") -> list[SparseTeacher]:
    """:func:`distillkit` of every sequence of a parquet file, which needs pyarrow."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("reading parquet files needs pyarrow; pip install pyarrow") from error
    table = parquet.read_table(path, columns=["token_ids", "top_values"]).to_pydict()
    columns = zip(table["token_ids"], table["top_values"], strict=True)
    return [distillkit(ids, values, tail=tail) for ids, values in columns]


# --- lists by position ---


def _of_prompts(prompts: Sequence, tokens: Sequence | None, pairs, tail: str) -> SparseTeacher:
    """Of one list by position or of several; pairs(entry, where) of a position that is not None."""
    if not isinstance(prompts, Sequence) or len(prompts) == 0:
        raise _error("the prompt", prompts, "a list by position, None first")
    # of a batch the elements are lists whose first elements are None
    batch = isinstance(prompts[0], Sequence) and len(prompts[0]) > 0 and prompts[0][0] is None
    sequences = list(prompts) if batch else [prompts]
    rows = []
    for b, sequence in enumerate(sequences):
        found = []
        for t, entry in enumerate(sequence[1:], 1):
            where = f"position {t}" + f" of sequence {b}" * batch
            found.append([] if entry is None else pairs(entry, where))
        rows.append([*found, []])
    ids, log_probs = _padded(rows)
    at_label = None
    if tokens is not None:
        tokens = list(tokens) if batch else [tokens]
        lengths = [len(x) for x in tokens], [len(x) for x in sequences]
        if lengths[0] != lengths[1]:
            raise _error("the token ids", lengths[0], f"a token a position, {lengths[1]} of them")
        at_label = torch.full(ids.shape[:-1], -INF)
        for b, sequence in enumerate(tokens):
            for t, token in enumerate(sequence[1:]):
                at_label[b, t] = dict(rows[b][t]).get(int(token), -INF)
    if not batch:
        ids, log_probs = ids[0], log_probs[0]
        at_label = None if at_label is None else at_label[0]
    return SparseTeacher(ids, log_probs, tail=tail, label_log_probs=at_label)


def _padded(rows: list[list[Pairs]]) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) [B, T, K]."""
    T = max((len(x) for x in rows), default=0)
    K = max((len(pairs) for x in rows for pairs in x), default=0)
    ids = torch.full((len(rows), T, max(K, 1)), -1)
    log_probs = torch.full(ids.shape, -INF)
    for b, sequence in enumerate(rows):
        for t, pairs in enumerate(sequence):
            if pairs:
                found, values = zip(*pairs, strict=True)
                ids[b, t, : len(pairs)] = torch.tensor(found)
                log_probs[b, t, : len(pairs)] = torch.tensor(values, dtype=torch.float32)
    ids[log_probs == -INF] = -1
    return ids, log_probs


def _id(value: Any, where: str) -> int:
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value) or number < 0:
            raise ValueError
    except (TypeError, ValueError):
        raise _error(where, value, "token ids that are integers of at least 0") from None
    return number


def _logprob(value: Any, where: str) -> float:
    if isinstance(value, Mapping):
        value = value.get("logprob")
    value = getattr(value, "logprob", value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _error(where, value, "a log-probability") from None
    if math.isnan(number) or number > ROUNDING:
        raise _error(where, number, "log-probabilities, in nats, of at most 0")
    return number


def _list(entry: Any, where: str) -> Iterable:
    if not isinstance(entry, Sequence) or isinstance(entry, str):
        raise _error(where, entry, "a list of entries, or None")
    return entry


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)


def _same(x: Tensor, y: Tensor, name: str, other: str) -> None:
    if x.shape != y.shape:
        raise _error(name, tuple(x.shape), f"the shape of the {other}, {tuple(y.shape)}")


def _error(where: str, got: Any, expected: str) -> ValueError:
    text = repr(got)
    text = text if len(text) < 80 else text[:77] + "..."
    return ValueError(f"{where}: expected {expected}, got {text}; check which field was passed")

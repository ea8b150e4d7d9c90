"""What producers of log-probabilities write, as SparseTeacher. No producer is imported.

A *row* is a position of the student's logits: row t says what is known of token t + 1, as
``shift=True`` scores it. Servers list the log-probabilities of a prompt by the token that they are
of, with None first: from those lists row t takes position t + 1, and the last row, of which nothing
is known, has no entry. What comes by row stays in its place. All results have ids int64 (-1: no
entry, at log-probability -inf) and log-probabilities float32, unless they came as tensors, of
temperature 1. The losses ignore rows without an entry.

What no producer writes is a ValueError that names its place: ids that are no integers, NaN,
log-probabilities above 0, lengths that do not fit. Tensors on a GPU are not looked into.

The forms are those that the projects' documentation and sources had in November 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
NEVER = -9999.0  # and below: -inf, in the JSON of vLLM's server and in axolotl's padding

Pairs = list[tuple[int, float]]


def vllm_prompt_logprobs(
    prompt_logprobs: Sequence, prompt_token_ids: Sequence | None = None, *, tail: str = "bucket"
) -> SparseTeacher:
    """vLLM's ``prompt_logprobs``, of one sequence (``[T, K]``) or of a list of them
    (``[B, T, K]``, the shorter ones followed by rows without an entry).

    Each is a list by position: None, then mappings of ids to log-probabilities (numbers, objects
    with ``logprob``, or what they are in JSON, ids as strings and -9999.0 for -inf included). There
    are K or K + 1 in a mapping: the prompt's own token is added where it is not among the K
    largest. The log-probabilities of prompts are at temperature 1, whatever the request's is.

    Args:
        prompt_token_ids: the sequence, or the list of them; fills ``label_log_probs``.
    """

    def pairs(entry: Mapping, where: str) -> Pairs:
        if not isinstance(entry, Mapping):
            raise _error(where, entry, "a mapping of ids to log-probabilities, or None")
        return [(_id(i, where), _logprob(x, where)) for i, x in entry.items()]

    return _of_prompts(prompt_logprobs, pairs, tail, prompt_token_ids, None)


def sglang_logprobs(
    input_logprobs: Sequence,
    input_ids: Sequence | None = None,
    *,
    input_token_logprobs: Sequence | None = None,
    tail: str = "bucket",
) -> SparseTeacher:
    """SGLang's ``input_top_logprobs`` or ``input_token_ids_logprobs``, of one sequence or of a list
    of them: by position None, then lists of ``[logprob, id, text]``. As
    :func:`vllm_prompt_logprobs`.

    Args:
        input_token_logprobs: the field of that name, which has the label's log-probability where it
            is not among the K, too; fills ``label_log_probs``. With ``input_ids`` alone such labels
            have none.
    """
    pairs = _entries(1, 0)
    return _of_prompts(input_logprobs, pairs, tail, input_ids, input_token_logprobs)


def tinker_prompt_logprobs(
    topk_prompt_logprobs: Sequence,
    token_ids: Sequence | None = None,
    *,
    prompt_logprobs: Sequence | None = None,
    tail: str = "bucket",
) -> SparseTeacher:
    """Tinker's ``topk_prompt_logprobs``: by position None, then lists of ``(id, logprob)``. As
    :func:`sglang_logprobs`, with ``prompt_logprobs`` the response's log-probabilities of the tokens
    themselves.
    """
    return _of_prompts(topk_prompt_logprobs, _entries(0, 1), tail, token_ids, prompt_logprobs)


def trl_server(
    logprobs: Sequence | Tensor,
    token_ids: Sequence | Tensor,
    actual_logprobs: Sequence | Tensor | None = None,
    *,
    tail: str = "bucket",
) -> SparseTeacher:
    """The ``logprobs`` and ``logprob_token_ids`` [B, T, K] of TRL's vLLM server, padded with -inf;
    of ``get_sequence_logprobs`` as they are, with T as long as each completion.

    Row t is of the completion's token t: of the student's logits take those from the last token of
    the prompt to the last but one, ``logits[:, prompt_length - 1 : -1]``, and no ``shift``.

    Args:
        actual_logprobs: the field of that name, [B, T, 1] or [B, T]; fills ``label_log_probs``.
    """
    ids, log_probs = _cells(token_ids, logprobs, "token_ids", "logprobs")
    if actual_logprobs is not None:
        lengths = [len(x) for x in logprobs]
        actual_logprobs = _of_tokens(actual_logprobs, lengths, "actual_logprobs", True, 0)
        actual_logprobs = actual_logprobs.to(ids.device)
    return _teacher(ids, log_probs, tail=tail, label_log_probs=actual_logprobs)


def axolotl(rows: Sequence, *, length: int | None = None) -> SparseTeacher:
    """Lists ``[T]`` of ``{"token": "token_id:123", "logprob": x}``, as axolotl's KD datasets have
    them: entry t is of the t-th of the last T tokens, which is of the completion. They are
    renormalised over the K entries, so that nothing is known of the tail: the result has
    ``tail="renormalise"``, and takes any temperature.

    Args:
        length: how many tokens the sequence has, at least T; the result is ``[length, K]``, and
            lines up with its logits under ``shift``. Without it row t is entry t, for logits from
            the token before the completion to the last but one, without ``shift``.
    """
    found = []
    for t, row in enumerate(rows):
        where, pairs = f"row {t}", []
        for entry in [] if row is None else _list(row, where):
            token = str(entry.get("token") if isinstance(entry, Mapping) else entry)
            if not token.startswith("token_id:"):
                raise _error(where, entry, 'tokens written as "token_id:123"')
            pairs.append((_id(token.removeprefix("token_id:"), where), _logprob(entry, where)))
        found.append(pairs)
    if length is not None:
        if length < len(found):
            raise _error("length", length, f"at least the {len(found)} rows")
        found = [*[[]] * (length - len(found)), *found, []][1:]
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
    more = dict(tail=tail, normalised=False, log_z=log_z)
    return _teacher(teacher_topk_indices, teacher_topk_logits, **more)


def verl(
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    mask: Tensor | None = None,
    *,
    tail: str = "bucket",
) -> SparseTeacher:
    """verl's ``teacher_topk_log_probs`` and ids [B, S, K], padded with log-probabilities of 0.0.

    Log-probabilities of exactly 0 are padding where a row has several, or where its others add up
    to something: no two columns have probability 1. One beside others that are next to nothing is
    what a teacher that is sure of a column rounds to, and stays.

    Args:
        mask: ``[B, S]``, the rows that are no padding; the others have no entry. With K = 1 the
            mask alone tells them.
    """
    log_probs, ids = teacher_topk_log_probs, teacher_topk_ids
    _same(log_probs, ids, "log-probabilities", "ids")
    zero = log_probs == 0
    others = log_probs.float().masked_fill(zero, -INF).logsumexp(-1, keepdim=True)
    pad = zero & ((zero.sum(-1, keepdim=True) > 1) | (others > math.log(ROUNDING)))
    if mask is not None:
        if mask.shape != ids.shape[:-1]:
            raise _error("mask", tuple(mask.shape), f"one value a row, {tuple(ids.shape[:-1])}")
        pad = pad | ~mask.bool()[..., None]
    return _teacher(ids, log_probs.masked_fill(pad, -INF), tail=tail)


def distillkit(
    token_ids: Sequence | Tensor, top_values: Sequence | Tensor, *, tail: str = "bucket"
) -> SparseTeacher:
    """A sequence of DistillKit's datasets: its columns ``token_ids`` and ``top_values`` [T - 1, K],
    log-probabilities of the whole vocabulary. They start at the second token, so that row t is in
    its place; the last row of ``[T, K]`` has no entry.
    """
    ids, log_probs = (
        [x] if isinstance(x, Sequence) else torch.as_tensor(x)[None]
        for x in (token_ids, top_values)
    )
    ids, log_probs = _cells(ids, log_probs, "token_ids", "top_values")
    ids = torch.nn.functional.pad(ids[0], (0, 0, 0, 1), value=-1)
    log_probs = torch.nn.functional.pad(log_probs[0], (0, 0, 0, 1), value=-INF)
    return _teacher(ids, log_probs, tail=tail)


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


def _of_prompts(
    prompts: Sequence, pairs: Callable, tail: str, tokens: Sequence | None, own: Sequence | None
) -> SparseTeacher:
    """Of one list by position or of several; pairs(entry, where) of a position that is not None,
    own: the tokens' own log-probabilities."""

    def begins(x: Any) -> bool:  # flat lists of vLLM have empty mappings for None
        return isinstance(x, Sequence) and len(x) > 0 and x[0] in (None, {})

    batch = isinstance(prompts, Sequence) and len(prompts) > 0 and begins(prompts[0])
    sequences, tokens, own = (x if batch or x is None else [x] for x in (prompts, tokens, own))
    rows = []
    for b, sequence in enumerate(sequences):
        if not begins(sequence):
            name = f"sequence {b}" if batch else "the prompt"
            raise _error(name, sequence, "a list by position, None first")
        positions = [(x, _at(t, b, batch)) for t, x in enumerate(sequence)][1:]
        rows.append([*([] if x is None else pairs(x, where) for x, where in positions), []])
    ids, log_probs = _padded(rows)
    lengths = [len(x) for x in sequences]
    if own is None and tokens is not None:
        _lengths(tokens, lengths, "the token ids")
        own = [
            [None] + [dict(reversed(row)).get(int(i)) for i, row in zip(x[1:], r[:-1], strict=True)]
            for x, r in zip(tokens, rows, strict=True)
        ]
    if own is not None:
        own = _of_tokens(own, lengths, "the tokens' log-probabilities", batch, 1)
    if not batch:
        ids, log_probs, own = ids[0], log_probs[0], None if own is None else own[0]
    return SparseTeacher(ids, log_probs, tail=tail, label_log_probs=own)


def _of_tokens(values: Any, lengths: list[int], name: str, batch: bool, first: int) -> Tensor:
    """[B, T] of what there is by position, from ``first``: numbers, None, or what begins so."""
    values = values if isinstance(values, Sequence) else values.tolist()
    _lengths(values, lengths, name)
    found = torch.full((len(lengths), max(lengths)), -INF)
    for b, sequence in enumerate(values):
        for t, x in enumerate(sequence[first:]):
            x = x[0] if isinstance(x, Sequence) and len(x) else x
            found[b, t] = -INF if x is None else _logprob(x, _at(t + first, b, batch))
    return found


def _entries(id_at: int, logprob_at: int) -> Callable[[Any, str], Pairs]:
    """The pairs of a list of entries that hold an id and a log-probability at these places."""

    def pairs(entry: Any, where: str) -> Pairs:
        for x in _list(entry, where):
            if len(_list(x, where)) < 2:
                raise _error(where, x, "lists of an id and a log-probability")
        return [(_id(x[id_at], where), _logprob(x[logprob_at], where)) for x in entry]

    return pairs


def _cells(ids: Any, log_probs: Any, name: str, other: str) -> tuple[Tensor, Tensor]:
    """Tensors or arrays, or lists [B][T][K], of which the shorter ones are padded."""
    if not isinstance(ids, Sequence) or not isinstance(log_probs, Sequence):
        ids, log_probs = torch.as_tensor(ids), torch.as_tensor(log_probs)
        _same(log_probs, ids, other, name)
        return ids, log_probs

    def both(x: Any, y: Any, where: str) -> zip:
        if len(_list(x, where)) != len(_list(y, where)):
            raise _error(where, (len(y), len(x)), f"{other} to have the shape of the {name}")
        return zip(x, y, strict=True)

    rows = []
    for b, sequence in enumerate(both(ids, log_probs, "the batch")):
        rows.append([])
        for t, position in enumerate(both(*sequence, f"sequence {b}")):
            where = _at(t, b, True)
            rows[b].append([(_id(i, where), _logprob(x, where)) for i, x in both(*position, where)])
    return _padded(rows)


def _padded(rows: list[list[Pairs]]) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) [B, T, K]."""
    if not rows:
        raise _error("the batch", rows, "at least one sequence")
    T = max(len(x) for x in rows)
    K = max((len(pairs) for x in rows for pairs in x), default=0) or 1
    no = (-1, -INF)
    cells = [[[*r, *[no] * (K - len(r))] for r in [*x, *[[]] * (T - len(x))]] for x in rows]
    cells = torch.tensor(cells, dtype=torch.float64).reshape(len(rows), T, K, 2)
    ids, log_probs = cells[..., 0].long(), cells[..., 1].float()
    return ids.masked_fill(log_probs == -INF, -1), log_probs


def _teacher(ids: Tensor, log_probs: Tensor, *, normalised: bool = True, **more) -> SparseTeacher:
    """Of tensors: absent entries are so in both, and what is on the CPU is looked into."""
    absent = (ids == -1) | (log_probs == -INF)
    if ids.device.type == "cpu":
        top = ROUNDING if normalised else torch.finfo(log_probs.dtype).max
        wrong = ~absent & ((ids < 0) | ~(log_probs <= top))
        if wrong.any():
            *row, k = wrong.nonzero()[0].tolist()
            got = tuple(x[(*row, k)].item() for x in (ids, log_probs))
            what = "log-probabilities of at most 0" if normalised else "logits"
            raise _error(f"row {row}, entry {k}", got, f"ids of at least 0, or -1, and {what}")
    ids, log_probs = ids.masked_fill(absent, -1), log_probs.masked_fill(absent, -INF)
    return SparseTeacher(ids, log_probs, normalised=normalised, **more)


def _at(t: int, b: int, batch: bool) -> str:
    return f"position {t}" + f" of sequence {b}" * batch


def _id(value: Any, where: str) -> int:
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value) or not 0 <= number < 2**31:
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
    return number if number > NEVER else -INF


def _list(entry: Any, where: str) -> Sequence:
    if not isinstance(entry, Sequence) or isinstance(entry, str):
        raise _error(where, entry, "a list of entries, or None")
    return entry


def _lengths(values: Sequence, lengths: list[int], name: str) -> None:
    got = [len(x) for x in values]
    if got != lengths:
        raise _error(name, got, f"a token a position, {lengths} of them")


def _same(x: Tensor, y: Tensor, name: str, other: str) -> None:
    if x.shape != y.shape:
        raise _error(name, tuple(x.shape), f"the shape of the {other}, {tuple(y.shape)}")


def _error(where: str, got: Any, expected: str) -> ValueError:
    text = repr(got)
    text = text if len(text) < 80 else text[:77] + "..."
    return ValueError(f"{where}: expected {expected}, got {text}; check which field was passed")

"""A vocabulary shared over the ranks of a process group: the launchers of a backend over this
rank's columns, with the sums of all.

A row's sums merge from any sets of columns (facts.Sums), so a rank walks its own, and a maximum and
a sum over the ranks make the table that one process would have. From there every rank computes the
same numbers from the same table, to the same bits, and the gradient of its own columns.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import facts
from .algebra import AT, SUMS, moved
from .facts import ELSEWHERE, IGNORED, INVALID

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

INF = float("inf")
# Of the table, with MAX: what is relative to nothing. The others are added up.
LARGEST = [AT.m_s, AT.m_t, AT.s_label, AT.t_label, AT.care]
ADDED = [AT.d_s, AT.a, AT.h, AT.d_t, AT.b, AT.g, AT.c]
NEEDED_FOR = [0, facts.REVERSE, facts.ENTROPY, facts.TEACHER, facts.FORWARD,
              facts.TEACHER_ENTROPY, facts.UNTEMPERED]  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """This rank's columns first ... first + width - 1 of a vocabulary."""

    group: ProcessGroup
    first: int
    width: int
    vocabulary: int
    widest: int  # of the ranks' widths
    key: str  # by which the ops find it

    def labels(self, codes: Tensor) -> Tensor:
        """Codes of the vocabulary's columns as those of this rank's."""
        own = (codes >= self.first) & (codes < self.first + self.width)
        return torch.where(own, codes - self.first, torch.where(codes >= 0, ELSEWHERE, codes))

    def columns(self, columns: Tensor, *values: Tensor) -> list[Tensor]:
        """Columns [N, K] as this rank's, int32, ascending, ``width`` where they are another's; and
        values [N, K] in that order.
        """
        local = columns.long() - self.first
        local = torch.where((local >= 0) & (local < self.width), local, self.width)
        local, order = local.sort(dim=1, stable=True)
        return [local.int(), *(x.gather(1, order) for x in values)]

    # --- collectives ---

    def start(self, x: Tensor, op: str = "SUM") -> Callable[[], None]:
        """Begin to reduce x over the ranks, in place; what is returned waits for the result."""
        meeting = _meeting(self.group)
        return partial(meeting.finish, meeting.start(x, op))

    def reduce(self, x: Tensor, op: str = "SUM") -> Tensor:
        """x, over the ranks, in place."""
        self.start(x, op)()
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the ranks, +inf where one has NaN: libraries disagree on its order, and
        to a row of logits it is the same.
        """
        return self.reduce(torch.where(x.isnan(), INF, x), "MAX")


class Sharded:
    """The launchers of ``module``, over a shard. Labels are the shard's, other columns are the
    vocabulary's; the number of columns that is passed is the shard's width.
    """

    def __init__(self, module: Any, shard: Shard):
        self.module, self.shard = module, shard

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def row_sums(self, student, teacher, label, inv_temperature, V, *, needs, **options) -> Tensor:
        acc, unread = inv_temperature.dtype, (label == IGNORED) | (label == INVALID)
        if V:
            rows = student, teacher, label, inv_temperature, V
            own = self.module.row_sums(*rows, needs=needs, **options)
        else:
            own = torch.zeros((SUMS, label.numel()), dtype=acc, device=label.device)
            own[[AT.m_s, AT.m_t]] = torch.finfo(acc).min
            own[[AT.s_label, AT.t_label]] = -INF
            own[:, unread] = 0.0
        # NaN travels in the sums; where there is nothing, the maximum may be anything
        for m, d, at_label in (AT.m_s, AT.d_s, AT.s_label), (AT.m_t, AT.d_t, AT.t_label):
            bad = own[m].isnan() | own[at_label].isnan()
            own[m] = torch.where((bad | (own[d] == 0)) & ~unread, torch.finfo(acc).min, own[m])
            own[d] = torch.where(bad, float("nan"), own[d])
            own[at_label] = torch.where(bad, -INF, own[at_label])
        out = torch.zeros_like(own)
        out[LARGEST] = self.shard.reduce(own[LARGEST], "MAX")
        parts = moved(own, out[AT.m_s], out[AT.m_t], inv_temperature)
        pairs = zip(ADDED, NEEDED_FOR, parts, strict=True)
        wanted = [(at, x) for at, bit, x in pairs if not bit or needs & bit]
        out[[at for at, _ in wanted]] = self.shard.reduce(torch.stack([x for _, x in wanted]))
        return out

    def row_sum_parts(self, *rows, **options) -> Tensor:
        return self.row_sums(*rows, **options)[None]

    def row_phi(
        self, student, teacher, label, inv_temperature, parameters, sums, V, **options
    ) -> None:
        found = sums.clone()
        found[[AT.phi, AT.phi_slope]] = 0.0
        if V:
            rows = student, teacher, label, inv_temperature, parameters
            self.module.row_phi(*rows, found, V, **options)
        sums[AT.phi : AT.phi_slope + 1] = self.shard.reduce(found[AT.phi : AT.phi_slope + 1])

    def row_tail(self, student, columns, label, inv_temperature, V) -> Tensor:
        (local,), acc = self.shard.columns(columns), inv_temperature.dtype
        if V:
            m, d = self.module.row_tail(student, local, label, inv_temperature, V)
        else:
            m = torch.full((label.numel(),), torch.finfo(acc).min, dtype=acc, device=label.device)
            d = torch.zeros_like(m)
        bad = m.isnan()
        d, m = torch.where(bad, float("nan"), d), torch.where(bad, torch.finfo(acc).min, m)
        top = self.shard.reduce(m.clone(), "MAX")
        share = facts.times(d, torch.exp((m - top) * inv_temperature))
        return torch.stack([top, self.shard.reduce(share)])

    def row_grad(
        self, student, teacher, label, inv_temperature, weights, V, *, out=None, **options
    ):
        if V:
            rows = student, teacher, label, inv_temperature, weights, V
            return self.module.row_grad(*rows, out=out, **options)
        if out is not None:
            return out
        shape = label.numel(), student.tensor.shape[-1]
        return student.tensor.new_zeros(shape)


def shard_of(launchers) -> Shard | None:
    """Of launchers that have one."""
    return getattr(launchers, "shard", None)


def vocabulary(launchers, V: int) -> int:
    """The columns of all ranks, where V are here."""
    shard = shard_of(launchers)
    return V if shard is None else shard.vocabulary


def widest(launchers, V: int) -> int:
    """The most columns that a rank has, where V are here."""
    shard = shard_of(launchers)
    return V if shard is None else shard.widest


def part_of(teacher: Tensor | None, shard: Shard, dim: int) -> Tensor | None:
    """This rank's columns of a teacher's logits or matrix that has the whole vocabulary's."""
    if teacher is None or teacher.dim() == 0 or teacher.shape[dim] != shard.vocabulary:
        return teacher
    return teacher.narrow(dim, shard.first, shard.width)


# --- DTensors ---


def _placed(x: Any, dim: int) -> int | None:
    """The dimension of x's mesh over which x is split along ``dim`` and is the same elsewhere."""
    split = [i for i, place in enumerate(x.placements) if place.is_shard(dim % x.dim())]
    whole = [i for i, place in enumerate(x.placements) if place.is_replicate()]
    return split[0] if len(split) == 1 and len(whole) + 1 == len(x.placements) else None


def of_dtensor(name: str, x: Any, dim: int, group: ProcessGroup | None):
    """(this rank's part of a DTensor that is split along ``dim``, the group that has the rest); of
    any other tensor it and ``group``. The gradient is a DTensor of the same placement.
    """
    if not hasattr(x, "device_mesh"):
        return x, group
    at = _placed(x, dim)
    if at is None:
        raise TypeError(
            f"{name} is a DTensor, got placements {x.placements}; split it over the vocabulary "
            f"alone, {name}.redistribute(placements=[Shard(-1)]), pass its full_tensor() where "
            "all processes compute the loss of the same rows, or its to_local() where each has "
            "whole rows of its own"
        )
    own = x.device_mesh.get_group(at)
    if group is not None and group != own:
        raise ValueError(
            f"{name} is a DTensor over another group than group=; leave group out, it is taken "
            "from the DTensor"
        )
    return x.to_local(), own


def own_rows(x: Any, group: ProcessGroup):
    """This rank's part of a matrix [V, H], or bias [V], that is a DTensor split over ``group``."""
    if not hasattr(x, "device_mesh") or _placed(x, 0) is None:
        return x
    own, _ = of_dtensor("a matrix", x, 0, group)
    return own


def teacher_logits(x: Any, group: ProcessGroup | None):
    """A teacher's DTensor as this rank's columns, or, where it is whole on each rank, all."""
    if not hasattr(x, "device_mesh"):
        return x
    if all(place.is_replicate() for place in x.placements):
        return x.to_local()
    return of_dtensor("teacher_logits", x, -1, group)[0]


# --- what the ranks must agree on ---

_shards: dict[str, Shard] = {}  # by the keys that the ops pass on
_lock = threading.Lock()
POLL, PATIENCE = 0.001, 20.0  # seconds
KNOWN = 1024  # of what was agreed on, so many are remembered: all ranks forget the same


class Disagreement(ValueError):
    """What every rank raises."""


def of_key(key: str) -> Shard:
    return _shards[key]


class _Meeting:
    """The announcements of a group's ranks, in the store that torch.distributed keeps."""

    def __init__(self, group: ProcessGroup):
        self.group, self.ranks = group, dist.get_process_group_ranks(group)
        self.rank, self.count, self.known = dist.get_rank(group), 0, {}
        self.current: dict = {}  # what this rank is in the middle of
        self.started = 0  # collectives
        self.travelling: dict = {}  # of them, by number, those not waited for: (work, tensor)
        self.name = f"drkl_triton/{group.group_name}/{'-'.join(map(str, self.ranks))}"
        self.store = dist.PrefixStore(self.name, dist.distributed_c10d._get_default_store())

    def announce(self, said: dict, patience: float = INF) -> list[dict]:
        """What every rank says, once all have said something; nothing, if they do not within so
        many seconds.
        """
        self.count += 1
        waits = {
            number: [[*x.shape], str(x.dtype).removeprefix("torch.")]
            for number, (_, x) in self.travelling.items()
        }
        self.store.set(f"{self.count}/{self.rank}", json.dumps(said | {"_waits": waits}))
        keys = [f"{self.count}/{rank}" for rank in range(len(self.ranks))]
        end = time.monotonic() + patience
        while not self.store.check(keys):
            if time.monotonic() > end:
                return []
            time.sleep(POLL)
        return [json.loads(self.store.get(key)) for key in keys]

    def someone_waits(self) -> bool:
        """Whether another rank has announced what this one has not."""
        others = [rank for rank in range(len(self.ranks)) if rank != self.rank]
        return any(self.store.check([f"{self.count + 1}/{rank}"]) for rank in others)

    def start(self, x: Tensor, op: str = "SUM") -> int:
        """Begin to reduce x in place; the collective's number."""
        self.started += 1
        op = getattr(dist.ReduceOp, op)  # which not every PyTorch has
        work = dist.all_reduce(x, op, group=self.group, async_op=True)
        self.travelling[self.started] = work, x
        return self.started

    def finish(self, number: int) -> None:
        """Wait for a collective. On a CPU it is watched meanwhile: a rank that has called something
        else does not come, and is waiting itself until it is told.
        """
        work, x = self.travelling[number]
        if x.device.type == "cpu":
            self._watch(work)
        work.wait()
        del self.travelling[number]

    def _watch(self, work) -> None:
        start = looked = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            if now - looked > 1.0:
                looked = now
                if self.someone_waits():
                    self.compare(self.announce(self.current))
            if now - start > 2e-4:
                time.sleep(min(POLL, (now - start) / 10))

    def compare(self, said: list[dict]) -> None:
        """An error, on every rank the same, where the ranks say different things."""
        if not (said and (why := _disagreement(said))):
            return
        # Collectives that some wait in must not be left there: they would take what comes next.
        waits = {int(k): x for one in said for k, x in one["_waits"].items()}
        for number in range(self.started + 1, max(waits, default=0) + 1):
            shape, dtype = waits[number]
            self.start(torch.zeros(shape, dtype=getattr(torch, dtype)))
        for work, _ in self.travelling.values():
            work.wait()
        self.travelling.clear()
        raise Disagreement(why)


_meetings: dict[ProcessGroup, _Meeting] = {}


def _meeting(group: ProcessGroup) -> _Meeting:
    if group not in _meetings:
        _meetings[group] = _Meeting(group)
    return _meetings[group]


def _disagreement(said: list[dict]) -> str:
    failed = [(rank, one["error"]) for rank, one in enumerate(said) if "error" in one]
    if failed:
        rank, error = failed[0]
        return f"rank {rank} of the group refuses its arguments: {error}"
    for name in {key: None for one in said for key in one if key[0] != "_"}:
        values = [one.get(name) for one in said]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank} {value!r}" for rank, value in enumerate(values))
            return (
                f"the ranks of the group disagree on {name}: {listed}; every rank must call the "
                "loss with the same rows and options, each with its own columns"
            )
    knew = [one["_knew"] for one in said if "_knew" in one]
    return _wrong_columns([one["_own"] for one in said], knew)


def agree(group: ProcessGroup, said: dict, width: int, first: int | None) -> Shard:
    """The shard of this rank. said: what all must say alike; width: of this rank's columns, from
    ``first`` on or after those of the ranks before. The ranks meet once for each of what they say.
    """
    meeting = _meeting(group)
    said |= {"vocab_start": first is not None}
    own = json.dumps([said, width, first])
    with _lock:
        meeting.current = {**said, "_own": [width, first]}
        if own not in meeting.known:
            everyone = meeting.announce(meeting.current)
            meeting.compare(everyone)
            owns = [one["_own"] for one in everyone]
            shard = _shard_of(group, owns, meeting)
            _shards[shard.key] = shard
            meeting.known[own] = shard, owns
            if len(meeting.known) > KNOWN:
                del meeting.known[next(iter(meeting.known))]
        shard, owns = meeting.known[own]
        meeting.current["_knew"] = owns
        return shard


@contextmanager
def together(group: ProcessGroup):
    """Around a call: when this rank raises an error alone, the others do not wait for it."""
    try:
        yield
    except Disagreement:
        raise
    except Exception as error:
        meeting = _meeting(group)
        said = meeting.announce({"error": f"{type(error).__name__}: {error}"}, PATIENCE)
        try:
            meeting.compare(said)
        except Disagreement:
            pass
        raise


def _firsts(owns: list) -> list[int]:
    """Where each rank's columns begin."""
    given = [first for _, first in owns]
    if given[0] is None:
        return [sum(width for width, _ in owns[:i]) for i in range(len(owns))]
    return given


def _wrong_columns(owns: list, knew: list) -> str:
    end, firsts = 0, _firsts(owns)
    spans = [(first, width) for first, (width, _) in zip(firsts, owns, strict=True) if width]
    for first, width in sorted(spans):
        if first != end:
            return (
                "the ranks' columns must follow one another without a gap or an overlap, got "
                f"vocab_start {firsts} with {[width for width, _ in owns]} columns; check "
                "vocab_start"
            )
        end = first + width
    if end == 0:
        return "no rank of the group has a column of the vocabulary"
    if any(known != owns for known in knew):
        return (
            f"the ranks of the group disagree on their columns (width, vocab_start): {owns}, where "
            f"some know {knew[0]}; every rank must call the loss with its own columns"
        )
    return ""


def _shard_of(group: ProcessGroup, owns: list, meeting: _Meeting) -> Shard:
    first, width = _firsts(owns)[meeting.rank], owns[meeting.rank][0]
    widest, vocabulary = max(width for width, _ in owns), sum(width for width, _ in owns)
    key = f"{meeting.name}/{first}+{width} of {vocabulary}, {widest}"
    return Shard(group, first, width, vocabulary, widest, key)

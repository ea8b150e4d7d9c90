"""What test_shards.py has several processes do: python shard_ranks.py WORLD prints a JSON of
{check: what went wrong, or ""}.

A check is a function of (rank, world); it fails where it does on any rank.
"""

import json
import sys
import tempfile
import time
import traceback
import warnings

import bounds
import losses
import quick_interpreter
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import drkl_triton
from drkl_triton import (
    SparseTeacher,
    _checks,
    _shard,
    divergence,
    linear_divergence,
    log_probs_at,
    objectives,
    slices,
)

INF, NAN = float("inf"), float("nan")
V, H, N = 50, 8, 9
# Where each rank's columns begin: unevenly, and with four ranks the first has none.
CUTS = {2: [0, 7, V], 4: [0, 0, 20, 35, V]}
TAILS = ("bucket", "renormalise", "drop", "uniform")
FEW = ("reverse_kl", "drkl", "js_divergence", "adaptive_kl", "drkl + cross_entropy",
       "drkl (skewed teacher)")  # fmt: skip


def world_group():
    return dist.group.WORLD


def own(world, rank):
    return slice(CUTS[world][rank], CUTS[world][rank + 1])


def rows(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    s = torch.randn(N, V) * 3
    t, labels = s + torch.randn(N, V), torch.randint(0, V, (N,))
    labels[2] = -100
    return s.to(dtype), t.to(dtype), labels, torch.rand(N, dtype=torch.float64) + 0.5


def hidden_states():
    _, t, labels, _ = rows()
    return torch.randn(N, H).double(), torch.randn(V, H).double(), t, labels


def gradient(function, x, teacher, labels, upstream, **options):
    x = x.clone().requires_grad_()
    loss = function(x, teacher, labels, **options)
    if loss.dim() and upstream is not None:
        loss.backward(upstream.to(loss.dtype))
    else:
        loss.backward()
    return loss.detach(), x.grad


def close(ours, right, why="", tolerance=1e-10):
    torch.testing.assert_close(
        ours, right, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{why}: {m}"
    )


def both(world, rank, objective, s, t, labels, upstream=None, why="", **options):
    """A loss of logits here against the same on one process."""
    part = own(world, rank)
    mine = t if t is None or isinstance(t, SparseTeacher) else t[..., part]

    def of(x, teacher, labels, **options):
        return divergence(objective, x, teacher, labels, **options)

    right = gradient(of, s, t, labels, upstream, **options)
    ours = gradient(of, s[..., part], mine, labels, upstream, group=world_group(), **options)
    close(ours[0], right[0], why)
    close(ours[1], right[1][..., part], why)
    return ours[0]


# --- the same as one process ---


def every_loss(rank, world):
    s, t, labels, upstream = rows()
    for name in losses.LOSSES if world == 2 else FEW:
        objective = losses.LOSSES[name].objective()
        both(world, rank, objective, s, t, labels, upstream, name, reduction="none")


def interpreted_kernels(rank, world):
    s, t, labels, upstream = rows()
    known = drkl_triton.teacher_topk(t, 5, labels=labels)
    for name in FEW[1:3]:
        objective = losses.LOSSES[name].objective()
        both(world, rank, objective, s, t, labels, upstream, f"{name}, kernels", reduction="none",
             backend="triton")  # fmt: skip
    both(world, rank, objective, s, known, labels, upstream, reduction="none", backend="triton")


def every_tail(rank, world):
    s, t, labels, upstream = rows()
    for name in FEW[:3] if world == 4 else (*FEW, "forward_kl", "dkd", "js + kl - entropy"):
        for tail in TAILS:
            known = drkl_triton.teacher_topk(t, 5, labels=labels, tail=tail)
            objective = losses.LOSSES[name].objective()
            given = s, known, labels, upstream, f"{name} {tail}"
            both(world, rank, objective, *given, reduction="none")


def from_hidden_states(rank, world):
    _, t, labels, upstream = rows()
    hidden, matrix = torch.randn(N, H).double(), torch.randn(V, H).double()
    theirs, bias, part = torch.randn(V, H).double(), torch.randn(V).double(), own(world, rank)
    known, flat = (
        drkl_triton.teacher_topk(t, 5, labels=labels, tail=tail) for tail in ("bucket", "uniform")
    )
    kinds = {
        "logits": ({"teacher_logits": t}, {"teacher_logits": t[:, part]}),
        "whole logits": ({"teacher_logits": t}, {"teacher_logits": t}),
        "heads": (
            {"teacher_hidden": hidden * 2, "teacher_weight": theirs},
            {"teacher_hidden": hidden * 2, "teacher_weight": theirs[part]},
        ),
        "cells": ({"teacher_logits": known}, {"teacher_logits": known}),
        "uniform": ({"teacher_logits": flat}, {"teacher_logits": flat}),
    }
    ways = {"mean": {}, "recompute": {"recompute": True}, "none": {"reduction": "none"},
            "slices": {"chunk_bytes": 2000}, "softcap": {"student_softcap": 3.0}}  # fmt: skip
    for i, name in enumerate(FEW[:3] if world == 4 else FEW):
        objective = losses.LOSSES[name].objective()
        for j, (kind, (given, mine)) in enumerate(kinds.items()):
            for k, (way, options) in enumerate(ways.items()):
                if (i + j + k) % (5 if world == 4 else 2):
                    continue
                found = []
                for weight, b, teacher, group in (
                    (matrix, bias, given, None),
                    (matrix[part], bias[part], mine, world_group()),
                ):
                    leaves = [x.clone().requires_grad_() for x in (hidden, weight, b)]
                    loss = linear_divergence(
                        objective, *leaves[:2], labels, student_bias=leaves[2], group=group,
                        **teacher, **options,
                    )  # fmt: skip
                    (loss * (upstream if loss.dim() else 1.0)).sum().backward()
                    found.append([loss.detach(), *(x.grad for x in leaves)])
                right, ours = found
                right[2], right[3] = right[2][part], right[3][part]
                for x, y in zip(ours, right, strict=True):
                    close(x, y, f"{name}, {kind}, {way}")


def log_probabilities(rank, world):
    s, _, _, _ = rows()
    part, ids = own(world, rank), torch.randint(-1, V, (N, 4))
    ids[3] = -1
    found = []
    hidden, matrix = torch.randn(N, H).double(), torch.randn(V, H).double()
    for x, w, group in (s, matrix, None), (s[:, part], matrix[part], world_group()):
        leaves = [y.clone().requires_grad_() for y in (x, hidden, w)]
        some, rest = log_probs_at(leaves[0], ids, temperature=2.0, group=group)
        linear = drkl_triton.linear_log_probs_at(*leaves[1:], ids, group=group, return_tail=False)
        total = torch.where(ids >= 0, some + linear, 0.0).sum() + (rest * rest).sum()
        total.backward()
        found.append([some.detach(), rest.detach(), *(y.grad for y in leaves)])
    right, ours = found
    right[2], right[4] = right[2][:, part], right[4][part]
    for x, y in zip(ours, right, strict=True):
        close(x, y)


def options(rank, world):
    s, t, labels, upstream = rows()
    s, t, labels = s.view(3, 3, V), t.view(3, 3, V), labels.view(3, 3)
    weight = torch.rand(3, 3).double()
    weight[1, 2] = 0
    mixed = 0.5 * objectives.drkl() + objectives.cross_entropy() + 0.1 * objectives.z_loss()
    for objective in (objectives.reverse_kl(), objectives.js_divergence(), mixed):
        for given in (
            {"shift": True}, {"weight": weight}, {"temperature": 0.5},
            {"temperature": torch.tensor(2.0)}, {"num_items": 4}, {"reduction": "sum"},
            {"shift": True, "weight": weight, "temperature": 3.0}, {"ignore_index": 7},
        ):  # fmt: skip
            scored = labels.masked_fill(labels == -100, given.get("ignore_index", -100))
            both(world, rank, objective, s, t, scored, None, str(given), **given)
    masked = t.clone()
    masked[..., 3:30:2] = -INF
    labels = torch.full_like(labels, 4)
    both(world, rank, mixed, s, masked, labels, None, "support", support="teacher")


def masks_and_broken_rows(rank, world):
    s, t, labels, upstream = rows()
    cuts = CUTS[world]
    for name in ("reverse_kl", "forward_kl", "drkl", "js_divergence", "drkl (skewed teacher)"):
        objective = losses.LOSSES[name].objective()
        for k in range(world):  # all of a rank's columns are masked, but for a label there
            a, b = s.clone(), t.clone()
            a[:5, cuts[k] : cuts[k + 1]] = b[:5, cuts[k] : cuts[k + 1]] = -INF
            both(world, rank, objective, a, b, labels, upstream, f"{name}, masked {k}",
                 reduction="none")  # fmt: skip
        for value in (NAN, INF, -INF):
            for whose in range(2):
                a, b = s.clone(), t.clone()
                (a, b)[whose][0, 3] = (a, b)[whose][1, V - 1] = value
                (a, b)[whose][4, labels[4]] = value
                both(world, rank, objective, a, b, labels, upstream, f"{name}, {value} {whose}",
                     reduction="none")  # fmt: skip
        a, b = s.clone(), t.clone()
        a[0], a[1, 1:], b[3] = -INF, -INF, -INF
        labels[1] = 0
        both(world, rank, objective, a, b, labels, upstream, f"{name}, empty", reduction="none")
        a, b = s.clone(), t.clone()
        a[2], b[2] = NAN, INF  # it is ignored
        both(world, rank, objective, a, b, labels, upstream, f"{name}, ignored", reduction="none")


def within_the_bound(rank, world):
    """The gradient of all columns together, at 16 and 32 bits and heights of 700."""
    part = own(world, rank)
    for dtype in (torch.float32, torch.bfloat16):
        s, t, labels, upstream = rows(1)
        labels = labels.clamp_min(0)
        s[3], t[3] = s[3] + 700, t[3] - 700
        s[4] *= 8
        s[5, labels[5]] += 60
        s, t, upstream = s.to(dtype), t.to(dtype), upstream.double()
        for name in ("reverse_kl", "forward_kl", "drkl", "js_divergence", "mixed_kl"):

            def ours(x, t, labels, name=name, **options):
                return losses.ours(name)(
                    x[:, part], t[:, part], labels, group=world_group(), **options
                )

            loss, grad = bounds.run(ours, s, t, labels, upstream)
            dist.all_reduce(grad)  # each has its columns, and 0 elsewhere
            worst = bounds.excess_of((loss, grad), name, s, t, labels, upstream)
            assert max(worst) <= 1, (name, dtype, worst)


def the_same_bits_everywhere(rank, world):
    s, t, labels, _ = rows(2, torch.float32)
    part = own(world, rank)
    for name in FEW:
        objective = losses.LOSSES[name].objective()
        loss, metrics = divergence(
            objective, s[:, part], t[:, part], labels, group=world_group(), return_metrics=True
        )
        for x in (loss, *metrics):
            if x is not None:
                every = [torch.empty_like(x) for _ in range(world)]
                dist.all_gather(every, x)
                assert all(torch.equal(x, y) for y in every), name


def collectives(rank, world):
    """Two forward, none backward; one more for a second sweep; from hidden states one more."""
    s, t, labels, _ = rows()
    part, count = own(world, rank), []
    original = dist.all_reduce

    def counted(x, *args, **keywords):
        count.append(x.numel())
        return original(x, *args, **keywords)

    dist.all_reduce = counted
    try:
        for name, expected, numbers in (
            ("reverse_kl", 2, 8),
            ("mixed_kl", 2, 9),
            ("drkl", 2, 8),
            ("js_divergence", 3, 9),
        ):
            x = s[:, part].clone().requires_grad_()
            count.clear()
            loss = losses.ours(name)(x, t[:, part], labels, group=world_group())
            assert len(count) == expected and sum(count) == numbers * N, (name, count)
            loss.backward()
            assert len(count) == expected, (name, count)
        hidden = torch.randn(N, H).double().requires_grad_()
        matrix = torch.randn(V, H).double()[part].requires_grad_()
        count.clear()
        given = dict(teacher_logits=t[:, part], group=world_group())
        drkl_triton.linear_drkl(hidden, matrix, labels, **given).backward()
        assert len(count) == 3 and count[-1] == (N - 1) * H, count  # a row is ignored
    finally:
        dist.all_reduce = original


def slices_while_gradients_travel(rank, world):
    """d hidden of a slice is under way while the sums of the next are made."""
    hidden, matrix, t, labels = hidden_states()
    part, seen = own(world, rank), []
    original = _shard._Meeting.finish

    def finish(self, number):
        seen.append([tuple(y.shape) for _, y in self.travelling.values()])
        return original(self, number)

    _shard._Meeting.finish = finish
    try:
        loss = drkl_triton.linear_drkl(
            hidden.requires_grad_(), matrix[part], labels, teacher_logits=t[:, part],
            group=world_group(), chunk_bytes=3 * 64 * 16,
        )  # fmt: skip
    finally:
        _shard._Meeting.finish = original
    loss.backward()
    assert [(3, H), (5, 3)] in seen and [(3, H), (3, 3)] in seen, seen
    assert not _shard._meeting(world_group()).travelling


def fails_in_the_middle(rank, world):
    """One rank does, in its second or third slice; the others wait with one or two collectives
    under way.
    """
    hidden, matrix, t, labels = hidden_states()
    part, original = own(world, rank), slices.multiply

    def call():
        loss = drkl_triton.linear_drkl(
            hidden.requires_grad_(), matrix[part], labels, teacher_logits=t[:, part],
            group=world_group(), chunk_bytes=3 * 64 * 16,
        )  # fmt: skip
        return loss.detach()

    for product in 3, 4, 5, 6:  # logits and d hidden of the second and the third slice
        calls = []

        def multiply(*args, calls=calls, product=product, **keywords):
            calls.append(1)
            if rank == 1 and len(calls) == product:
                raise RuntimeError("out of memory")
            return original(*args, **keywords)

        slices.multiply = multiply
        try:
            fails(call, "out of memory", of=(ValueError, RuntimeError))
        finally:
            slices.multiply = original
        right = drkl_triton.linear_drkl(hidden, matrix, labels, teacher_logits=t)
        close(call(), right.detach())


# --- DTensors ---


def dtensors(rank, world):
    s, t, labels, upstream = rows()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for teacher in (
        t,
        distribute_tensor(t, mesh, [Shard(1)]),
        distribute_tensor(t, mesh, [Replicate()]),
        drkl_triton.teacher_topk(t, 4, labels=labels),
    ):
        right = gradient(
            drkl_triton.drkl, s, teacher if isinstance(teacher, SparseTeacher) else t, labels, None
        )
        x = distribute_tensor(s, mesh, [Shard(1)]).requires_grad_()
        loss = drkl_triton.drkl(x, teacher, labels)
        (grad,) = torch.autograd.grad(loss, x)  # torch 2.8 gathers an uneven .grad
        close(loss.detach(), right[0])
        assert grad.placements == (Shard(1),)
        close(grad.full_tensor(), right[1])
    x = distribute_tensor(s, mesh, [Shard(1)]).requires_grad_()
    ids = labels.clamp_min(0)[:, None]
    log_q = log_probs_at(x, ids, return_tail=False)
    close(log_q.detach(), s.log_softmax(-1).gather(-1, ids))
    for placement in (Shard(0), Replicate()):
        try:
            drkl_triton.drkl(distribute_tensor(s, mesh, [placement]), t, labels)
        except TypeError as error:
            assert "redistribute(placements=[Shard(-1)])" in str(error), error
        else:
            raise AssertionError("no error")


def a_matrix_in_parts(rank, world):
    """ColwiseParallel's: a DTensor of the group's."""
    _, t, labels, _ = rows()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    hidden, matrix = torch.randn(N, H).double(), torch.randn(V, H).double()
    leaves = [x.clone().requires_grad_() for x in (hidden, matrix)]
    right = drkl_triton.linear_drkl(*leaves, labels, teacher_logits=t)
    right.backward()
    x = hidden.clone().requires_grad_()
    w = distribute_tensor(matrix, mesh, [Shard(0)]).requires_grad_()
    loss = drkl_triton.linear_drkl(x, w, labels, teacher_logits=t, group=mesh.get_group())
    loss.backward()
    close(loss.detach(), right.detach())
    close(x.grad, leaves[0].grad)
    close(w.grad.full_tensor(), leaves[1].grad)


def two_dimensions(rank, world):
    """Halves of the batch beside halves of the vocabulary."""
    if world != 4:
        return
    s, t, labels, upstream = rows()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, mine = divmod(rank, 2)
    lines, columns = slice(4 * data, 4 * data + 4 + data), slice(20 * mine, 20 + 30 * mine)
    group = mesh.get_group("tensor")
    right = gradient(drkl_triton.drkl, s[lines], t[lines], labels[lines], None)
    ours = gradient(
        drkl_triton.drkl, s[lines, columns], t[lines, columns], labels[lines], None, group=group
    )
    close(ours[0], right[0])
    close(ours[1], right[1][:, columns])
    x = distribute_tensor(s[lines], mesh["tensor"], [Shard(1)]).requires_grad_()
    drkl_triton.drkl(x, t[lines], labels[lines]).backward()
    close(x.grad.full_tensor(), right[1])


# --- failing ---


def fails(call, *words, of=ValueError):
    start = time.monotonic()
    try:
        call()
    except of as error:
        for word in words:
            assert word in str(error), error
    else:
        raise AssertionError(f"no error, {words}")
    assert time.monotonic() - start < 30


def disagreements(rank, world):
    s, t, labels, _ = rows()
    part, group = own(world, rank), world_group()
    here = s[:, part], t[:, part], labels
    of = drkl_triton.drkl
    said = "rank 0", "rank 1", "disagree on"
    fails(lambda: of(*here, group=group, gamma=0.5 + rank), "parameters", *said)
    fails(lambda: of(*here, group=group, temperature=1.0 + (rank == 1)), "temperature", *said)
    fails(lambda: of(*(x[: N - rank] for x in here), group=group), "rows", *said)
    known = drkl_triton.teacher_topk(t, 3)
    which = here[1] if rank else known
    fails(lambda: drkl_triton.reverse_kl(here[0], which, group=group), "teacher", *said)
    close(of(*here, group=group), of(s, t, labels))  # and goes on
    # what is known to one is not what the other calls now
    count = N if rank else N - 1
    fails(lambda: of(*(x[:count] for x in here), group=group), "disagree")
    close(of(*here, group=group), of(s, t, labels))
    # one refuses
    wrong = labels.clone()
    if rank == 1:
        wrong[0] = V
    fails(lambda: of(*here[:2], wrong, group=group), f"got {V}")
    fails(lambda: of(*here, group=group, reduction="mean" if rank else "avg"), "avg")
    close(of(*here, group=group), of(s, t, labels))
    start = [0, 7] if world == 2 else [0, 0, 20, 35]
    close(of(*here, group=group, vocab_start=start[rank]), of(s, t, labels))
    wrong = start[rank] + (rank == world - 1)
    fails(lambda: of(*here, group=group, vocab_start=wrong), "without a gap or an overlap")


CHECKS = (
    every_loss, interpreted_kernels, every_tail, from_hidden_states, log_probabilities, options,
    masks_and_broken_rows, within_the_bound, the_same_bits_everywhere, collectives,
    slices_while_gradients_travel, fails_in_the_middle, dtensors, a_matrix_in_parts,
    two_dimensions, disagreements,
)  # fmt: skip


def main(rank, world, folder):
    torch.set_num_threads(1)
    if _checks.INTERPRETING:
        quick_interpreter.install()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # infinities are subtracted
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {}
    for check in CHECKS:
        try:
            check(rank, world)
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
            break  # the others may wait for this one
        dist.barrier()
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    world = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(main, (world, folder), world, join=False)
        deadline = time.monotonic() + float(sys.argv[2])
        try:
            while time.monotonic() < deadline and not context.join(1.0):
                pass
        except Exception as error:  # one has ended the others
            print(error, file=sys.stderr)
        for process in context.processes:
            process.kill()
        total = dict.fromkeys((check.__name__ for check in CHECKS), "")
        seen = {}
        for rank in range(world):
            try:
                with open(f"{folder}/{rank}.json", encoding="utf-8") as file:
                    of_rank = json.load(file)
            except FileNotFoundError:
                of_rank = {}
            for name in total:
                seen.setdefault(name, []).append(of_rank.get(name, f"rank {rank} did not end"))
        print(json.dumps({name: "\n".join(filter(None, says)) for name, says in seen.items()}))

"""Probe: loss and gradient of reverse KL / DRKL in ONE launch that reads the logits once.

    two launches (the package): 2 reads + (2 reads + 1 write) = 10 bytes an element of bfloat16
    one sweep   (this probe)  : 2 reads + 1 write             =  6 bytes an element

A team of TEAM programs shares a row, BLOCK columns each. Every program loads its share once, sums
it relative to its own maxima, publishes five numbers, waits until the team's other members have,
merges, and writes its share of the gradient. Between the two halves the share stays in registers
(KEEP=reg) or is read a second time, from L2 (KEEP=l2: fewer registers, more programs). PERSIST: as
many programs as the card holds, each of which goes through rows and loads the next share before it
waits.

Progress needs no co-operative launch: tickets are handed out in order, so the members of the oldest
unfinished team are all running or done, as long as the card holds at least TEAM programs. PERSIST
needs all programs resident, and asks for it (launch_cooperative_grid).

Limits of the probe: finite logits, temperature 1, 16-byte aligned rows of V % 16 == 0, the upstream
gradient of every row known when the forward runs.

    python bench/one_sweep.py             # on a GPU: check, then time, a minute
    python bench/one_sweep.py --ahead 6   # compile everything in 6 processes
    TRITON_INTERPRET=1 python bench/one_sweep.py --interpret   # no GPU: is the arithmetic right
"""

import argparse
import csv
import functools
import itertools
import math
import os
import subprocess
import sys
import time
from statistics import median

import torch
import triton
import triton.language as tl
from timing import Clock, Copy

from drkl_triton import algebra, kernels
from drkl_triton._layout import rows_of

LOG2E = tl.constexpr(1.4426950408889634)
OUT = tl.constexpr(-1.0e30)  # a column that is out: its exponential is 0, its differences finite
FIELDS = tl.constexpr(8)
MAX_POLLS = tl.constexpr(1000000)  # about a second: then the result is wrong, but the card not hung
GAMMA = 0.5


@triton.jit
def softplus(x):  # log(1 + exp(x))
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def load_share(s_row, t_row, offs, mask, KEEP_L2: tl.constexpr):
    if KEEP_L2:  # they are wanted again
        s = tl.load(s_row + offs, mask=mask, other=OUT, eviction_policy="evict_last")
        t = tl.load(t_row + offs, mask=mask, other=OUT, eviction_policy="evict_last")
    else:
        s = tl.load(s_row + offs, mask=mask, other=OUT, eviction_policy="evict_first")
        t = tl.load(t_row + offs, mask=mask, other=OUT, eviction_policy="evict_first")
    return s, t


@triton.jit
def launder(x):
    """x, but the compiler does not know it: so nothing computed from x before is kept for after."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@triton.jit
def acquire(ptr):
    """Every thread reads it itself, and then sees what the team wrote before."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_beside(s_row, t_row, label, mine, V):
    """The 8 columns of the label's vector, the label itself out; all out where it is another's."""
    cols = label // 8 * 8 + tl.arange(0, 8)
    mask = mine & (cols != label) & (cols < V)
    s = tl.load(s_row + cols, mask=mask, other=OUT)
    t = tl.load(t_row + cols, mask=mask, other=OUT)
    return s, t, cols


@triton.jit
def publish(
    part_ptr, sync_ptr, row, part, s, t, s8, t8, TEAM2: tl.constexpr, LABEL: tl.constexpr,
    LAUNDER: tl.constexpr,
):  # fmt: skip
    """The share's sums, relative to its own maxima."""
    m_s, m_t = tl.max(s.to(tl.float32), axis=0), tl.max(t.to(tl.float32), axis=0)
    if LABEL:
        m_s = tl.maximum(m_s, tl.max(s8.to(tl.float32), axis=0))
        m_t = tl.maximum(m_t, tl.max(t8.to(tl.float32), axis=0))
    if LAUNDER:  # 16 bits an element are kept, not 32
        s, t = launder(s), launder(t)
    x, z = s.to(tl.float32) - m_s, t.to(tl.float32) - m_t
    e = tl.exp2(x * LOG2E)
    d_s = tl.sum(e, axis=0)
    d_t = tl.sum(tl.exp2(z * LOG2E), axis=0)
    a = tl.sum(e * (x - z), axis=0)
    if LABEL:
        x, z = s8.to(tl.float32) - m_s, t8.to(tl.float32) - m_t
        e = tl.exp2(x * LOG2E)
        d_s += tl.sum(e, axis=0)
        d_t += tl.sum(tl.exp2(z * LOG2E), axis=0)
        a += tl.sum(e * (x - z), axis=0)
    p = part_ptr + row * (FIELDS * TEAM2) + part
    tl.store(p, m_s)
    tl.store(p + TEAM2, d_s)
    tl.store(p + 2 * TEAM2, a)
    tl.store(p + 3 * TEAM2, m_t)
    tl.store(p + 4 * TEAM2, d_t)
    tl.debug_barrier()  # whichever threads stored, they have before one of them says so
    tl.atomic_add(sync_ptr + row, 1, sem="release")
    return s, t


@triton.jit
def merged(part_ptr, sync_ptr, row, TEAM: tl.constexpr, TEAM2: tl.constexpr, WAIT: tl.constexpr):
    if WAIT:
        seen, polls = acquire(sync_ptr + row), 0
        while (seen < TEAM) & (polls < MAX_POLLS):
            seen = acquire(sync_ptr + row)
            polls += 1
    k = tl.arange(0, TEAM2)
    mask = k < TEAM
    p = part_ptr + row * (FIELDS * TEAM2) + k
    m_s = tl.load(p, mask=mask, other=OUT, cache_modifier=".cg")
    d_s = tl.load(p + TEAM2, mask=mask, other=0.0, cache_modifier=".cg")
    a = tl.load(p + 2 * TEAM2, mask=mask, other=0.0, cache_modifier=".cg")
    m_t = tl.load(p + 3 * TEAM2, mask=mask, other=OUT, cache_modifier=".cg")
    d_t = tl.load(p + 4 * TEAM2, mask=mask, other=0.0, cache_modifier=".cg")
    top_s, top_t = tl.max(m_s, axis=0), tl.max(m_t, axis=0)
    down_s, down_t = m_s - top_s, m_t - top_t
    r = tl.exp2(down_s * LOG2E)
    a = tl.sum(r * (a + d_s * (down_s - down_t)), axis=0)
    return top_s, tl.sum(r * d_s, axis=0), a, top_t, tl.sum(d_t * tl.exp2(down_t * LOG2E), axis=0)


@triton.jit
def scalars(m_s, d_s, a, m_t, d_t, s_y, t_y, up, gamma, LABEL: tl.constexpr):
    """(loss, w1, w0, at_label): the gradient is e (w1 (x - z) + w0)."""
    slope = a / d_s
    log_ds, log_dt = tl.log(d_s), tl.log(d_t)
    n = slope + log_dt - log_ds
    loss = n
    w, g_y = 1.0, 0.0
    if LABEL:
        u, v = s_y - m_s - log_ds, t_y - m_t - log_dt
        log_q, log_rest = -softplus(-u), -softplus(u)
        q, rest = tl.exp(log_q), tl.exp(log_rest)
        loss = q * (log_q + softplus(-v)) + rest * (log_rest + softplus(v)) + gamma * n
        w, g_y = gamma, q * rest * (u - v)
    return loss, up * w / d_s, -up * (w * slope + g_y) / d_s, up * g_y


@triton.jit
def slope_of(s, t, m_s, m_t, w1, w0):
    x, z = s.to(tl.float32) - m_s, t.to(tl.float32) - m_t
    return tl.exp2(x * LOG2E) * (w1 * (x - z) + w0)


@triton.jit
def one_sweep_kernel(
    s_ptr, t_ptr, label_ptr, up_ptr, gamma, part_ptr, sync_ptr, loss_ptr, d_ptr,
    N, V, stride_s, stride_t, stride_d,
    TEAM: tl.constexpr, TEAM2: tl.constexpr, BLOCK: tl.constexpr, LABEL: tl.constexpr,
    KEEP_L2: tl.constexpr, WAIT: tl.constexpr, LAUNDER: tl.constexpr, TICKET: tl.constexpr,
):  # fmt: skip
    OUTPUT: tl.constexpr = d_ptr.dtype.element_ty
    if TICKET:
        ticket = tl.atomic_add(sync_ptr + N, 1, sem="relaxed")
    else:  # as the hardware starts programs in order, in practice
        ticket = tl.program_id(0)
    row, part = (ticket // TEAM).to(tl.int64), ticket % TEAM
    offs = part * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    s_row, t_row, d_row = s_ptr + row * stride_s, t_ptr + row * stride_t, d_ptr + row * stride_d
    label, s_y, t_y, mine = -1, 0.0, 0.0, False
    if LABEL:
        label = tl.load(label_ptr + row).to(tl.int32)
        mask = mask & (offs // 8 != label // 8)  # its vector is left to load_beside
        mine = (label >= part * BLOCK) & (label < (part + 1) * BLOCK)
    s, t = load_share(s_row, t_row, offs, mask, KEEP_L2)
    s8, t8, cols = s, t, offs
    if LABEL:
        s8, t8, cols = load_beside(s_row, t_row, label, mine, V)
        s_y = tl.load(s_row + label).to(tl.float32)
        t_y = tl.load(t_row + label).to(tl.float32)
    up = tl.load(up_ptr + row)
    s, t = publish(part_ptr, sync_ptr, row, part, s, t, s8, t8, TEAM2, LABEL, LAUNDER)
    m_s, d_s, a, m_t, d_t = merged(part_ptr, sync_ptr, row, TEAM, TEAM2, WAIT)
    loss, w1, w0, at_label = scalars(m_s, d_s, a, m_t, d_t, s_y, t_y, up, gamma, LABEL)
    if part == 0:
        tl.store(loss_ptr + row, loss)
    if KEEP_L2:
        s, t = load_share(s_row, t_row, offs, mask, False)
    elif LAUNDER:
        s, t = launder(s), launder(t)
    g = slope_of(s, t, m_s, m_t, w1, w0).to(OUTPUT)
    tl.store(d_row + offs, g, mask=mask, eviction_policy="evict_first")
    if LABEL:
        g = tl.where(cols == label, at_label, slope_of(s8, t8, m_s, m_t, w1, w0))
        tl.store(d_row + cols, g.to(OUTPUT), mask=mine & (cols < V))


@triton.jit
def persistent_kernel(
    s_ptr, t_ptr, label_ptr, up_ptr, gamma, part_ptr, sync_ptr, loss_ptr, d_ptr,
    N, V, stride_s, stride_t, stride_d,
    TEAM: tl.constexpr, TEAM2: tl.constexpr, BLOCK: tl.constexpr, LABEL: tl.constexpr,
    KEEP_L2: tl.constexpr, WAIT: tl.constexpr, LAUNDER: tl.constexpr, TICKET: tl.constexpr,
):  # fmt: skip
    # Grid: a multiple of TEAM, all of it resident. Team g takes rows g, g + teams, ...
    OUTPUT: tl.constexpr = d_ptr.dtype.element_ty
    part = tl.program_id(0) % TEAM
    team, teams = tl.program_id(0) // TEAM, tl.num_programs(0) // TEAM
    offs = part * BLOCK + tl.arange(0, BLOCK)
    row = team.to(tl.int64)
    label, mask = -1, offs < V
    if LABEL:
        label = tl.load(label_ptr + row).to(tl.int32)
        mask = mask & (offs // 8 != label // 8)
    s, t = load_share(s_ptr + row * stride_s, t_ptr + row * stride_t, offs, mask, False)
    for _ in range(team, N, teams):
        s_row, t_row, d_row = s_ptr + row * stride_s, t_ptr + row * stride_t, d_ptr + row * stride_d
        s_y, t_y, mine, label1 = 0.0, 0.0, False, -1
        s8, t8, cols = s, t, offs
        following = tl.minimum(row + teams, N - 1)  # the last one loads a row for nothing
        if LABEL:
            mine = (label >= part * BLOCK) & (label < (part + 1) * BLOCK)
            s8, t8, cols = load_beside(s_row, t_row, label, mine, V)
            s_y = tl.load(s_row + label).to(tl.float32)
            t_y = tl.load(t_row + label).to(tl.float32)
            label1 = tl.load(label_ptr + following).to(tl.int32)
        up = tl.load(up_ptr + row)
        s, t = publish(part_ptr, sync_ptr, row, part, s, t, s8, t8, TEAM2, LABEL, LAUNDER)
        # the next row's share is on its way while this one waits
        mask = offs < V
        if LABEL:
            mask = mask & (offs // 8 != label1 // 8)
        s1, t1 = load_share(
            s_ptr + following * stride_s, t_ptr + following * stride_t, offs, mask, False
        )
        m_s, d_s, a, m_t, d_t = merged(part_ptr, sync_ptr, row, TEAM, TEAM2, WAIT)
        loss, w1, w0, at_label = scalars(m_s, d_s, a, m_t, d_t, s_y, t_y, up, gamma, LABEL)
        if part == 0:
            tl.store(loss_ptr + row, loss)
        if LAUNDER:
            s, t = launder(s), launder(t)
        g = slope_of(s, t, m_s, m_t, w1, w0).to(OUTPUT)
        mask = offs < V
        if LABEL:
            mask = mask & (offs // 8 != label // 8)
        tl.store(d_row + offs, g, mask=mask, eviction_policy="evict_first")
        if LABEL:
            g = tl.where(cols == label, at_label, slope_of(s8, t8, m_s, m_t, w1, w0))
            tl.store(d_row + cols, g.to(OUTPUT), mask=mine & (cols < V))
        s, t, label, row = s1, t1, label1, row + teams


# --- launching ---

# name: (warps, BLOCK, KEEP, PERSIST: resident programs a multiprocessor or 0, registers at most)
VARIANTS = {
    "reg-4w-4096": (4, 4096, "reg", 0, 80),
    "pid-4w-4096": (4, 4096, "reg", 0, 80),
    "reg-8w-8192": (8, 8192, "reg", 0, 80),
    "reg-8w-4096": (8, 4096, "reg", 0, 64),
    "l2-4w-4096": (4, 4096, "l2", 0, 80),
    "persist-8w-4096": (8, 4096, "reg", 3, 80),
    "persist-4w-4096": (4, 4096, "reg", 4, 128),
}
VOCABULARIES = (128256, 32000, 262144)
COLUMNS = ("vocab", "op", "provider", "ms", "gb_per_s", "percent_of_copy", "right")


class Probe:
    def __init__(self, name, N, V, device, label, interpret=False, units=132):
        self.warps, self.BLOCK, keep, self.resident, registers = VARIANTS[name]
        self.label, self.N, self.V, self.interpret = label, N, V, interpret
        if interpret:
            self.BLOCK = 64
        self.TEAM = -(-V // self.BLOCK)
        self.TEAM2 = triton.next_power_of_2(self.TEAM)
        self.grid = N * self.TEAM
        kernel = one_sweep_kernel
        if self.resident:
            kernel = persistent_kernel
            teams = max(1, units * self.resident // self.TEAM)
            self.grid = min(N, teams) * self.TEAM
        self.kernel = kernel
        self.part = torch.empty((N, FIELDS.value, self.TEAM2), device=device)
        self.sync = torch.zeros(N + 1, dtype=torch.int32, device=device)
        self.flags = dict(
            TEAM=self.TEAM, TEAM2=self.TEAM2, BLOCK=self.BLOCK, LABEL=label, KEEP_L2=keep == "l2",
            WAIT=not interpret, LAUNDER=not interpret, TICKET=not name.startswith("pid"),
            num_warps=self.warps,
        )  # fmt: skip
        if not interpret and registers:
            self.flags["maxnreg"] = registers
        if self.resident and not interpret:
            self.flags["launch_cooperative_grid"] = True

    def __call__(self, s, t, y, up, loss, d):
        args = (s, t, y, up, GAMMA, self.part, self.sync, loss, d)
        args += (self.N, self.V, s.stride(0), t.stride(0), d.stride(0))
        # interpreted, programs run one by one: the first launch publishes, the second reads
        for _ in range(1 + self.interpret):
            self.sync.zero_()
            self.kernel[(self.grid,)](*args, **self.flags)


def truth(s, t, y, up, label):
    """(loss, gradient) of rows in float64."""
    s, t = s.double().requires_grad_(), t.double()
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    if not label:
        loss = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        out = torch.zeros_like(log_q).scatter(-1, y[:, None], -math.inf)
        rest_q, rest_p = (s + out).log_softmax(-1), (t + out).log_softmax(-1)
        n = (rest_q.exp() * (rest_q - rest_p).masked_fill(out == -math.inf, 0.0)).sum(-1)
        u = s.gather(-1, y[:, None])[:, 0] - (s + out).logsumexp(-1)
        v = t.gather(-1, y[:, None])[:, 0] - (t + out).logsumexp(-1)
        ls = torch.nn.functional.logsigmoid
        kl = u.sigmoid() * (ls(u) - ls(v)) + (-u).sigmoid() * (ls(-u) - ls(-v))
        loss = kl + GAMMA * n
    (grad,) = torch.autograd.grad((loss * up.double()).sum(), s)
    return loss.detach(), grad


def draw(N, V, device):
    s = torch.randn(N, V, device=device, dtype=torch.bfloat16).mul_(3)
    t = torch.randn(N, V, device=device, dtype=torch.bfloat16).add_(s)
    y = torch.randint(V, (N,), device=device)
    k = min(N, 64)
    y[:k:2] = t[:k:2].argmax(-1)
    return s, t, y


def check(loss, d, s, t, y, up, label, rows):
    """Largest errors: the loss's relative to 1 + |loss|, the gradient's to its largest."""
    exact, grad = truth(s[rows], t[rows], y[rows], up[rows], label)
    of_loss = ((loss[rows].double() - exact).abs() / (1 + exact.abs())).max().item()
    of_grad = ((d[rows].double() - grad).abs().amax(-1) / grad.abs().amax(-1)).max().item()
    return of_loss, of_grad


def interpret():
    torch.manual_seed(0)
    worst = 0.0
    for name, label, V, N in itertools.product(
        ("reg-8w-8192", "pid-4w-4096", "l2-4w-4096", "persist-8w-4096"),
        (False, True),
        (64, 208, 1040),
        (1, 5),
    ):
        s, t, y = draw(N, V, "cpu")
        up = torch.randn(N)
        loss, d = torch.full((N,), math.nan), torch.full((N, V), math.nan, dtype=torch.bfloat16)
        probe = Probe(name, N, V, "cpu", label, interpret=True, units=7)
        probe(s, t, y, up, loss, d)
        errors = check(loss, d, s, t, y, up, label, slice(None))
        print(
            f"{name:16} label={label!s:5} N={N} V={V:5} team={probe.TEAM:3} grid={probe.grid:3}"
            f"  loss {errors[0]:.1e} gradient {errors[1]:.1e}"
        )
        worst = max(worst, errors[0] / 1e-5, errors[1] / 2**-7)
    print("right" if worst <= 1 else "WRONG")
    return int(worst > 1)


# --- on a GPU ---


def two_launches(s, t, y, up, label):
    """The package's kernels alone, forward and backward."""
    one = torch.ones((), device="cuda")
    gamma = torch.tensor(GAMMA, device="cuda") if label else None
    code = y if label else torch.full_like(y, -1)
    rs, rt, V = rows_of(s), rows_of(t), s.shape[1]
    sums = kernels.row_sums(rs, rt, code, one, V)
    table = algebra.gradient_scalars(sums, code, one, gamma, label, up).contiguous()
    out = torch.empty_like(s)
    forward = lambda: kernels.row_sums(rs, rt, code, one, V)  # noqa: E731
    backward = lambda: kernels.row_grad(rs, rt, code, one, table, V, out=out)  # noqa: E731
    return forward, backward


def ahead(options, jobs):
    """Compile all variants in processes beside each other; they fill Triton's cache."""
    here = [sys.executable, os.path.abspath(__file__), "--vocab", *map(str, options.vocab),
            "--variant", *options.variant, "--tokens", "64", "--part"]  # fmt: skip
    running = [subprocess.Popen([*here, f"{k}/{jobs}"]) for k in range(jobs)]
    for job in running:
        job.wait()


def parse(arguments):
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--vocab", nargs="+", type=int, default=list(VOCABULARIES))
    add("--tokens", type=int, default=8192)
    add("--repeats", type=int, default=10)
    add("--seconds", type=float, default=100)
    add("--ahead", type=int, default=0)
    add("--part")
    add("--interpret", action="store_true")
    add("--csv")
    return parser.parse_args(arguments)


def main():
    options = parse(sys.argv[1:])
    start = time.monotonic()
    if options.interpret:
        return interpret()
    cases = list(itertools.product(options.vocab, (True, False), options.variant))
    if options.part:
        k, n = map(int, options.part.split("/"))
        for V, label, name in cases[k::n]:
            s, t, y = draw(64, V, "cuda")
            up, loss, d = (
                torch.ones(64, device="cuda"),
                torch.empty(64, device="cuda"),
                torch.empty_like(s),
            )
            try:
                Probe(name, 64, V, "cuda", label, units=132)(s, t, y, up, loss, d)
                torch.cuda.synchronize()
            except Exception as error:
                print(name, V, type(error).__name__, str(error)[:200], flush=True)
        return 0
    if options.ahead:
        ahead(options, options.ahead)
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
        return 0

    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    units = torch.cuda.get_device_properties(device).multi_processor_count
    timer, N, rows, wrong = Clock(device), options.tokens, [], 0
    clock = lambda call: timer.ms(call)[0]  # noqa: E731
    moved = Copy(device, 2048)
    copy = moved.bytes / median(clock(moved) for _ in range(10)) / 1e6
    print(f"{torch.cuda.get_device_name()}, copy {copy:.0f} GB/s", flush=True)
    del moved

    def keep(*row):
        rows.append(row)
        if options.csv:
            with open(options.csv, "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *rows])

    for V in options.vocab:
        if time.monotonic() - start > options.seconds:
            break
        s, t, y = draw(N, V, "cuda")
        up = torch.rand(N, device="cuda").add_(0.5)
        loss, d = torch.empty(N, device="cuda"), torch.empty_like(s)
        size = s.numel() * 2
        for label in (True, False):
            base = two_launches(s, t, y, up, label)
            [f() for f in base]
            fw, bw = (median(clock(f) for _ in range(options.repeats)) for f in base)
            both = fw + bw
            name = "drkl" if label else "reverse_kl"
            print(f"V={V} {name}  two launches: {fw:.3f} + {bw:.3f} ms", flush=True)
            keep(V, name, "two launches", both, 5 * size / both / 1e6, 100, True)
            for name in options.variant:
                if time.monotonic() - start > options.seconds:
                    break
                probe = Probe(name, N, V, "cuda", label, units=units)
                call = functools.partial(probe, s, t, y, up, loss, d)
                loss.fill_(math.nan)
                d.fill_(math.nan)
                try:
                    call()
                    torch.cuda.synchronize()
                except Exception as error:
                    print(f"   {name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
                    if "CUDA error" in str(error):
                        return 1
                    continue
                worst = [
                    check(loss, d, s, t, y, up, label, slice(i, i + 4)) for i in (0, N // 2, N - 4)
                ]
                errors = [max(e) for e in zip(*worst, strict=True)]
                good = (
                    errors[0] < 2e-5
                    and errors[1] < 2**-7
                    and not loss.isnan().any()
                    and not d.isnan().any()
                )
                wrong += not good
                ms = median(clock(call) for _ in range(options.repeats))
                gb = 3 * size / ms / 1e6
                keep(V, "drkl" if label else "reverse_kl", name, ms, gb, 100 * gb / copy, good)
                print(
                    f"   {name:16} {ms:.3f} ms  {gb:.0f} GB/s of 6 bytes, "
                    f"{100 * gb / copy:.0f} % of copy, x{both / ms:.2f} of two launches"
                    + ("" if good else f"  WRONG {errors}"),
                    flush=True,
                )
        del s, t, y, d
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

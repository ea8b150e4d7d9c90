"""The walk over a row: splits, alignment, strides. Triton's interpreter, and the tiled backend
where it applies.
"""

import importlib
import re
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from bounds import excess

import drkl_triton
from drkl_triton import _loss, drkl, facts, kernels, objectives, ops, tiled
from drkl_triton import algebra as tables
from drkl_triton._layout import rows_of
from drkl_triton.kernels import tuning
from drkl_triton.kernels.row_walk import LINE, Geometry, cut_row

ONE = torch.ones(())
EVERYTHING = sum(1 << k for k in range(6))  # what a scan may sum
GAMMA = torch.tensor([[0.5]])


def drkl_of(launchers, V):
    return _loss.of(launchers, objectives.drkl(), ONE, V)


def sums_of(s, t, label, splits=None, needs=EVERYTHING):
    rows = rows_of(s), rows_of(t)
    return kernels.row_sums(*rows, label, ONE, s.shape[-1], splits=splits, needs=needs)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("V", [700, 4097, 9001])  # fewer tiles than splits, about as many, more
def test_splits_do_not_change_the_sums(V, splits):
    s, t = torch.randn(5, V) * 4, torch.randn(5, V) * 4
    label = torch.tensor([0, V - 1, V // 2, facts.NO_LABEL, facts.IGNORED])
    ours = sums_of(s, t, label, splits=splits)
    truth = tiled.row_sums(
        rows_of(s.double()), rows_of(t.double()), label, ONE.double(), V, needs=EVERYTHING
    )
    assert (ours[1:, 4].nan_to_num(1.0) == 0).all()
    at_label = slice(tables.AT.s_label, tables.AT.t_label + 1)
    assert torch.equal(
        ours[at_label, :3], truth[at_label, :3].float()
    )  # the label's logits are copied
    # both stand relative to the maxima of what they walk first: move them to the rows' own
    tops = []
    for x in (s, t):
        rest = x[:4].double()
        rest[torch.arange(3), label[:3]] = -float("inf")
        tops.append(rest.amax(1))
    ours, truth = (
        torch.stack(tables.moved(sums[:, :4].double(), *tops, ONE.double()))
        for sums in (ours, truth)
    )
    torch.testing.assert_close(ours, truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_do_not_change_the_gradient(splits, monkeypatch):
    V = 9001
    s, t, label = (
        torch.randn(4, V),
        torch.randn(4, V),
        torch.tensor([0, V - 1, 4500, facts.IGNORED]),
    )
    sums = sums_of(s, t, label)
    rows = rows_of(s), rows_of(t), label, GAMMA
    loss = drkl_of(tiled, V)
    table = loss.weights(label, GAMMA, sums, torch.randn(4))
    grads = [loss.write(*rows, table), drkl_of(kernels, V).write(*rows, table)]
    choose = tuning.choose
    monkeypatch.setattr(tuning, "choose", lambda *a, **k: choose(*a, **k | {"splits": splits}))
    grads.append(drkl_of(kernels, V).write(*rows, table))
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("log", [False, True])
def test_splits_do_not_change_softmax(log, splits):
    x, g = torch.randn(3, 9001), torch.randn(3, 9001)
    y, state = kernels.softmax_forward(rows_of(x), ONE, 3, log=log, splits=splits)
    z, tiled_state = tiled.softmax_forward(rows_of(x), ONE, 3, log=log)
    torch.testing.assert_close(y, z, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, tiled_state)
    dx = kernels.softmax_backward(rows_of(x), rows_of(g), ONE, state, log=log, splits=splits)
    torch.testing.assert_close(
        dx, tiled.softmax_backward(rows_of(x), rows_of(g), ONE, state, log=log)
    )


def test_merged_sums_are_the_sums_of_the_whole():
    """tables.merge, in any order, also with a part that holds nothing."""
    s, t = torch.randn(3, 90).double(), torch.randn(3, 90).double()
    s[0, :30] = t[0, :30] = -float("inf")
    label = torch.tensor([facts.NO_LABEL] * 3)

    def cut(a, b):
        return tiled.row_sums(
            rows_of(s[:, a:b]), rows_of(t[:, a:b]), label, ONE.double(), b - a, needs=EVERYTHING
        )

    def common(sums):  # the maxima that the sums are relative to differ
        tops = torch.full((3,), 9.0).double(), torch.full((3,), 8.0).double()
        return torch.stack(tables.moved(sums, *tops, ONE.double()))

    parts = [cut(0, 30), cut(30, 31), cut(31, 90)]
    whole = cut(0, 90)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        merged = parts[order[0]]
        for k in order[1:]:
            merged = tables.merge(merged, parts[k], ONE.double())
        torch.testing.assert_close(common(merged), common(whole), rtol=1e-13, atol=1e-13)
        assert (merged[tables.AT.care] >= whole[tables.AT.care]).all()


def offset(x, columns):
    """The same values in memory whose rows start ``columns`` elements later and lie that much
    further apart.
    """
    room = torch.full((*x.shape[:-1], x.shape[-1] + columns), float("nan"), dtype=x.dtype)
    room[..., columns:] = x
    return room[..., columns:]


@pytest.mark.parametrize("student", [0, 3, 8])  # elements; 8 of bfloat16 are 16 bytes
@pytest.mark.parametrize("teacher", [0, 1, 3])
@pytest.mark.parametrize("V", [5, 64, 2051])
def test_rows_may_start_anywhere(V, student, teacher, backend):
    s, t = torch.randn(6, V).bfloat16(), torch.randn(6, V).bfloat16()
    y = torch.randint(V, (6,))
    strided = offset(s, student), offset(t, teacher)
    assert max(excess("drkl", *strided, y, torch.randn(6), backend=backend)) <= 1


@pytest.mark.parametrize("y", range(0, 45, 4))
def test_the_label_may_be_anywhere(y, backend):
    """Head, first and last vector of the body, tail: 45 columns from an odd address."""
    s, t = (offset(torch.randn(2, 45).bfloat16(), 3) for _ in range(2))
    assert (
        max(excess("drkl", s, t, torch.tensor([y, 44 - y]), torch.randn(2), backend=backend)) <= 1
    )


B, L, V = 3, 4, 70
VIEWS = {
    "slice-of-time": lambda x: x[:, :-1],
    "every-other": lambda x: x[::2, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "slice-of-vocabulary": lambda x: x[..., 5:67],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "expanded-time": lambda x: x[:, :1].expand(-1, 6, -1),
    "flipped-batch": lambda x: x.flatten(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_in_place(view, backend, monkeypatch):
    base = torch.randn(2, B, L, V)
    s, t = VIEWS[view](base[0]), VIEWS[view](base[1])
    for x in (s, t):
        assert rows_of(x).tensor is x  # neither contiguous() nor reshape()
    y = torch.randint(s.shape[-1], s.shape[:-1])
    upstream = torch.randn(s.shape[:-1])
    assert max(excess("drkl", s, t, y, upstream, backend=backend)) <= 1
    # one side strided, the other not
    assert max(excess("drkl", s, t.contiguous(), y, upstream, backend=backend)) <= 1


def test_what_cannot_be_read_in_place_is_copied_and_right(backend):
    wide = torch.randn(2, 3, 4, 5, 70)
    for x in (wide[:, 0, :2, :, ::2], wide.permute(3, 1, 0, 2, 4)[::2, ::2, :, ::3]):
        assert rows_of(x).tensor is not x
        y = torch.randint(x.shape[-1], x.shape[:-1])
        t = torch.randn(x.shape)
        assert max(excess("drkl", x, t, y, torch.randn(x.shape[:-1]), backend=backend)) <= 1


def test_long_rows_are_walked_in_tiles(monkeypatch):
    """The tiled backend with tiles far smaller than a row: its sums merge."""
    monkeypatch.setattr(tiled, "SCRATCH", 400)
    s, t, y = torch.randn(5, 1000) * 3, torch.randn(5, 1000) * 3, torch.randint(1000, (5,))
    s[0, :64] = t[0, :64] = -float("inf")
    for name in ("drkl", "reverse_kl"):
        assert max(excess(name, s, t, y, torch.randn(5), backend="tiled")) <= 1
    x = torch.randn(5, 1000)
    torch.testing.assert_close(drkl_triton.softmax(x, backend="tiled"), x.softmax(-1))


@triton.jit
def cut_kernel(x_ptr, out_ptr, stride, V, LANES: tl.constexpr, VEC: tl.constexpr):
    row = tl.program_id(0)
    G: tl.constexpr = Geometry(LANES, VEC, tl.float32, True)
    head, body = cut_row(x_ptr + row * stride, V, G)
    tl.store(out_ptr + 2 * row, head)
    tl.store(out_ptr + 2 * row + 1, body)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lanes", [32, 128])
@pytest.mark.parametrize("V", [1, 5, 16, 101])
def test_the_body_starts_at_a_boundary(V, lanes, dtype):
    """The interpreter would not mind a wrong start; a GPU would fault or read something else."""
    x = torch.zeros(9, V, dtype=dtype)
    item, vec = x.element_size(), 16 // x.element_size()
    boundary = LINE.value if lanes == 128 or dtype == torch.float64 else 16
    cuts = torch.full((9, 2), -1)
    cut_kernel[(9,)](x, cuts, V, V, LANES=lanes, VEC=vec)
    for row, (head, body) in zip(x, cuts.tolist(), strict=True):
        assert 0 <= head < boundary // item and head + body * vec <= V
        assert body == 0 or (row.data_ptr() + head * item) % boundary == 0
        assert V - head - body * vec < vec
        assert head + 2 * vec <= lanes  # with tail and the label's vector a column a lane


def test_equally_aligned_is_never_promised_wrongly_and_is_seen_where_it_matters():
    def starts(x):
        rows = rows_of(x)
        step = lambda i: (i // rows.inner) * rows.strides[0] + (i % rows.inner) * rows.strides[1]  # noqa: E731
        n = x.numel() // x.shape[-1]
        return [(x.data_ptr() + step(i) * x.element_size()) % 16 for i in range(n)]

    base = torch.zeros(4, 5, 33).bfloat16()
    tensors = {
        "whole": base,
        "copy": base.clone(),
        "slice": base[:, :4],
        "slice-copy": base[:, :4].contiguous(),
        "offset": offset(base, 3),
        "transposed": base.transpose(0, 1),
        "float32": base.float(),
        "even": torch.zeros(4, 5, 48).bfloat16(),
        "even-slice": torch.zeros(4, 9, 48).bfloat16()[:, :5],
    }
    for name, x in tensors.items():
        for other, y in tensors.items():
            if x.numel() // x.shape[-1] != y.numel() // y.shape[-1]:
                continue
            promised = kernels.launch.equally_aligned(rows_of(x), rows_of(y))
            same = x.dtype == y.dtype and starts(x) == starts(y)
            assert same or not promised, (name, other)
    for pair in (("whole", "copy"), ("slice", "slice"), ("even", "even-slice")):
        assert kernels.launch.equally_aligned(*(rows_of(tensors[k]) for k in pair)), pair


@pytest.mark.parametrize("which", ["labels", "weight"])
def test_transposed_labels_and_weight(which, backend):
    s, t = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    rows = dict(labels=torch.randint(8, (5, 3)).T, weight=torch.rand(5, 3).T)
    options = {which: rows[which]}
    straight = {which: rows[which].contiguous()}
    ours = drkl_triton.reverse_kl(s, t, reduction="none", backend=backend, **options)
    assert torch.equal(
        ours, drkl_triton.reverse_kl(s, t, reduction="none", backend=backend, **straight)
    )


LATE = slice(3000, 3010)  # of 5001 columns: neither in what is walked first nor in the ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["student", "teacher", "both", "one-column"])
# nats; the fast way takes 8 (float32) and 15 above the first maximum, which is about 10 here
@pytest.mark.parametrize("rise", [12, 18, 24, 95])
def test_maxima_may_come_late(rise, who, dtype, backend):
    if who == "one-column":  # there float64 rounds log q to 0, which is no truth
        rise = min(rise, 30)
    s, t = torch.randn(4, 5001) * 3, torch.randn(4, 5001) * 3
    late = slice(3000, 3001) if who == "one-column" else LATE
    if who != "teacher":
        s[:, late] += rise
    if who != "student":
        t[:, late] += rise
    s, t, upstream = s.to(dtype), t.to(dtype), torch.randn(4)
    # the label in what is walked first, in the ends, elsewhere, and on the late maximum
    label = torch.tensor([5, 4999, 1500, 3000])
    assert max(excess("reverse_kl", s, t, None, upstream, backend=backend)) <= 1
    assert max(excess("drkl", s, t, label, upstream, backend=backend)) <= 1
    _, ours = drkl_triton.drkl(s, t, label, backend=backend, return_metrics=True)
    _, truth = drkl_triton.reference.drkl(s.double(), t.double(), label, return_metrics=True)
    for field, value in ours._asdict().items():
        expected = getattr(truth, field).to(value.dtype)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=5e-6, msg=field)


IMPLEMENTATIONS = {
    "tiled": partial(tiled.row_sums, needs=facts.METRICS),
    "triton": partial(kernels.row_sums, needs=facts.METRICS, splits=1),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_care_is_taken_where_it_is_needed_and_nowhere_else(implementation):
    s, t = torch.randn(9, 5001) * 3, torch.randn(9, 5001) * 3
    s[1, 3000] = -float("inf")
    t[2, 3000] = -float("inf")  # where the student's is not: seen to be missing
    s[3, 3000] = float("nan")
    t[4, 3000] = float("inf")
    s[5, 4990:], t[5, 4990:] = -float("inf"), -float("inf")  # a padded vocabulary
    s[6, 3000] += 60
    t[7, 3000] += 60
    s[8], t[8] = s[8] / 3, t[8] / 3
    s[8, 3000], t[8, 3000] = 12.0, 10.0
    label = torch.full((9,), 4500)
    for dtype in (torch.float32, torch.bfloat16):
        x, z = rows_of(s.to(dtype)), rows_of(t.to(dtype))
        sums = IMPLEMENTATIONS[implementation](x, z, label, ONE, 5001)
        assert sums[tables.AT.care].tolist() == [0, 1, 2, 1, 1, 1, 0, 0, 0]
    # a label that is out of the sums needs none, wherever it stands and whatever its logit
    for y in (0, 2500, 3000, 5000):
        s, t = torch.randn(1, 5001), torch.randn(1, 5001)
        s[0, y], t[0, y] = 500.0, 80.0
        label = torch.tensor([y])
        sums = IMPLEMENTATIONS[implementation](rows_of(s), rows_of(t), label, ONE, 5001)
        assert sums[tables.AT.care].item() == 0
        assert sums[[0, 4]].abs().max() < 10


class Recorder:
    """Stands for a kernel and keeps what its launches compile in."""

    def __init__(self, kernel):
        self.kernel, self.kept = kernel, set()

    def __getitem__(self, grid):
        def launch(*arguments, **compiled_in):
            self.kept.add(tuple(sorted(compiled_in.items(), key=lambda item: item[0])))
            return self.kernel[grid](*arguments, **compiled_in)

        return launch


def test_the_number_of_splits_is_not_compiled_in(monkeypatch):
    """Short batches have many row counts, and each has its own number of splits."""
    modules = {
        importlib.import_module(f"drkl_triton.kernels.{module}"): names
        for module, names in {
            "row_sums": ["row_sums_kernel", "merge_sums_kernel"],
            "row_grad": ["row_grad_kernel"],
            "softmax": [
                "softmax_sums_kernel",
                "softmax_kernel",
                "softmax_dot_kernel",
                "softmax_grad_kernel",
            ],
        }.items()
    }
    recorders = {}
    for module, names in modules.items():
        for name in names:
            recorders[name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, recorders[name])
    s, t = torch.randn(2, 2100), torch.randn(2, 2100)
    label = torch.tensor([3, facts.NO_LABEL])
    for splits in (1, 2, 3, 8):
        sums = sums_of(s, t, label, splits=splits)
        loss = drkl_of(kernels, 2100)
        table = loss.weights(label, GAMMA, sums, torch.ones(2))
        kernels.row_grad(
            rows_of(s), rows_of(t), label, ONE, table, 2100, splits=splits,
            slopes=loss.program.slopes,
        )  # fmt: skip
        _, state = kernels.softmax_forward(rows_of(s), ONE, 2, splits=splits)
        kernels.softmax_backward(rows_of(s), rows_of(t), ONE, state, splits=splits)
    assert {name: len(r.kept) for name, r in recorders.items()} == {
        name: 1 if name == "merge_sums_kernel" else 2 for name in recorders
    }


@pytest.mark.parametrize("tiles", [1, 31, 125, 256])
@pytest.mark.parametrize("programs", [8, 16])
def test_splits_fill_the_card(tiles, programs):
    places = 132 * programs
    splits = {
        N: tuning.scan_splits(tiles, N, 132, programs)
        for N in [*range(1, 5000), places + 1, 8 * places]
    }
    assert all(1 <= n <= tiles for n in splits.values())
    assert splits[1] == tiles  # all that a single row can have
    assert splits[places] == splits[8 * places] == 1  # whole waves already
    if tiles > 100:
        # just above a whole wave: shared rows, so that the rest is not a wave of its own
        assert splits[places + 1] > 1
        for N in range(places // tiles + 1, places):  # one wave, enough for all of the bandwidth
            assert N * splits[N] > 0.35 * places


@pytest.mark.parametrize("tiles", [0, 1, 7, 31, 125, 256])
def test_shares_of_the_gradient(tiles):
    """Enough programs for the card, of four to eight tiles."""
    for N in (1, 64, 132, 528, 1400, 8192, 10**6):
        splits = tuning.gradient_splits(tiles, N, 132)
        assert 1 <= splits <= max(1, tiles // 4)
        assert splits >= tiles // 8
        assert splits == max(1, tiles // 4) or splits * N >= 0.5 * 132 * 16


# Of PyTorch's operators, those that allocate or look at memory another way.
NO_LAUNCH = "empty|as_strided|view|reshape|expand|slice|select|detach|alias|promote_types"


@pytest.mark.parametrize("options", [{}, dict(num_items=7.0), dict(reduction="sum", shift=True)])
def test_launches_of_a_step(options, monkeypatch):
    """As on a GPU: the kernels, and PyTorch's operators on tensors that are not empty. 213 were the
    arithmetic of rows alone, once; they took as long as both kernels at V = 32,000.
    """
    kernels_launched = []
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    monkeypatch.setattr(executor, "__call__", lambda self, *a, **k: kernels_launched.append(self))
    monkeypatch.setattr(kernels.launch, "new_output", lambda *of: torch.empty(of[0], dtype=of[1]))
    monkeypatch.setattr(ops, "_check_labels", lambda *args: None)  # on the CPU alone
    s, t = torch.randn(2, 3, 500).requires_grad_(), torch.randn(2, 3, 500)
    y = torch.ones(2, 3).int()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], record_shapes=True) as profile:
        loss = drkl(s, t, y, backend="triton", **options)
        loss.backward()
    operators = [
        event.name
        for event in profile.events()
        if re.fullmatch(r"aten::\w+", event.name)
        and not event.cpu_children
        and not re.fullmatch(rf"aten::_?({NO_LAUNCH})\w*", event.name)
        and not any(0 in shape for shape in event.input_shapes)
    ]
    assert len(kernels_launched) >= 5 and s.grad is not None
    assert len(kernels_launched) + len(operators) <= 12, operators

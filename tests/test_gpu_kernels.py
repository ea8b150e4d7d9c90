"""The kernels on a GPU, at the sizes they are for. TRITON_INTERPRET=0 pytest -m gpu

Every test with sizes also runs small, on the CPU in Triton's interpreter, so that what waits for a
GPU is known to work.
"""

import importlib
import sys
from pathlib import Path
from unittest.mock import patch

import losses
import pytest
import test_edges
import test_kernels
import test_numerics
import test_sparse
import torch
from bounds import excess, run
from torch._dynamo.testing import CompileCounterWithBackend

from drkl_triton import (
    algebra,
    drkl,
    facts,
    kernels,
    log_softmax,
    reference,
    reverse_kl,
    softmax,
    teacher_topk,
)
from drkl_triton._layout import rows_of
from drkl_triton.kernels import tuning

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
allocations = importlib.import_module("timing").allocations

INF, NAN = float("inf"), float("nan")
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)

gpu = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
bf16_and_fp32 = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=SHORT.get)


def sizes(*real, small):
    """Runs a test with (device, N, V): the real ones on a GPU, the small one interpreted."""
    on_gpu = [pytest.param("cuda", *size, marks=gpu, id="x".join(map(str, size))) for size in real]
    small = pytest.param("cpu", *small, id="small")
    return pytest.mark.parametrize("device, N, V", [*on_gpu, small])


def needs(device, nbytes):
    """Skips the test where the GPU has no such room left."""
    if device == "cuda":
        left = torch.cuda.mem_get_info()[0]
        left += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if left < nbytes:
            pytest.skip(f"needs {nbytes / 1e9:.0f} GB of GPU memory, {left / 1e9:.0f} are free")


def draw(device, N, V, dtype, teacher_dtype=None):
    """(student, teacher, labels, upstream): distinct rows, every other label the teacher's
    favourite, upstream gradients random.
    """
    s = torch.randn(N, V, device=device, dtype=dtype).mul_(3)
    t = torch.randn(N, V, device=device, dtype=teacher_dtype or dtype).mul_(3)
    y = torch.randint(V, (N,), device=device)
    y[::2] = t[::2].argmax(-1)
    return s, t, y, torch.randn(N, device=device)


class Given(torch.autograd.Function):
    """A loss whose value and gradient are known."""

    @staticmethod
    def forward(ctx, student, loss, grad):
        ctx.grad = grad
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.grad, None, None


def excess_of(loss, grad, name, *inputs, **options):
    """bounds.excess of a result that is already there."""
    given = lambda student, *_, **__: Given.apply(student, loss, grad)  # noqa: E731
    with patch.object(losses, "ours", lambda _: given):
        return excess(name, *inputs, backend="given", **options)


# --- right at real sizes ---


@dtypes
@sizes(*((512, V) for V in VOCABULARIES), small=(3, 701))
def test_drkl_against_float64(device, N, V, dtype):
    """512 rows: one program each on cards of up to 256 multiprocessors."""
    needs(device, 300 * N * V)
    s, t, y, upstream = draw(device, N, V, dtype)
    y[1::7] = -100
    assert max(excess("drkl", s, t, y, upstream, backend="triton", gamma=0.7)) <= 1


@sizes(*((512, V) for V in VOCABULARIES), small=(3, 701))
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labelled"])
def test_reverse_kl_against_float64(device, N, V, labelled):
    needs(device, 300 * N * V)
    s, t, y, upstream = draw(device, N, V, torch.bfloat16)
    y = y if labelled else None
    assert max(excess("reverse_kl", s, t, y, upstream, backend="triton", temperature=1.7)) <= 1


@bf16_and_fp32
@sizes((1, 50257), (8, 128256), (8, 50257), (132, 262144), small=(2, 9001))
def test_few_rows_against_float64(device, N, V, dtype):
    """Fewer rows than programs fit on the card: each is split over several and merged."""
    s, t, y, upstream = draw(device, N, V, dtype)
    assert max(excess("drkl", s, t, y, upstream, backend="triton")) <= 1


@sizes((8192, 128256), (8192, 50257), small=(18, 301))
def test_many_rows_against_float64(device, N, V):
    """The first, the last and some rows between."""
    needs(device, 10 * N * V)
    s, t, y, upstream = draw(device, N, V, torch.bfloat16)
    loss, grad = run(drkl, s, t, y, upstream, backend="triton")
    for rows in (slice(16), slice(N // 2, N // 2 + 16), slice(N - 16, N)):
        inputs = (x[rows] for x in (s, t, y, upstream))
        assert max(excess_of(loss[rows], grad[rows], "drkl", *inputs)) <= 1


@sizes((128, 50257), (512, 128256), small=(4, 901))
def test_metrics_against_float64(device, N, V):
    s, t, y, _ = draw(device, N, V, torch.bfloat16)
    _, ours = drkl(s, t, y, return_metrics=True, backend="triton")
    _, truth = reference.drkl(s.double(), t.double(), y, return_metrics=True)
    for name, value in truth._asdict().items():
        values = getattr(ours, name).double(), value.double()
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


@bf16_and_fp32
@sizes((512, 50257), (512, 128256), small=(3, 901))
def test_teacher_support_against_float64(device, N, V, dtype):
    """The same as taking the teacher's excluded columns from the student by hand."""
    s, t, y, upstream = draw(device, N, V, dtype)
    y.clamp_(max=V // 3 - 1)
    t[:, V // 3 : V // 2] = -INF
    t[:, -3:] = -INF
    result = run(drkl, s, t, y, upstream, support="teacher", backend="triton")
    masked = s.masked_fill(t == -INF, -INF)
    assert max(excess_of(*result, "drkl", masked, t, y, upstream)) <= 1


# --- every number of programs ---


@bf16_and_fp32
@sizes((3, 50257), (3, 128256), small=(2, 5003))
def test_every_number_of_splits(device, N, V, dtype, monkeypatch):
    s, t, y, upstream = draw(device, N, V, dtype)
    y[0], s[1, V * 2 // 3] = V - 1, -INF
    choose = tuning.choose
    for splits in range(1, 34) if device == "cuda" else (1, 2, 5, 33):
        monkeypatch.setattr(
            tuning, "choose", lambda *a, n=splits, **k: choose(*a, **k | {"splits": n})
        )
        result = run(drkl, s, t, y, upstream, backend="triton")
        assert max(excess_of(*result, "drkl", s, t, y, upstream)) <= 1, splits


@sizes((1, 32000), (4, 32000), (10, 32000), (16, 32000), small=(2, 301))
def test_row_counts_around_a_full_wave(device, N, V):
    """One row fewer, as many, and one more than N programs on every multiprocessor."""
    units = tuning._device_shape(torch.device(device))[0] if device == "cuda" else 1
    for rows in (N * units + i for i in (-1, 0, 1)):
        s, t, y, upstream = draw(device, rows, V, torch.bfloat16)
        loss, grad = run(drkl, s, t, y, upstream, backend="triton")
        for part in (slice(4), slice(-4, None)):
            inputs = (x[part] for x in (s, t, y, upstream))
            assert max(excess_of(loss[part], grad[part], "drkl", *inputs)) <= 1, rows


@dtypes
@sizes((64, 50257), (512, 128256), small=(3, 5003))
def test_masks_of_the_lowest_finite_number(device, N, V, dtype):
    """Of the student, of both in part, and a padded vocabulary."""
    s, t, y, upstream = draw(device, N, V, dtype)
    low = torch.finfo(dtype).min
    y.clamp_(max=V // 8)
    s[::3, V // 3 :], t[::3, V // 2 :] = low, low
    s[1::3, V // 4 :: 2], t[1::3, V // 4 :: 4] = low, low
    s[2::3, -50:] = t[2::3, -50:] = low
    assert max(excess("drkl", s, t, y, upstream, backend="triton")) <= 1
    assert max(excess("reverse_kl", s, t, None, upstream, backend="triton")) <= 1


# --- rows that are scanned twice, rows that start anywhere ---


@bf16_and_fp32
@sizes((14, 128256), (512, 50257), (512, 128256), small=(7, 5003))
def test_rows_that_need_care(device, N, V, dtype):
    """What the fast loop meets in the middle of a row; infinities and NaN it cannot sum."""
    s, t, y, upstream = draw(device, N, V, dtype)
    y.remainder_(V // 4)  # the label's tile is walked first: far from what follows
    third, half, late = V // 3, V // 2, V * 3 // 4
    kinds = 7  # row 0, 7, ...: nothing special
    s[1::kinds, third:half] = t[1::kinds, third:half] = -INF
    s[2::kinds, third:half] = -INF
    s[3::kinds, late] = 60
    t[4::kinds, late] = 60
    t[5::kinds, late] = -INF  # the loss is +inf
    s[6::kinds, late] = NAN
    one = torch.ones((), device=device)
    pair = rows_of(s), rows_of(t)
    sums = kernels.row_sums(*pair, y, one, V, splits=1, needs=facts.METRICS)
    care = sums[algebra.AT.care]
    kind = torch.arange(N, device=device) % kinds
    expected = (kind != 0) & (kind != 3) & (kind != 4)  # maxima may rise where they like
    assert torch.equal(care.bool(), expected)
    assert max(excess("drkl", s, t, y, upstream, backend="triton")) <= 1


@pytest.mark.parametrize("offsets", [(3, 3), (8, 0), (3, 1), (0, 1)], ids=str)
@sizes((64, 32000), (64, 50257), (512, 50257), small=(3, 701))
def test_rows_that_start_off_a_16_byte_boundary(device, N, V, offsets):
    s, t, y, upstream = draw(device, N, V, torch.bfloat16)
    with torch.device(device):
        s, t = (test_kernels.offset(x, by) for x, by in zip((s, t), offsets, strict=True))
    assert max(excess("drkl", s, t, y, upstream, backend="triton")) <= 1


@sizes((64, 32000), (512, 50257), small=(3, 701))
def test_a_teacher_of_another_dtype(device, N, V):
    for dtype, teacher_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        s, t, y, upstream = draw(device, N, V, dtype, teacher_dtype)
        assert max(excess("drkl", s, t, y, upstream, backend="triton")) <= 1


@sizes((64, 50257), small=(4, 701))
def test_views_are_read_in_place(device, N, V):
    """[B, T, V] without its last position, transposed, and one teacher row for all."""
    s, t, _, _ = draw(device, N, V, torch.bfloat16)
    s, t = s.view(2, -1, V), t.view(2, -1, V)
    views = [
        (s[:, :-1], t[:, :-1]),
        (s.transpose(0, 1), t.transpose(0, 1)),
        (s, t[:1].expand_as(s)),
    ]
    for x, z in views:
        y = torch.randint(V, x.shape[:-1], device=device)
        upstream = torch.randn(x.shape[:-1], device=device)
        assert max(excess("drkl", x, z, y, upstream, backend="triton")) <= 1


# --- more than 2^31 elements ---


@sizes((2050, 2**20), small=(14, 520))
def test_offsets_beyond_2_31(device, N, V):
    """Ignored rows are not read (they are NaN) and get gradient 0. The others are at both ends."""
    needs(device, 7 * N * V)
    s, t = (torch.full((N, V), NAN, device=device, dtype=torch.bfloat16) for _ in range(2))
    live = torch.tensor([0, 1, N - 3, N - 1], device=device)
    s[live], t[live], _, _ = draw(device, 4, V, torch.bfloat16)
    y = torch.full((N,), -100, device=device)
    y[live] = torch.tensor([V - 1, 5, 0, V - 2], device=device)
    upstream = torch.randn(N, device=device)
    loss, grad = run(drkl, s, t, y, upstream, backend="triton")
    inputs = (x[live] for x in (s, t, y, upstream))
    assert max(excess_of(loss[live], grad[live], "drkl", *inputs)) <= 1
    loss[live], grad[live] = 0, 0
    assert (loss == 0).all() and all((rows == 0).all() for rows in grad.split(64))


@sizes((8200, 262144), small=(14, 520))
def test_every_row_of_more_than_2_31_elements(device, N, V):
    needs(device, 7 * N * V)
    s, t, y, upstream = draw(device, N, V, torch.bfloat16)
    loss, grad = run(reverse_kl, s, t, None, upstream, backend="triton")
    assert loss.isfinite().all() and all(rows.isfinite().all() for rows in grad.split(64))
    for rows in (slice(4), slice(N // 2, N // 2 + 4), slice(N - 10, N)):
        inputs = (s[rows], t[rows], None, upstream[rows])
        assert max(excess_of(loss[rows], grad[rows], "reverse_kl", *inputs)) <= 1


@pytest.mark.parametrize("function", [softmax, log_softmax])
@sizes((8200, 262144), small=(14, 520))
def test_softmax_of_more_than_2_31_elements(device, N, V, function):
    """The rows at the ends come out as they do by themselves, where test_numerics.py has them."""
    needs(device, 9 * N * V)
    x, g, _, _ = draw(device, N, V, torch.bfloat16)

    def both(x, g):
        x = x.detach().requires_grad_()
        y = function(x, backend="triton")
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    results = both(x, g)
    for rows in (slice(4), slice(N - 10, N)):
        for ours, alone in zip(results, both(x[rows], g[rows]), strict=True):
            atol = 1e-6 * alone.abs().max().item()
            torch.testing.assert_close(ours[rows], alone, rtol=2 * 2**-8, atol=atol)


# --- memory, compilation, determinism, streams ---

SCALARS_A_ROW = 128  # of 4 bytes: the sums, the labels, and what O(rows) arithmetic passes through
BLOCKS = 2**12  # 0-dim tensors


@sizes((4096, 128256), (512, 50257), small=(4, 5003))
def test_peak_memory_is_the_outputs_and_o_of_n(device, N, V):
    s, t, y, upstream = draw(device, N, V, torch.bfloat16)
    rows = 4 * SCALARS_A_ROW * N + BLOCKS
    s.requires_grad_()
    calls = {
        "drkl": lambda: drkl(s, t, y, reduction="none", backend="triton"),
        "reverse_kl": lambda: reverse_kl(s, t, reduction="none", backend="triton"),
        "metrics": lambda: drkl(s, t, y, reduction="none", return_metrics=True, backend="triton")[
            0
        ],
        "softmax": lambda: softmax(s, backend="triton"),
        "log_softmax": lambda: log_softmax(s, backend="triton"),
    }
    for name, call in calls.items():
        out = call()  # compiles the kernels
        g = t if out.dim() == 2 else upstream
        torch.autograd.grad(out, s, g)
        written = out.nbytes
        del out
        with allocations(torch.device(device)) as forward:
            out = call()
        with allocations(torch.device(device)) as backward:
            (grad,) = torch.autograd.grad(out, s, g)
        assert forward.peak <= written + rows, name
        assert forward.live <= written + rows, name
        assert grad.nbytes <= backward.peak <= grad.nbytes + rows, name
        del out, grad


@sizes((64, 50257), small=(3, 701))
def test_compiled_in_one_graph(device, N, V):
    compiler = "inductor" if device == "cuda" else "aot_eager"
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    s, t, y, upstream = draw(device, N, V, torch.bfloat16)
    compiled = torch.compile(drkl, fullgraph=True, backend=counter)
    result = run(compiled, s, t, y, upstream, backend="triton", gamma=0.3)
    assert max(excess_of(*result, "drkl", s, t, y, upstream, gamma=0.3)) <= 1
    assert counter.frame_count == 1


@sizes((64, 50257), small=(2, 301))
def test_compiled_for_all_numbers_of_rows(device, N, V):
    """One graph for the first, one for all others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    compiled = torch.compile(drkl, fullgraph=True, backend=counter)
    for rows in (N, N + 3, 2 * N + 1, N)[: 4 if device == "cuda" else 2]:
        s, t, y, upstream = draw(device, rows, V, torch.bfloat16)
        result = run(compiled, s, t, y, upstream, backend="triton")
        assert max(excess_of(*result, "drkl", s, t, y, upstream)) <= 1
    assert counter.frame_count <= 2


@gpu
def test_compiled_into_cuda_graphs():
    """mode="reduce-overhead": warmed up, recorded, replayed on other logits."""
    torch._dynamo.reset()
    compiled = torch.compile(drkl, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        s, t, y, upstream = draw("cuda", 64, 50257, torch.bfloat16)
        result = [x.clone() for x in run(compiled, s, t, y, upstream, backend="triton")]
        assert max(excess_of(*result, "drkl", s, t, y, upstream)) <= 1


@sizes((2048, 50257), (8, 262144), small=(2, 9001))
def test_the_same_bits_again(device, N, V):
    s, t, y, upstream = draw(device, N, V, torch.bfloat16)
    first = run(drkl, s, t, y, upstream, backend="triton")
    for _ in range(3):
        again = run(drkl, s, t, y, upstream, backend="triton")
        assert all(map(torch.equal, again, first))


@gpu
def test_work_goes_to_the_current_stream():
    """The logits are copied there behind a pause: on another stream they would still be NaN."""
    s, t, y, upstream = draw("cuda", 16, 50257, torch.bfloat16)
    expected = run(drkl, s, t, y, upstream, backend="triton")
    late_s, late_t = torch.full_like(s, NAN), torch.full_like(t, NAN)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
        late_s.copy_(s)
        late_t.copy_(t)
        result = run(drkl, late_s, late_t, y, upstream, backend="triton")
    stream.synchronize()
    assert all(map(torch.equal, result, expected))


@gpu
def test_two_streams_at_once():
    """Each with rows that are split, whose parts lie in memory of their own."""
    cases = [draw("cuda", 4, 128256, torch.bfloat16) for _ in range(2)]
    expected = [run(drkl, *case, backend="triton") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for stream, case, kept in zip(streams, cases, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(run(drkl, *case, backend="triton"))
    torch.cuda.synchronize()
    for kept, right in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for pair in kept for a, b in zip(pair, right, strict=True))


# --- what other files show in the interpreter ---


@gpu
class OnTheCard:
    """Tests of other files with every tensor on the card. Each class can be run by itself."""

    device = "cuda"

    @pytest.fixture
    def backend(self):
        return "triton"

    @pytest.fixture
    def implementation(self):
        return "triton"

    @pytest.fixture(autouse=True)
    def on_the_card(self, monkeypatch):
        regimes = test_numerics.regimes

        def moved(*arguments):
            with torch.device("cpu"):
                return tuple(x.to(self.device) for x in regimes(*arguments))

        monkeypatch.setattr(test_numerics, "regimes", moved)
        with torch.device(self.device):
            yield


def on_the_card(name, *tests):
    return type(name, (OnTheCard,), {test.__name__: staticmethod(test) for test in tests})


TestNumericsOnTheCard = on_the_card(
    "TestNumericsOnTheCard",
    test_numerics.test_loss_and_gradient_within_bound,
    test_numerics.test_softmax_within_bound,
    test_numerics.test_gamma,
    test_numerics.test_temperature,
    test_numerics.test_mixed_dtypes,
    test_numerics.test_both_are_sure_of_a_column_far_down_the_row,
    test_numerics.test_gradcheck,
)
TestEdgesOnTheCard = on_the_card(
    "TestEdgesOnTheCard",
    test_edges.test_columns_out_of_both_or_out_of_the_student_are_as_if_absent,
    test_edges.test_teacher_excludes_what_the_student_allows,
    test_edges.test_student_excludes_the_label,
    test_edges.test_student_finite_at_the_label_only,
    test_edges.test_one_column,
    test_edges.test_broken_rows_are_nan_and_only_they,
    test_edges.test_masked_regions_of_long_rows,
    test_edges.test_softmax_edges,
    test_edges.test_finite_extremes_do_not_turn_into_nan,
    test_edges.test_masks_written_with_the_lowest_finite_number,
    test_edges.test_large_gradients_stay_zero_where_the_student_is_out,
    test_edges.test_one_hot_student_of_finite_logits,
    test_edges.test_masks_of_the_lowest_finite_number_that_overlap_in_part,
    test_edges.test_such_masks_anywhere_in_long_rows,
    test_edges.test_a_teacher_of_masks_the_student_does_not_share,
    test_edges.test_a_label_at_the_lowest_finite_number,
    test_edges.test_every_temperature_that_is_documented,
)
TestWalkOnTheCard = on_the_card(
    "TestWalkOnTheCard",
    test_kernels.test_the_label_may_be_anywhere,
    test_kernels.test_rows_may_start_anywhere,
    test_kernels.test_views_are_read_in_place,
    test_kernels.test_maxima_may_come_late,
)


@sizes((4096, 128256), (33, 50257), small=(3, 130))
@bf16_and_fp32
def test_sparse_teachers(device, N, V, dtype):
    """Some rows against float64, and the whole batch against them."""
    needs(device, 40 * N * V)
    student = (3 * torch.randn(N, V, device=device)).to(dtype)
    teacher = 3 * torch.randn(N, V, device=device) + student
    labels = torch.randint(V, (N,), device=device)
    upstream = torch.rand(N, device=device) + 0.5
    whole = teacher_topk(teacher, 20, labels=labels, backend="triton")
    few = slice(0, 8 if device == "cuda" else 2)
    known = teacher_topk(teacher[few], 20, labels=labels[few], backend="triton")
    for name in ("drkl", "js_divergence"):
        given = student[few], known, labels[few], upstream[few]
        worst = test_sparse.excess(name, *given, backend="triton")
        assert max(worst) <= 1, (name, worst)
        arguments = student, whole, labels, upstream
        loss, grad = test_sparse.run(test_sparse.drkl_triton, name, *arguments, backend="triton")
        one, other = test_sparse.run(test_sparse.drkl_triton, name, *given, backend="triton")
        torch.testing.assert_close(loss[few], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad[few], other, rtol=2e-2, atol=1e-6)

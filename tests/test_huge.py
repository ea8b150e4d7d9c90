"""More than 2^31 elements: 2,050 rows of 2^20 bfloat16 columns, one of which, near the end, counts.

Rows that do not count are not read, so most of the memory is never touched; their gradient is
written, 4.3 GB of zeros, which would take Triton's interpreter half an hour. There the rows are
either narrow or two, and start as far into the tensor.
"""

import pytest
import torch

from drkl_triton import (
    _layout,
    _loss,
    drkl,
    facts,
    kernels,
    objectives,
    reference,
    reverse_kl,
    tiled,
)

pytestmark = pytest.mark.usefixtures("wide_tiles")

N, V, ROW = 2050, 1 << 20, 2048
OPS = {"reverse_kl": reverse_kl, "drkl": drkl}
assert ROW * V >= 2**31


@pytest.fixture(scope="module")
def tensors():
    """(student, teacher) [N, V]; memory that nobody has written, but for the row."""
    generator = torch.Generator().manual_seed(1)
    both = [torch.empty(N, V, dtype=torch.bfloat16) for _ in range(2)]
    for x in both:
        x[ROW] = 3 * torch.randn(V, generator=generator)
    return both


def truth(op, student, teacher, label, **options):
    """(loss, gradient) of the row, float64."""
    s = student.detach().double().requires_grad_()
    loss = getattr(reference, op)(
        s[None], teacher.double()[None], torch.tensor([label]), reduction="sum", **options
    )
    return loss.detach(), torch.autograd.grad(loss, s)[0]


def check(op, student, teacher, row, label, backend):
    labels = torch.full((len(student),), -100)
    labels[row] = label
    student.requires_grad_()
    loss = OPS[op](student, teacher, labels, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    expected, expected_grad = truth(op, student[row], teacher[row], label)
    student.requires_grad_(False)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    close(grad[row], expected_grad)
    for start in range(0, len(grad), 64):  # a copy of the whole would be 2 GB
        rows = grad[start : start + 64]
        assert rows.count_nonzero() == (
            grad[row].count_nonzero() if start <= row < start + 64 else 0
        )


def close(grad, expected):
    # one unit of bfloat16, which the interpreter truncates to, and of its smallest numbers
    torch.testing.assert_close(grad.double(), expected, rtol=2**-7, atol=1e-10)


def test_tiled(tensors):
    check("drkl", *tensors, ROW, V - 2, "tiled")


def test_kernels_in_narrow_rows(tensors):
    """997 columns of every 64th row."""
    check("reverse_kl", *(x[::64, -997:] for x in tensors), ROW // 64, 995, "triton")


def test_kernels_in_whole_rows(tensors):
    """Rows 0 and 2,048 as a tensor whose stride is 2^31."""
    apart = [x.as_strided((2, V), (ROW * V, 1)) for x in tensors]
    check("drkl", *apart, 1, V - 2, "triton")


@pytest.mark.parametrize("launchers", [tiled, kernels], ids=["tiled", "triton-interpreted"])
def test_the_gradient_may_be_written_beyond(launchers, tensors):
    out = torch.empty(N, V, dtype=torch.bfloat16).as_strided((2, V), (ROW * V, 1))
    rows = [_layout.rows_of(x.as_strided((2, V), (ROW * V, 1))) for x in tensors]
    label, one = torch.tensor([facts.IGNORED, V - 2]), torch.tensor(1.0)
    gamma, loss = torch.tensor([[0.5]]), _loss.of(launchers, objectives.drkl(), one, V)
    sums = loss.sums(*rows, label, gamma)
    loss.gradient(*rows, label, gamma, sums, torch.ones(2), out=out)
    assert out[0].count_nonzero() == 0
    close(out[1], truth("drkl", *(x[ROW] for x in tensors), V - 2, gamma=0.5)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "tiled"])
def test_on_a_gpu(backend, tensors):
    on_device = []
    for x in tensors:
        y = torch.empty(N, V, dtype=torch.bfloat16, device="cuda")
        y[ROW] = x[ROW].cuda()
        on_device.append(y)
    labels = torch.full((N,), -100, device="cuda")
    labels[ROW] = V - 2
    loss = drkl(
        on_device[0].requires_grad_(), on_device[1], labels, reduction="sum", backend=backend
    )
    (grad,) = torch.autograd.grad(loss, on_device[0])
    expected, expected_grad = truth("drkl", *(x[ROW] for x in tensors), V - 2)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    close(grad[ROW].cpu(), expected_grad)
    assert grad.count_nonzero() == grad[ROW].count_nonzero()

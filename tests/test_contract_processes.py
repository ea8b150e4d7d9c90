"""What only a fresh process shows: the interpreter switched off, python -O, no Triton installed."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import drkl_triton

PRELUDE = """
import re, torch, drkl_triton
from drkl_triton import drkl, ops, reverse_kl, softmax

s, t, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.tensor([1, -100, 4])

def must_raise(error, *parts, call):
    # no assert here: these lines must bite under python -O too
    try:
        call()
    except error as caught:
        for part in parts:
            if not re.search(part, str(caught)):
                raise SystemExit(f"no {part!r} in: {caught}")
    else:
        raise SystemExit(f"no {error.__name__} for {parts}")

def must_work(backend):
    loss = drkl(s, t, y, backend=backend)
    loss.backward()
    if not (loss > 0 and (s.grad[1] == 0).all() and s.grad[0].abs().max() > 0):
        raise SystemExit(f"wrong: {loss}, {s.grad}")
    s.grad = None
"""

# Every public function; a result is the loss and the gradients that there are.
EVERYTHING = """
from concurrent.futures import ThreadPoolExecutor
from drkl_triton import linear_drkl, linear_reverse_kl, log_softmax
from drkl_triton.adapters import distillm

h, w, tl = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
batch = {"label": y}
given = {"teacher_logits": tl}
known = drkl_triton.teacher_topk(t, 2, labels=y)
objectives = drkl_triton.objectives
mix = 0.5 * objectives.js_divergence(0.3) + objectives.dkd() + 0.1 * objectives.cross_entropy()
PUBLIC = {
    "softmax": lambda s, h, w, **o: softmax(s, **o),
    "log_softmax": lambda s, h, w, **o: log_softmax(s, **o),
    "reverse_kl": lambda s, h, w, **o: reverse_kl(s, t, **o),
    "drkl": lambda s, h, w, **o: drkl(s, t, y, **o),
    "ReverseKLLoss": lambda s, h, w, **o: drkl_triton.ReverseKLLoss(**o)(s, t, y),
    "DRKLLoss": lambda s, h, w, **o: drkl_triton.DRKLLoss(**o)(s, t, y),
    "linear_reverse_kl": lambda s, h, w, **o: linear_reverse_kl(h, w, **given, **o),
    "linear_drkl": lambda s, h, w, **o: linear_drkl(
        h, w, y, teacher_hidden=h.detach(), teacher_weight=w.detach() * 2, **o
    ),
    "LinearReverseKLLoss": lambda s, h, w, **o: drkl_triton.LinearReverseKLLoss(**o)(
        h, w, y, **given
    ),
    "LinearDRKLLoss": lambda s, h, w, **o: drkl_triton.LinearDRKLLoss(recompute=True, **o)(
        h, w, y, **given
    ),
    "divergence": lambda s, h, w, **o: drkl_triton.divergence(mix, s, t, y, **o),
    "DivergenceLoss": lambda s, h, w, **o: drkl_triton.DivergenceLoss(mix, **o)(s, t, y),
    "linear_divergence": lambda s, h, w, **o: drkl_triton.linear_divergence(
        mix, h, w, y, **given, **o
    ),
    "SparseTeacher": lambda s, h, w, **o: drkl(s, known, y, **o),
    "log_probs_at": lambda s, h, w, **o: drkl_triton.log_probs_at(s, known.ids, **o)[1],
    "linear_log_probs_at": lambda s, h, w, **o: drkl_triton.linear_log_probs_at(
        h, w, known.ids, **o
    )[0],
    "teacher_topk": lambda s, h, w, **o: reverse_kl(s, drkl_triton.teacher_topk(t, 2, **o), **o),
    "union_ids": lambda s, h, w, **o: drkl_triton.log_probs_at(
        s, drkl_triton.union_ids(s, t, 2), **o
    )[1],
    "sampled_teacher": lambda s, h, w, **o: drkl_triton.forward_kl(
        s, drkl_triton.sampled_teacher(known.ids), **o
    ),
    "LinearDivergenceLoss": lambda s, h, w, **o: drkl_triton.LinearDivergenceLoss(mix, **o)(
        h, w, y, **given
    ),
    "alpha_beta": lambda s, h, w, **o: drkl_triton.alpha_beta(s, t, alpha=0.5, beta=0.3, **o),
    "cross_entropy": lambda s, h, w, **o: drkl_triton.cross_entropy(s, y, **o),
    "objectives": lambda s, h, w, **o: drkl_triton.divergence(objectives.z_loss(), s, **o),
    "reference": lambda s, h, w, **o: drkl_triton.reference.drkl(s, t, y),
    "RowMetrics": lambda s, h, w, **o: drkl(s, t, y, return_metrics=True, **o)[0],
}
def call(name):
    return lambda s, h, w, **o: getattr(drkl_triton, name)(s, t, y, **o)
for name in (
    "adaptive_kl", "dkd", "forward_kl", "js_divergence", "mixed_kl", "skew_kl", "skew_reverse_kl",
    "total_variation",
):
    PUBLIC[name] = call(name)
if PUBLIC.keys() | {"__version__"} != set(drkl_triton.__all__):
    raise SystemExit("not every public name is tried")
PUBLIC["distillm.reverse_kl"] = lambda s, h, w, **o: distillm.reverse_kl(s, t, batch, **o)
PUBLIC["distillm.drkl"] = lambda s, h, w, **o: distillm.drkl(s, t, batch, **o)

def result(name, backend):
    leaves = [x.detach().clone().requires_grad_() for x in (s, h, w)]
    out = PUBLIC[name](*leaves, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]

def all_functions(backend):
    # alone, then all from several threads at once: the same bits
    alone = {name: result(name, backend) for name in PUBLIC}
    for name, values in alone.items():
        if len(values) < 2 or not all(x.isfinite().all() for x in values):
            raise SystemExit(f"wrong: {name} {values}")
    with ThreadPoolExecutor(8) as pool:
        names = list(PUBLIC) * 4
        if backend == "triton":  # the interpreter locks
            names = ["drkl", "js_divergence", "linear_drkl", "softmax", "SparseTeacher", "drkl"]
        for name, values in zip(names, pool.map(lambda n: result(n, backend), names)):
            if not all(map(torch.equal, values, alone[name])):
                raise SystemExit(f"{name} differs in a thread: {values} {alone[name]}")
"""

# find_spec and import both answer as if nobody had ever installed it.
HIDE_TRITON = """
import sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, *args)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
import importlib.util
if importlib.util.find_spec("triton") is not None:
    raise SystemExit("not hidden")
"""

GPU_NEEDED = """
for call in (
    lambda: drkl(s, t, y, backend="triton"),
    lambda: reverse_kl(s, t, backend="triton"),
    lambda: softmax(s, backend="triton"),
    lambda: drkl_triton.DRKLLoss(backend="triton")(s, t, y),
):
    parts = 'backend="triton"', "GPU", "got cpu", "TRITON_INTERPRET=1", "tiled"
    must_raise(ValueError, *parts, call=call)
for backend in ("auto", "tiled"):
    must_work(backend)
"""

ERRORS = """
if __debug__:
    raise SystemExit("not under -O")
must_raise(ValueError, "labels", "got 6", call=lambda: drkl(s, t, y + 5))
must_raise(ValueError, "leading shape", call=lambda: drkl(s, t[:2], y))
must_raise(TypeError, "labels", call=lambda: drkl(s, t, y.float()))
must_raise(TypeError, "student_logits", call=lambda: drkl(s.tolist(), t, y))
must_raise(ValueError, "gamma", call=lambda: drkl(s, t, y, gamma=-1))
must_raise(ValueError, "temperature", call=lambda: softmax(s, temperature=0))
must_raise(ValueError, "reduction", call=lambda: reverse_kl(s, t, reduction="avg"))
must_raise(ValueError, "num_items", call=lambda: reverse_kl(s, t, reduction="sum", num_items=3))
must_raise(ValueError, "teacher_logits", "detach", call=lambda: reverse_kl(s, s))
must_raise(ValueError, "shift", call=lambda: reverse_kl(s, t, shift=True))
(grad,) = torch.autograd.grad(drkl(s, t, y), s, create_graph=True)
must_raise(RuntimeError, "second derivatives", call=lambda: grad.sum().backward())
"""


def run(*scripts, optimise=False, **variables):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONOPTIMIZE")}
    script = textwrap.dedent("".join(scripts))
    result = subprocess.run(
        [sys.executable, *(["-O"] if optimise else []), "-c", script],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_on_the_cpu_without_the_interpreter():
    """And every error again without asserts."""
    run(PRELUDE, EVERYTHING, GPU_NEEDED, ERRORS, 'all_functions("tiled")', optimise=True)
    run(PRELUDE, GPU_NEEDED, TRITON_INTERPRET="0")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_interpreter_in_the_optimised_python():
    quick = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
    quick += "import quick_interpreter; quick_interpreter.install()\n"
    code = 'must_work("triton")\nall_functions("triton")\n'
    run(PRELUDE, EVERYTHING, quick, code, ERRORS, optimise=True, TRITON_INTERPRET="1")


def test_without_triton():
    """Importing, auto and tiled work, whatever the interpreter's variable says."""
    asked_for = """
for call in (
    lambda: drkl(s, t, y, backend="triton"),
    lambda: reverse_kl(s, t, backend="triton"),
    lambda: softmax(s, backend="triton"),
):
    must_raise(ValueError, 'backend="triton"', "not installed", "install it.*tiled", call=call)
for backend in ("auto", "tiled"):
    must_work(backend)
softmax(s).sum().backward()
"""
    every = 'all_functions("auto")'
    run(HIDE_TRITON, PRELUDE, EVERYTHING, asked_for, every, TRITON_INTERPRET="1")


def test_a_torch_without_collectives_is_enough():
    run("import torch.distributed; del torch.distributed.ReduceOp\nimport drkl_triton\n")


def test_import_needs_no_compiler_and_starts_no_device():
    """import drkl_triton decorates no kernel and asks no driver: both may fail, and cost time."""
    run("""
import sys
import torch
before = {name for name in sys.modules if name.startswith("triton")}
import drkl_triton
late = [name for name in sys.modules if name.startswith("drkl_triton.kernels")]
if late or torch.cuda.is_initialized():
    raise SystemExit(f"imported too early: {late}")
if {name for name in sys.modules if name.startswith("triton")} - before:
    raise SystemExit("imported triton")
""")


def test_python_in_the_root_of_a_clone_finds_the_kernels(tmp_path):
    """After pip install ., drkl_triton/ of the clone comes first, and kernels/ lies beside it."""
    root = Path(drkl_triton.__file__).parents[1]
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ditable" not in str(f)]
sys.path.insert(0, {str(root)!r})
import drkl_triton
from drkl_triton import kernels
print(kernels.__file__)
"""
    run(code, TRITON_INTERPRET="1")


# --- several processes: what the errors and README advise, against one process ---

RANK = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from drkl_triton import drkl, linear_drkl

dist.init_process_group("gloo")
rank, V, H = dist.get_rank(), 24, 8
SHARDED = 2 if torch.__version__ < "2.9" else 1  # torch 2.8 does not average over gloo
torch.manual_seed(0)
ids, labels = torch.randint(V, (4, 6)), torch.randint(V, (4, 6))
teacher_hidden, teacher_weight = torch.randn(4, 6, H), torch.randn(V, H)

def must_advise(words, call):
    try:
        call()
    except (TypeError, ValueError) as error:
        if words not in str(error):
            raise
    else:
        raise SystemExit(f"no error that advises {words}")

class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = torch.nn.Embedding(V, H), torch.nn.Linear(H, V, bias=False)

class Distil(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Student()
    def forward(self, ids, labels, teacher_hidden):
        hidden, weight = self.student.body(ids), self.student.head.weight
        if hasattr(weight, "device_mesh"):  # a group of its own, against README: as the error says
            must_advise('[Partial("avg")]', lambda: linear_drkl(hidden, weight, labels,
                        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight))
            weight = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
        return linear_drkl(hidden, weight, labels, shift=True,
                           teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)

def gradients(module):
    whole = lambda g: g.full_tensor() / SHARDED if hasattr(g, "full_tensor") else g
    return [whole(p.grad) for p in module.parameters()]

one = Distil()
one(ids, labels, teacher_hidden).backward()
mine = [x[2 * rank : 2 * rank + 2] for x in (ids, labels, teacher_hidden)]

two = DistributedDataParallel(Distil())
two(*mine).backward()
ways = {"DDP": gradients(two)}
two = DistributedDataParallel(Distil())
two.module(*mine).backward()  # past the wrapper, against the advice: each rank has its own gradient
if any(torch.allclose(*pair, rtol=0.01) for pair in zip(gradients(two), gradients(one))):
    raise SystemExit("DDP synchronises what goes past it: the page need not warn")

two = Distil()
fully_shard(two)
two(*mine).backward()
ways["fully_shard"] = gradients(two)

two = Distil()
fully_shard(two.student.head)
fully_shard(two)
two(*mine).backward()
ways["fully_shard of the head alone"] = gradients(two)

def of_dtensor_head(mesh, sharded, batch, average, placement):
    # the head alone is a DTensor: what the error advises
    body, head = Student().body, Student().head.weight.detach()
    head = torch.nn.Parameter(distribute_tensor(head, mesh, sharded))
    ids, labels, hidden = batch
    given = dict(teacher_hidden=hidden, teacher_weight=teacher_weight, shift=True)
    words = 'full_tensor(grad_placements=[Partial("avg")]' if average else "pass group="
    must_advise(words, lambda: linear_drkl(body(ids), head, labels, **given))
    whole = head.full_tensor()
    must_advise("say whose it is", lambda: linear_drkl(body(ids), whole, labels, **given))
    whole = head.full_tensor(grad_placements=[placement] * mesh.ndim)
    linear_drkl(body(ids), whole, labels, **given).backward()
    if average:
        dist.all_reduce(body.weight.grad)
        body.weight.grad /= 2
    return [body.weight.grad, head.grad.full_tensor() / (SHARDED if average else 1)]

mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
hybrid = dist.device_mesh.init_device_mesh("cpu", (1, 2))
everything = ids, labels, teacher_hidden
ways["FSDP2"] = of_dtensor_head(mesh, [Shard(0)], mine, True, Partial("avg"))
ways["hybrid"] = of_dtensor_head(hybrid, [Replicate(), Shard(0)], mine, True, Partial("avg"))
ways["TP"] = of_dtensor_head(mesh, [Shard(0)], everything, False, Replicate())

# logits of rows of one's own; of a vocabulary in parts they are taken (test_shards.py)
rows, mine_alone = torch.randn(4, 6, V), slice(2 * rank, 2 * rank + 2)
logits = rows.clone().requires_grad_()
teacher = teacher_hidden @ teacher_weight.T
drkl(logits, teacher, labels).backward()
leaf = distribute_tensor(rows, mesh, [Shard(0)]).requires_grad_()
must_advise("to_local()", lambda: drkl(leaf, teacher, labels))
drkl(leaf.to_local(), teacher[mine_alone], labels[mine_alone]).backward()
right = 2 * logits.grad[mine_alone]
torch.testing.assert_close(leaf.grad.to_local(), right, rtol=1e-4, atol=1e-6)

for way, found in ways.items():
    for ours, right in zip(found, gradients(one), strict=True):
        if not torch.allclose(ours, right, rtol=1e-4, atol=1e-6):
            print(way, (ours - right).abs().max() / right.abs().max(), file=sys.stderr, flush=True)
            os._exit(1)
os._exit(0)  # gloo's threads may hang at exit
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_advice_for_several_processes(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, script], capture_output=True, text=True, timeout=200, env=environment
    )
    assert result.returncode == 0, result.stderr

"""The losses from hidden states: time and peak memory beside the four matrix products alone.

python bench/linear.py                                   # under ten minutes on two CPU cores
python bench/linear.py --device cuda                     # 8,192 tokens, hidden size 4,096, bfloat16
python bench/linear.py --op drkl --tokens 512 --vocab 50257 128256 --hidden 512
"""

import sys

import command
import tables
from linear_providers import ALL, OPS
from linear_truth import Hidden


class OfHiddenStates(command.Bench):
    what, script, prefix = __doc__.splitlines()[0], "bench/linear.py", "linear-"
    providers, ops = ALL, OPS
    default_ops = ["reverse_kl", "drkl"]
    dtypes = "default: bfloat16; on a CPU float32"
    defaults = {
        "tokens": ([8192, 2048, 4096, 16384], [1024, 512, 2048]),
        "vocab": ([128256, 32000, 65536, 262144], [65536, 32000, 151936]),
        "hidden": (4096, 256),
        "repeats": (10, 3),
        "dtype": (["bfloat16"], ["float32"]),
    }
    extra = {"mode": ["both"], "copy_mb": 0}
    tell = ("op", "dtype", "hidden", "teacher_hidden", "ignored", "tokens", "vocab")
    columns = (
        *(*tell, "provider", "version", "check", *Hidden.checked),
        *("ms", "ms_q1", "ms_q3", "runs", "flops", "gflop_per_s", "peak_mb"),
        *(*tables.ratios(ALL), "note", *tables.ENVIRONMENT, "date"),
    )
    places, beside, checked = (
        {"tokens": "tokens", "V": "vocab"},
        ("products", "dense"),
        Hidden.checked,
    )
    rates = {"GFLOP/s": "gflop_per_s"}
    figures = {
        "time": ("ms", "time of loss and gradients (ms)"),
        "floor": ("x_products", "time / time of the four products"),
        "memory": ("peak_mb", "peak memory above the inputs (MB)"),
    }
    legend = """\
ms           median of loss, d hidden and d weight in one call, cold caches; quartiles beside it
GFLOP/s      the four products' operations over the median: 2 × tokens × V × (3 H + the teacher's H)
peak MB      most memory held above the inputs, in 10^6 bytes; the two gradients are part of it
×products    times the time of the four products alone, summed in float32
×dense       times the time of dense; below 1 is faster
check        against float64, on the call that is timed; WRONG when an error is beyond its limit"""

    def options(self, add):
        first = "the others are taken at the first number of %s"
        add("--tokens", nargs="+", type=int, metavar="N", help=first % "--vocab")
        add("--vocab", nargs="+", type=int, metavar="V", help=first % "--tokens")
        add("--hidden", type=int, metavar="H", help="default: 4096 on a GPU, 256 on a CPU")
        add("--teacher-hidden", type=int, metavar="H", help="the teacher's; default: the student's")
        add("--ignored", type=float, default=0.0, help="share of tokens without a loss; default: 0")

    def settle(self, parser, options):
        options.teacher_hidden = options.teacher_hidden or options.hidden
        sizes = (options.hidden, options.teacher_hidden, *options.tokens, *options.vocab)
        if min(options.repeats, *sizes) < 1:
            parser.error("--repeats, --hidden, --tokens and --vocab must be positive")
        if not 0 <= options.ignored <= 0.99 or min(options.tokens) * (1 - options.ignored) < 1:
            parser.error(f"--ignored must leave a token: at most 0.99, got {options.ignored}")

    def cases(self, options):
        """Every vocabulary at the first number of tokens, every number of tokens at the first
        vocabulary. What both have first, then the smallest logits.
        """
        tokens, vocab = options.tokens, options.vocab
        first = tokens[0], vocab[0]
        others = {(tokens[0], V) for V in vocab} | {(N, vocab[0]) for N in tokens}
        shapes = [first, *sorted(others - {first}, key=lambda s: (s[0] * s[1], s))]
        return [(op, dtype, *s) for s in shapes for op in options.op for dtype in options.dtype]

    def case(self, options, op, dtype, tokens, vocab):
        sizes = tokens, vocab, options.hidden, options.teacher_hidden, options.ignored
        return Hidden(op, dtype, *sizes, options.device)

    def title(self, row):
        return f"{row['op']}, {row['dtype']}, loss and both gradients, {self.subject(row)}"

    def subject(self, row):
        ignored = f", {row['ignored']:.0%} of the tokens ignored" if row["ignored"] else ""
        sizes = f"hidden size {row['hidden']:,}, the teacher's {row['teacher_hidden']:,}"
        return sizes + ignored

    def panels(self, rows, options):
        """(title, axis, rows) of each sweep with more than one point, or of the vocabulary's."""
        tokens, vocab = options.tokens[0], options.vocab[0]
        more = len({row["tokens"] for row in rows if row["vocab"] == vocab}) > 1
        if more:
            yield f"V = {vocab:,}", "tokens", [row for row in rows if row["vocab"] == vocab]
        here = [row for row in rows if row["tokens"] == tokens]
        if not more or len({row["vocab"] for row in here}) > 1:
            yield f"{tokens:,} tokens", "vocab", here


bench = OfHiddenStates()
parse, main = bench.parse, bench.main

if __name__ == "__main__":
    sys.exit(main())

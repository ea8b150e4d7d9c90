"""Microbenchmarks across vocabulary sizes: time, memory and share of the memory's speed.

python bench/run.py                                      # about ten minutes on two CPU cores
python bench/run.py --device cuda                        # 8,192 tokens, bfloat16
python bench/run.py --op all --mode both --vocab 50257 128256 --tokens 512
"""

import sys

import command
import real_rows
import tables
from providers import ALL, OPS
from truth import Logits, moved


class OfLogits(command.Bench):
    what, script = __doc__.splitlines()[0], "bench/run.py"
    providers, ops = ALL, OPS
    default_ops = ["reverse_kl", "drkl", "forward_kl", "js_divergence"]
    dtypes = "default: bfloat16; on a CPU float32, too"
    defaults = {
        "tokens": (8192, 128),
        "vocab": ([32000, 50257, 128256, 262144], [32000, 128256]),
        "repeats": (20, 5),
        "copy_mb": (2048, 256),
        "dtype": (["bfloat16"], ["float32", "bfloat16"]),
    }
    tell = ("op", "dtype", "mode", "vocab")
    columns = (
        *("op", "mode", "dtype", "vocab", "tokens", "logits", "provider", "version"),
        *("check", *Logits.checked, "ms", "ms_q1", "ms_q3", "runs"),
        *("bytes", "gb_per_s", "copy_gb_per_s", "percent_of_copy", "read_gb_per_s", "peak_mb"),
        *(*tables.ratios(ALL), "note", *tables.ENVIRONMENT, "date"),
    )
    places, beside, checked = {"V": "vocab"}, None, Logits.checked
    rates = {"GB/s": "gb_per_s", "% copy": "percent_of_copy"}
    figures = {
        "time": ("ms", "time (ms)"),
        "memory": ("peak_mb", "peak memory above inputs (MB)"),
        "bandwidth": ("percent_of_copy", "% of copy bandwidth"),
    }
    legend = """\
ms           median, cold caches; quartiles beside it
GB/s         the bytes counted over the median; % copy: of a large copy's GB/s, measured in turn
             with the providers
peak MB      most memory held above the inputs while this mode runs, in 10^6 bytes
×dense       times the time of dense; below 1 is faster. The other × columns likewise
check        against float64, on the call that is timed; WRONG when an error is beyond its limit"""

    def options(self, add):
        add(
            "--mode",
            nargs="+",
            choices=command.MODES,
            default=list(command.MODES),
            help="default: all three",
        )
        add("--vocab", nargs="+", type=int, metavar="V", help="default: two, on a GPU four")
        add("--logits", choices=("random", "real"), default="random", help="real: SmolLM2's")
        add("--tokens", type=int, help="rows of logits; default: 8192 on a GPU, 128 on a CPU")
        add("--copy-mb", type=int, help="size of the copy; default: 2048 on a GPU, 256 on a CPU")

    def settle(self, parser, options):
        if options.logits == "real":
            options.vocab = [real_rows.VOCAB]
        if min(options.tokens, options.repeats, options.copy_mb, *options.vocab) < 1:
            parser.error("--tokens, --repeats, --copy-mb and --vocab must be positive")

    def cases(self, options):
        return [
            (op, dtype, options.tokens, vocab)
            for op in options.op
            for dtype in options.dtype
            for vocab in options.vocab
        ]

    def case(self, options, op, dtype, tokens, vocab):
        return Logits(op, dtype, vocab, tokens, options.device, options.logits)

    def title(self, row):
        count = moved(row["op"], row["mode"])
        counted = f"bytes counted: {count} × tokens × V × element size"
        return f"{row['op']}, {row['dtype']}, {row['mode']}, {row['tokens']:,} tokens   ({counted})"

    def panels(self, rows, options):
        """(title, axis, rows) of each."""
        for mode in command.MODES:
            here = [row for row in rows if row["mode"] == mode]
            if here:
                yield mode, "vocab", here

    def subject(self, row):
        return f"{row['tokens']:,} tokens"


bench = OfLogits()
parse, main = bench.parse, bench.main

if __name__ == "__main__":
    sys.exit(main())

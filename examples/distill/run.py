"""Distil small language models on Python's own sources and compare the objectives.

python examples/distill/run.py                 # twelve minutes on two CPU cores
python examples/distill/run.py --seeds 1       # without intervals
python examples/distill/run.py --quick         # seconds, to see that it works
python examples/distill/run.py --device cuda   # with the Triton kernels
python examples/distill/run.py --teacher-topk 20     # from 20 log-probabilities a token
python examples/distill/run.py --linear        # rkl and drkl from hidden states, without the logits
"""

import copy
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

try:
    import cache
    import figures
    import memory
    import options
    import report
    import torch
    from data import InputError, held_out_windows, load_corpus, training_batch
    from evaluate import diversity, evaluate, sample, sample_nll
    from model import ModelConfig, Transformer
    from progress import progress, say
    from train import (
        Learner,
        TrainConfig,
        checkpoint_path,
        cross_entropy,
        make_linear_objective,
        make_objective,
        train,
    )

    import drkl_triton
except ModuleNotFoundError as error:
    sys.exit(f"{error}; at the repository's root say: make demo, or: pip install -e '.[examples]'")

HERE = Path(__file__).resolve().parent


class Demo:
    """The stages. Each keeps its product in the cache and takes it from there the next time."""

    def __init__(self, args):
        options.check(args)
        self.args = args
        self.cache = options.open_folder(args.out)
        if args.fresh:
            for path in self.cache.glob("*.pt"):
                path.unlink()
        self.device = options.open_device(args.device)
        self.dtype = options.choose_dtype(args.dtype, self.device)
        torch.set_num_threads(args.threads or min(torch.get_num_threads(), 8))
        self.seconds = {"pretraining": 0.0, "students": 0.0, "measuring": 0.0}
        # What the products depend on besides the settings.
        code = [HERE / name for name in ("model.py", "train.py", "evaluate.py")]
        package = Path(drkl_triton.__file__).parent.rglob("*.py")
        self.where = [
            cache.source_digest(code),
            torch.__version__,
            self.device.type,
            str(self.dtype),
        ]
        self.package = [cache.source_digest(package), args.backend]

    def run(self):
        args = self.args
        say("[1/4] data: reading the sources, training the tokenizer")
        self.read_data()
        say(f"[2/4] teacher: {args.teacher_steps} steps")
        self.train_teacher()
        say(f"[3/4] students: {args.student_steps} steps, {args.seeds} seed(s), all side by side")
        if args.teacher_topk:
            say(f"  they see {args.teacher_topk} log-probabilities a token, and the label's")
        teacher = {"teacher": self.teacher}
        teacher_measured = self.measure_finally(teacher, args.seed, self.teacher_key)["teacher"]
        seeds = [args.seed + i for i in range(args.seeds)]
        runs, pretrained = [], []
        for seed in seeds:
            models, history, pretraining, key = self.train_students(seed)
            runs.append((history, self.measure_finally(models, seed, key)))
            pretrained.append(pretraining)
        say("[4/4] report")
        objectives = {}
        for name in args.objectives:
            per_seed = [measured[name] for _, measured in runs]
            objectives[name] = {
                "label": make_objective(name)[0],
                **report.summarise(per_seed),
                "per_seed": per_seed,
                "history": [history[name] for history, _ in runs],
            }
        students = {
            "parameters": next(iter(models.values())).parameter_count(),
            "pretraining": pretrained,
            "objectives": objectives,
        }
        results = self.collect(seeds, teacher_measured, students)
        if args.linear:
            results["memory"] = self.measure_memory(models)
        return results

    def read_data(self):
        args, start = self.args, time.monotonic()
        self.corpus = corpus = load_corpus(args.sources, self.cache, args.vocab, args.max_mb)
        say(
            f"  {len(corpus.train_files)} files, {len(corpus.train):,} tokens for training; "
            f"{len(corpus.held_out_files)} files, {len(corpus.held_out):,} tokens held out; "
            f"vocabulary {corpus.vocab:,}"
        )
        if len(corpus.train) < args.context:
            raise InputError(
                f"the training text has {len(corpus.train)} tokens, fewer than "
                f"--context {args.context}; give more text or a smaller context"
            )
        self.windows, prompts = (
            held_out_windows(corpus.held_out, count, args.context)
            for count in (args.windows, args.prompts)
        )
        self.prompts = prompts[:, : args.context // 4].to(self.device)
        self.seconds["data"] = time.monotonic() - start

    def new_model(self, who, seed):
        torch.manual_seed(seed)
        shape = {n: getattr(self.args, f"{who}_{n}") for n in ("width", "layers", "heads")}
        return Transformer(ModelConfig(vocab=self.corpus.vocab, **shape)).to(self.device)

    def train_config(self, who):
        args = self.args
        steps = getattr(args, f"{who}_steps")
        lr = args.teacher_lr if who == "teacher" else args.student_lr
        return TrainConfig(steps, args.batch, args.context, lr, min(args.evaluations, steps))

    def train(self, learners, who, **keywords):
        models = {name: learner.model for name, learner in learners.items()}
        return train(
            learners,
            self.corpus.train,
            self.train_config(who),
            device=self.device,
            dtype=self.dtype,
            evaluate=lambda: self.measure_curve(models),
            **keywords,
        )

    def train_teacher(self):
        args = self.args
        self.teacher = teacher = self.new_model("teacher", args.seed)
        config = [asdict(teacher.config), asdict(self.train_config("teacher"))]
        self.teacher_key = [self.where, self.corpus.key, config, args.seed, args.windows]
        history, self.seconds["teacher"] = self.train(
            {"teacher": Learner(teacher, cross_entropy)},
            "teacher",
            salt=f"teacher/{args.seed}",
            path=checkpoint_path(self.cache, "teacher", self.teacher_key),
            desc="teacher",
        )
        self.teacher_history = history["teacher"]
        teacher.requires_grad_(False)

    def pretrain_student(self, seed):
        """The weights all students of this seed start from, and how they came about.

        From random weights the reverse KLs spend most of a short run on learning which tokens are
        common, and are still alike when it ends. So the start is a model of the text already, as
        it is where language models are distilled in earnest.
        """
        student = self.new_model("student", seed)
        if not self.args.pretrain_steps:
            return student, None, []
        key = [
            self.teacher_key,
            asdict(student.config),
            asdict(self.train_config("pretrain")),
            seed,
        ]
        history, seconds = self.train(
            {"student": Learner(student, cross_entropy)},
            "pretrain",
            salt=f"pretraining/{seed}",
            path=checkpoint_path(self.cache, "pretrained", key),
            desc=f"pretraining, seed {seed}",
        )
        self.seconds["pretraining"] += seconds
        return student, history["student"], key

    def new_learner(self, name, model, linear):
        """linear: from hidden states, if the objective has such a form."""
        options = self.args.temperature, self.args.backend
        chunk_bytes = max(1, round(self.args.chunk_mb * 1e6))
        objective = make_linear_objective(name, *options, chunk_bytes) if linear else None
        if objective is not None:
            return Learner(model, objective, from_hidden=True)
        return Learner(model, make_objective(name, *options)[1])

    def measure_memory(self, models):
        """Of the first objective that has both forms; the others take the same."""
        name = next(filter(make_linear_objective, self.args.objectives))
        batch = training_batch(
            self.corpus.train, self.args.batch, self.args.context, "memory", 0
        ).to(self.device)
        peaks = {
            way: memory.measure(
                self.new_learner(name, models[name], way == "hidden"),
                self.teacher,
                batch,
                self.device,
                self.dtype,
            )
            for way in ("logits", "hidden")
        }
        return {"objective": name, "tokens": batch.numel(), **peaks}

    def train_students(self, seed):
        """One start and one order of batches for all objectives."""
        args = self.args
        initial, pretraining, start = self.pretrain_student(seed)
        learners = {
            name: self.new_learner(name, copy.deepcopy(initial), args.linear)
            for name in args.objectives
        }
        config = [asdict(initial.config), asdict(self.train_config("student"))]
        where = [self.teacher_key, self.package, start]
        linear = [args.chunk_mb] if args.linear else []
        sparse = [f"top {args.teacher_topk}"] if args.teacher_topk else []
        key = [where, config, args.objectives, args.temperature, seed, *linear, *sparse]
        history, seconds = self.train(
            learners,
            "student",
            salt=f"students/{seed}",
            path=checkpoint_path(self.cache, "students", key),
            teacher=self.teacher,
            topk=args.teacher_topk,
            temperature=args.temperature,
            desc=f"{len(learners)} students, seed {seed}",
        )
        self.seconds["students"] += seconds
        models = {name: learner.model for name, learner in learners.items()}
        return models, history, pretraining, key

    def measure(self, models, windows, desc=None):
        return evaluate(
            models,
            self.teacher,
            windows,
            device=self.device,
            backend=self.args.backend,
            desc=desc,
        )

    def measure_curve(self, models):
        results = self.measure(models, self.windows)
        for metrics in results.values():
            del metrics["reliability"]
        return results

    def measure_finally(self, models, seed, key):
        """{name: metrics on the held-out windows and of samples, some of them as "text"}"""
        args, start = self.args, time.monotonic()
        key = [key, self.package, args.windows, args.prompts, args.samples]
        path = checkpoint_path(self.cache, "measured", key)
        results = cache.load(path)
        if results is not None:
            return results
        results = self.measure(models, self.windows, desc="evaluation")
        decode = self.corpus.tokenizer.decode
        with progress(len(models), "sampling") as bar:
            for name, model in models.items():
                samples = sample(model, self.prompts, args.samples, args.context // 2, seed)
                results[name] |= diversity(samples)
                results[name]["sample_nll"] = sample_nll(self.teacher, self.prompts, samples)
                shown = samples[:2, :2].tolist()
                results[name]["text"] = [[decode(one) for one in prompt] for prompt in shown]
                bar.update()
        cache.save(path, results)
        self.seconds["measuring"] += time.monotonic() - start
        return results

    def collect(self, seeds, teacher_measured, students):
        args, corpus = self.args, self.corpus
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        gpu = self.device.type == "cuda"
        results = {
            "settings": settings,
            "training": {
                who: asdict(self.train_config(who)) for who in ("teacher", "pretrain", "student")
            },
            "machine": {
                "device": str(self.device),
                "device_name": torch.cuda.get_device_name(self.device) if gpu else "cpu",
                "threads": torch.get_num_threads(),
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            "versions": report.versions(),
            "seeds": seeds,
            "data": {
                "train_files": len(corpus.train_files),
                "train_tokens": len(corpus.train),
                "held_out_files": len(corpus.held_out_files),
                "held_out_tokens": len(corpus.held_out),
                "evaluated_tokens": self.windows.shape[0] * (self.windows.shape[1] - 1),
                "vocab": corpus.vocab,
                "characters": corpus.characters,
                "held_out_names": corpus.held_out_files,
            },
            "teacher": {
                "parameters": self.teacher.parameter_count(),
                "metrics": teacher_measured,
                "history": self.teacher_history,
            },
            "students": students,
            "seconds": self.seconds,
        }
        objectives = students["objectives"]
        if len(seeds) > 1 and "rkl" in objectives and len(objectives) > 1:
            differences = report.paired_differences(objectives, "rkl")
            results["paired"] = {"baseline": "rkl", "differences": differences}
        return results


def write(results, demo):
    out = demo.args.out
    table = report.full_report(results)
    prompts = [demo.corpus.tokenizer.decode(prompt) for prompt in demo.prompts[:2].tolist()]
    texts = {
        "results.json": json.dumps(report.as_json(results), indent=1, ensure_ascii=False),
        "table.txt": table,
        "samples.txt": report.sample_text(results, prompts),
    }
    for name, text in texts.items():
        (out / name).write_text(text + "\n", encoding="utf-8")
    names = [*texts, *figures.write_figures(results, out)]
    sys.stdout.reconfigure(errors="replace")  # a terminal without γ shows "?", and no traceback
    print(f"{table}\n\nWritten to {out}: {', '.join(names)}")


def main(argv=None):
    args = options.parse(__doc__, argv)
    start = time.monotonic()

    def work():
        demo = Demo(args)
        results = demo.run()
        results["seconds"]["this_run"] = time.monotonic() - start
        write(results, demo)

    return options.exit_status("run.py", work)


if __name__ == "__main__":
    sys.exit(main())

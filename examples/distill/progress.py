"""Progress with time left: a tqdm bar on a terminal, a line every 20 seconds in a log."""

import shutil
import sys
import time

from tqdm import tqdm


class LineProgress:
    """The part of tqdm's interface used here, for a stderr that is not a terminal."""

    def __init__(self, total, desc, interval=20.0):
        self.total, self.desc, self.interval = total, desc, interval
        self.n, self.note = 0, ""
        self.start = self.last = time.monotonic()
        self.printed = None
        self.first = None  # a resumed stage starts above 0, which must not count as speed

    def update(self, n=1):
        if self.first is None:
            self.first = self.n
        self.n += n
        if time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            self._print()

    def set_postfix_str(self, note, refresh=False):
        self.note = note

    def _print(self):
        self.printed = self.n
        elapsed = time.monotonic() - self.start
        done = self.n - (self.first or 0)
        left = tqdm.format_interval(elapsed / done * (self.total - self.n)) if done else "?"
        line = f"  {self.desc}: {self.n}/{self.total}, {tqdm.format_interval(elapsed)} elapsed"
        line += f", {left} left" if self.n < self.total else ""
        print(line + (f", {self.note}" if self.note else ""), file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.printed != self.n:
            self._print()


def progress(total, desc, initial=0):
    if sys.stderr.isatty():
        size = shutil.get_terminal_size()  # has an answer where tqdm would ask in vain
        return tqdm(
            total=total,
            initial=initial,
            desc=f"  {desc}",
            ncols=min(size.columns, 110),
            nrows=size.lines,
        )
    bar = LineProgress(total, desc)
    bar.n = initial
    return bar


def say(text):
    print(text, file=sys.stderr, flush=True)

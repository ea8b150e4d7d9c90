"""Machine code as text: its blocks, its loops, and the instructions that a row executes.

NVIDIA's comes from cuobjdump (SASS), AMD's from the compiler (amdgcn). No GPU, no import of Triton.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

LOAD_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "96": 96, "128": 128, "256": 256}
AMD_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "b32": 32, "b64": 64}


@dataclass(frozen=True)
class Instruction:
    """``text`` is without the predicate. ``kind`` says where control goes next: "next" to the next
    instruction, "jump" to the target, "call" into the target and then on, "return", "exit".
    """

    address: object
    text: str
    kind: str = "next"
    conditional: bool = False
    target: object = None

    @property
    def load_bits(self):
        """Bits a thread loads from global memory; 0: not such a load."""
        return self._bits(r"LDG(?:STS)?((?:\.\w+)*)", "load")

    @property
    def store_bits(self):
        return self._bits(r"STG((?:\.\w+)*)", "store")

    def _bits(self, nvidia, amd):
        if match := re.match(nvidia + r"\b", self.text):
            widths = [LOAD_BITS[part] for part in match[1].split(".") if part in LOAD_BITS]
            return max(widths, default=32)
        if match := re.match(rf"(?:global|buffer|flat)_{amd}_(\w+)", self.text):
            return AMD_BITS.get(match[1], 16 if re.search("short|16", match[1]) else 8)
        return 0

    @property
    def is_exponential(self):
        return re.match(r"MUFU\.EX2|v_exp_f32", self.text) is not None

    @property
    def is_barrier(self):
        return re.match(r"BAR\b|s_barrier", self.text) is not None

    @property
    def is_spill(self):
        """Loads and stores a thread's own memory."""
        return re.match(r"(LDL|STL)\b|scratch_(load|store)", self.text) is not None


def parse_sass(text):
    """The instructions of the one kernel in cuobjdump's output. BSYNC, where threads meet again,
    is taken to go on to the next instruction: ptxas puts it just before the place they go on from.
    """
    code = []
    for address, predicate, line in re.findall(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", text, re.M
    ):
        # Some versions print what the instruction waits for, too: BRA 0x9e0 &req={0} ?WAIT1.
        line = re.sub(r"\s+[&?]\w.*", "", line)
        # The condition stands before the instruction, or is an operand: BRA.U !UP0, 0x3a00.
        target = re.search(r"\b(0x[0-9a-f]+)$", line)
        target = int(target[1], 16) if target else None
        conditional = bool(predicate) and not re.fullmatch(r"@U?PT\s+", predicate)
        kind = "next"
        if re.match(r"BRA\b", line):
            kind = "jump"
            conditional |= re.fullmatch(r"BRA\S*\s+0x[0-9a-f]+", line) is None
        elif re.match(r"CALL\.REL\b", line):
            kind = "call"
        elif match := re.match(r"(EXIT|RET)\b", line):
            kind = {"EXIT": "exit", "RET": "return"}[match[1]]
        elif re.match(r"(BRX|BRXU|JMP|JMX|JMXU|CALL|BREAK)\b", line):
            raise ValueError(f"cannot follow {line!r}")
        target = target if kind in ("jump", "call") else None
        code.append(Instruction(int(address, 16), line, kind, conditional, target))
    return code


def parse_amdgcn(text):
    """The instructions of the one kernel in the compiler's assembly text."""
    code, at = [], {}
    for line in text.splitlines():
        line = line.split(";")[0].rstrip()
        if label := re.match(r"(\.LBB\w+):", line):
            at[label[1]] = len(code)
        elif re.match(r"\s+(s|v|ds|global|buffer|flat|scratch)_\w+", line):
            line = line.strip()
            kind = "next"
            if line.startswith(("s_branch", "s_cbranch_")):
                kind = "jump"
            elif line.startswith("s_endpgm"):
                kind = "exit"
            elif re.match(r"s_(swappc|setpc|call)_", line):
                raise ValueError(f"cannot follow {line!r}")
            target = line.split()[-1] if kind == "jump" else None
            conditional = line.startswith("s_cbranch_")
            code.append(Instruction(len(code), line, kind, conditional, target))
    return [replace(c, target=at[c.target]) if c.target else c for c in code]


@dataclass(frozen=True)
class Loop:
    """A natural loop: ``blocks`` (their numbers), the first of them, those that jump back to it,
    and ``trip``, the blocks of its longest trip.
    """

    header: int
    blocks: frozenset
    latches: frozenset
    trip: tuple


class Program:
    """Basic blocks, numbered in the order of their addresses; block 0 is the entry."""

    def __init__(self, code):
        if not code:
            raise ValueError("no instructions found")
        starts = {code[0].address} | {c.target for c in code if c.target is not None}
        self.blocks = []
        for instruction in code:
            if (
                not self.blocks
                or instruction.address in starts
                or self.blocks[-1][-1].kind != "next"
            ):
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        self._number = {block[0].address: i for i, block in enumerate(self.blocks)}
        self.successors = [self._successors(block) for block in self.blocks]
        # A call from which nothing returns is a jump, over a distance that ptxas finds long.
        for block in self.blocks:
            if block[-1].kind == "call":
                function = self._from(self._number[block[-1].target])
                if not function & set(self._ends("return")):
                    block[-1] = replace(block[-1], kind="jump")
        self.successors = [self._successors(block) for block in self.blocks]

    @property
    def code(self):
        return chain.from_iterable(self.blocks)

    def instructions(self, path):
        """Those of the blocks on a path, each call's longest way through the function included."""
        for i in path:
            yield from self.blocks[i]
            last = self.blocks[i][-1]
            if last.kind == "call":
                yield from self.instructions(self._longest(self._number[last.target], "return"))

    def _successors(self, block):
        last, after = block[-1], []
        if last.conditional or last.kind in ("next", "call"):
            after = [i for i in [self._number[block[0].address] + 1] if i < len(self.blocks)]
        if last.kind == "jump":
            after.append(self._number[last.target])
        return after

    # --- loops ---

    def _from(self, start, without=(), after=None):
        """The blocks that can be reached from ``start``; after(block): its successors, or some."""
        after = after or self.successors.__getitem__
        seen, todo = set(), [start]
        while todo:
            i = todo.pop()
            if i not in seen and i not in without:
                seen.add(i)
                todo.extend(after(i))
        return seen

    @cached_property
    def _dominators(self):
        """{block: the blocks on every way from the entry to it, itself included}"""
        reached = self._from(0)
        dominators = {i: {i} for i in reached}
        for d in reached:
            for i in reached - self._from(0, without={d}):
                dominators[i].add(d)
        return dominators

    @cached_property
    def _back_edges(self):
        """Edges to a block that dominates their start."""
        return {
            (i, j) for i in self._dominators for j in self.successors[i] if j in self._dominators[i]
        }

    @cached_property
    def _order(self):
        """The blocks, each after all that lead to it but by a back edge."""
        waiting = dict.fromkeys(self._dominators, 0)
        for i in self._dominators:
            for j in self._forward(i):
                waiting[j] += 1
        order = [0]
        for i in order:
            for j in self._forward(i):
                waiting[j] -= 1
                if not waiting[j]:
                    order.append(j)
        if len(order) < len(self._dominators):
            raise ValueError("a loop that is entered in two places")
        return order

    @cached_property
    def loops(self):
        """In the order of their addresses, inner and outer ones alike."""
        latches = {}
        for latch, header in self._back_edges:
            latches.setdefault(header, set()).add(latch)
        before = {}
        for i in self._dominators:
            for j in self.successors[i]:
                before.setdefault(j, set()).add(i)
        loops = []
        for header, ends in sorted(latches.items()):
            body, todo = {header}, list(ends)
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo.extend(before[i])
            trip = self._longest(header, ends, within=body)
            loops.append(Loop(header, frozenset(body), frozenset(ends), tuple(trip)))
        return loops

    def on_one_way(self, one, other):
        """Whether some way without back edges passes both loops."""
        first, second = sorted((one.header, other.header), key=self._order.index)
        return second in self._from(first, after=self._forward)

    def _guard(self, loop):
        """The last block before the loop from which the loop can still be passed by. Compilers put
        it before a loop that may have no trips.
        """
        ends = set(self._ends("exit"))
        above = self._dominators[loop.header] - loop.blocks
        # The nearest dominator is the one with the most dominators of its own.
        for i in sorted(above, key=lambda i: len(self._dominators[i]), reverse=True):
            if self._from(i, without={loop.header}) & ends:
                return i
        return None

    # --- ways through ---

    def _ends(self, kind):
        return [i for i, block in enumerate(self.blocks) if block[-1].kind == kind]

    def _longest(self, start, goals, within=None, avoid=()):
        """Of the ways from ``start`` to a goal that pass the fewest blocks of ``avoid``, the one
        with the most instructions. Back edges are not taken. goals: blocks, or "exit", "return".
        """
        goals = set(self._ends(goals) if isinstance(goals, str) else goals)
        best = {}  # block: (minus the blocks passed of ``avoid``, instructions, the block after it)
        todo, seen = [(start, False)], set()
        while todo:  # depth first; a block has its turn after all that follow it
            i, ready = todo.pop()
            if ready:
                ways = [(*best[j][:2], j) for j in self._forward(i, within) if j in best]
                if i in goals:
                    ways.append((0, 0, -1))
                if ways:
                    avoided, count, after = max(ways)
                    best[i] = avoided - (i in avoid), count + self._size(i), after
            elif i not in seen:
                seen.add(i)
                todo.append((i, True))
                todo.extend((j, False) for j in self._forward(i, within))
        if start not in best:
            raise ValueError("no way through")
        way = [start]
        while (after := best[way[-1]][2]) >= 0:
            way.append(after)
        return way

    def _size(self, *way):
        return sum(1 for _ in self.instructions(way))

    def _forward(self, i, within=None):
        return [
            j
            for j in self.successors[i]
            if (i, j) not in self._back_edges and (within is None or j in within)
        ]

    def walk(self, through=()):
        """The blocks of the longest way from the entry to an exit that passes the loops
        ``through``, and of the other loops and their guards as few as can be.
        """
        headers = [loop.header for loop in through]
        others = [loop for loop in self.loops if loop.header not in headers]
        avoid = {loop.header for loop in others} | {self._guard(loop) for loop in others}
        way, here = [], 0
        for header in sorted(headers, key=self._order.index):
            way += self._longest(here, [header], avoid=avoid)[:-1]
            here = header
        return way + self._longest(here, "exit", avoid=avoid)


@dataclass(frozen=True)
class Geometry:
    """How a kernel walks a row: ``lanes`` x ``vec`` columns a tile, by ``threads`` threads in warps
    of ``warp``; ``column_bytes``: of one column of all operands that are read.
    """

    lanes: int
    vec: int
    threads: int
    warp: int
    column_bytes: int

    def tiles_loaded(self, bits):
        """Whole tiles in loads of so many bits by each thread."""
        return sum(bits) * self.threads // (8 * self.column_bytes * self.lanes * self.vec)


def vocabulary_loops(program):
    """The loops that touch global memory."""
    return [
        loop
        for loop in program.loops
        if any(c.load_bits or c.store_bits for c in program.instructions(loop.blocks))
    ]


def main_loop(program, geometry):
    """The loop that loads, and has none inside, with the fewest instructions a tile; None without
    such a loop. Of an unrolled loop and the one for its remainder, which differ little, the first.
    """
    loops = [
        loop
        for loop in _loading(program)
        if not any(other.blocks < loop.blocks for other in program.loops)
    ]
    if not loops:
        return None
    enough = 1.1 * min(_a_tile(program, loop, geometry) for loop in loops)
    fast = [loop for loop in loops if _a_tile(program, loop, geometry) <= enough]
    return max(fast, key=lambda loop: _tiles(program, loop, geometry))


def _loading(program):
    return [
        loop for loop in program.loops if any(c.load_bits for c in program.instructions(loop.trip))
    ]


def _tiles(program, loop, geometry):
    """Tiles a trip covers. Less than a whole one counts as one: the instructions cannot become too
    few by it.
    """
    return max(1, geometry.tiles_loaded(c.load_bits for c in program.instructions(loop.trip)))


def _a_tile(program, loop, geometry):
    return sum(1 for _ in program.instructions(loop.trip)) / _tiles(program, loop, geometry)


@dataclass(frozen=True)
class Count:
    """Executed by each warp for a row."""

    instructions: int
    exponentials: int


def full_tiles(vocab, item, geometry):
    """Tiles without a mask in a row of ``vocab`` columns of ``item`` bytes: of all places where a
    row can start, relative to 16 bytes, the one with the most.
    """
    heads = {-(row * vocab * item) % 16 // item for row in range(16)}
    return max((vocab - head) // geometry.vec // geometry.lanes for head in heads)


def executed(program, geometry, tiles):
    """What a warp executes for a row of ``tiles`` full tiles and one more, masked.

    Every block once on the longest way from the entry to an exit that passes the main loop, and
    the main loop's trips; an instruction with a predicate counts like any other. Other loops (for
    rows with -inf, for ignored rows) and the branches that lead to nothing else are left out where
    they can be. A row's tiles are walked in the loop or on the way outside of it: the loads say
    how many each. If the main loop is unrolled, the tiles it leaves take the loop for its
    remainder, or another trip where no loop before or after it has fewer.

    So it is an upper bound for the rows that take the main loop, and exact for those among them
    that take each branch outside of it: the label in the middle, ends that are not empty.
    """
    main = main_loop(program, geometry)
    if main is None:
        return _count(program, [(program.walk(), 1)])
    a_trip = _tiles(program, main, geometry)
    shorter = [
        loop
        for loop in _loading(program)
        if _tiles(program, loop, geometry) < a_trip and program.on_one_way(main, loop)
    ]
    remainder = min(shorter, key=lambda loop: _a_tile(program, loop, geometry), default=None)
    way, trips, rest = _way(program, geometry, tiles, [main])
    if rest and remainder:
        way, trips, rest = _way(program, geometry, tiles, [main, remainder])
        turns = [(main, trips), (remainder, -(-rest // _tiles(program, remainder, geometry)))]
    else:
        turns = [(main, trips + (rest > 0))]
    parts = [([i for i in way if not any(i in loop.blocks for loop, _ in turns)], 1)]
    for loop, times in turns:
        parts.append((loop.trip, times))
        last = [i for i in way if i in loop.blocks]
        if last[-1] not in loop.latches:  # left from its top or middle, after the last whole trip
            parts.append((last, 1))
    return _count(program, parts)


def _way(program, geometry, tiles, loops):
    """(the way through the loops, trips of the first, tiles left after them)."""
    way, main = program.walk(loops), loops[0]
    outside = [i for i in way if not any(i in loop.blocks for loop in loops)]
    widths = [c.load_bits for c in program.instructions(outside) if c.load_bits]
    widest = max(c.load_bits for c in program.instructions(main.trip))

    def walked(width):
        return geometry.tiles_loaded(w for w in widths if w == width)

    # One tile outside is masked, at least. AMD's compiler may load it column by column. The row's
    # ends, a column a thread, are too few loads to look like a tile.
    left = max(0, tiles + 1 - (walked(widest) or walked(min(widths, default=0))))
    return way, *divmod(left, _tiles(program, main, geometry))


def _count(program, parts):
    instructions = exponentials = 0
    for way, times in parts:
        for c in program.instructions(way):
            instructions += times
            exponentials += times * c.is_exponential
    return Count(instructions, exponentials)

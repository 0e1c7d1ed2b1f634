"""What a Triton kernel asks of each pipe of an H200, counted in its machine code (SASS) without a GPU: a prediction.

`profile` counts what one warp issues inside each loop of the kernel, `Profile.per_warp` weights that with how often the
loops run, and `microseconds` is the time of each pipe if it alone were busy. A kernel's predicted time is that of its
slowest pipe. Nothing is said about latency, occupancy or the rates of plain arithmetic; of a branch both sides count;
what is loaded comes from the second-level cache each time, unless its tensor is small enough to stay in the first.

The listing is nvdisasm's with source lines, where the source is the kernel in Triton's first intermediate form (ttir),
one operation a line: so every instruction is known to belong to a loop, and every load to a tensor. It must be of code
that ptxas did not unroll (`.pragma "nounroll"`), so that a loop's body is one iteration.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

PROCESSORS, CLOCK = 132, 1.7e9  # streaming multiprocessors, Hz under load
DRAM, L2 = 4.3e12, 7e12  # bytes per second: a copy's, and what the second-level cache gives
FIRST_LEVEL = 64 << 10  # bytes of a tensor that is taken to stay in a processor's first-level cache
FLOPS = 788e12  # bfloat16, dense, as large products reach it
MMA = 1024  # multiply-adds per processor and clock: mma.sync in 16 bits
WGMMA = FLOPS / 2 / PROCESSORS / CLOCK  # wgmma in 16 bits
PIPES = ("dram", "l2", "mma", "mufu", "issue", "l1_shared")

COMMENT = re.compile(r'\s*//## File "[^"]+", line (\d+)( inlined at)?')
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;")
LABEL = re.compile(r"(\.L_\w+):")
TARGET = re.compile(r"\((\.L_\w+)\)")
HEADER = re.compile(r"scf\.(?:for \S+ = (\S+) to (\S+) step (\S+)|while)\b.*\{$")
SAME_TENSOR = re.compile(
    r"^\s*(%\S+) = (?:tt\.(?:addptr|splat|broadcast|expand_dims|reshape|bitcast)|arith\.select %\S+,) (%[^,\s]+)", re.M
)


# ---- the kernel in Triton's first intermediate form ------------------------------------------------------------------


class Loop(NamedTuple):
    parent: int | None  # the loop that it lies in
    constant: int | None  # how often it runs, if its bounds are constants: then it may have been unrolled


def read_loops(text: str) -> tuple[list[Loop], dict[int, int | None]]:
    """The loops of a function in program order, outer before inner, and line → the innermost one that it lies in."""
    constants = {name: int(value) for name, value in re.findall(r"(%\S+) = arith\.constant (-?\d+) :", text)}
    for name, same in re.findall(r"(%\S+) = arith\.bitcast (%\S+) :", text):
        if same in constants:
            constants[name] = constants[same]
    loops, regions, lines = [], [], {}  # regions: of those that are open, the loop that each lies in
    for number, line in enumerate(text.splitlines(), start=1):
        line = re.sub(r" loc\(.*\)$", "", line.strip())
        closed = regions.pop() if line.startswith("}") and regions else None
        inside = regions[-1] if regions else None
        lines[number] = inside
        if line.endswith("{"):
            if header := HEADER.search(line):
                first, end, step = (constants.get(bound) for bound in header.groups())
                known = None not in (first, end, step)
                loops.append(Loop(inside, max(0, -(-(end - first) // step)) if known else None))
                inside = len(loops) - 1
            regions.append(closed if line.startswith("}") else inside)  # "} else {", and "} do {" of a while
    return loops, lines


def read_loads(ttir: str) -> dict[int, int]:
    """Line of a load → which of the kernel's pointer parameters it reads from, as far as that is plain."""
    parameters = re.findall(r"(%[\w.]+): !tt\.ptr", re.search(r"tt\.func public .*", ttir)[0])
    same = dict(SAME_TENSOR.findall(ttir))
    for carried in re.findall(r"iter_args\(([^)]*)\)", ttir):
        same |= dict(re.findall(r"(%\S+) = (%[^,\s]+)", carried))
    loads = {}
    for number, line in enumerate(ttir.splitlines(), start=1):
        if load := re.search(r"tt\.load (%[^,\s]+)", line):
            pointer = load[1]
            while pointer in same:
                pointer = same[pointer]
            if pointer in parameters:
                loads[number] = parameters.index(pointer)
    return loads


# ---- the machine code ------------------------------------------------------------------------------------------------


def parse(listing: str) -> tuple[list[tuple[str, int]], list[tuple[int, int]]]:
    """Instructions as (text without its predicate, source line); loops as (first, last) instruction, outer first."""
    instructions, labels, at, more = [], {}, 0, False
    for line in listing.splitlines():
        if comment := COMMENT.match(line):
            at = at if more else int(comment[1])  # the line, then those where its function was inlined
            more = comment[2] is not None
        elif label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append((instruction[1], at))
    ends = {}
    for i, (text, _) in enumerate(instructions):
        target = TARGET.search(text) if text.startswith("BRA") else None
        start = labels.get(target[1], i) if target else i
        if start < i:
            ends[start] = i  # of several branches back to one place the last
    return instructions, sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))


def matched(instructions, loops, sources: list[Loop], lines: dict[int, int | None]) -> dict[tuple[int, int], int]:
    """For each loop of the machine code the loop of the source that it is; loops of library functions are left out.

    From outside in: of the loops right inside the one that the enclosing loop is, the one most instructions are from.
    """
    children = {
        parent: [i for i, s in enumerate(sources) if s.parent == parent] for parent in (None, *range(len(sources)))
    }
    found: dict[tuple[int, int], int] = {}
    for first, last in loops:
        around = [found[a, b] for a, b in found if a <= first and last <= b]
        inner = any(first <= a and b <= last for a, b in loops if (a, b) != (first, last))
        votes = Counter(lines.get(line) for _, line in instructions[first : last + 1])

        def from_below(loop: int, votes=votes) -> int:
            return votes[loop] + sum(from_below(child) for child in children[loop])

        choices = children[around[-1] if around else None]
        while choices:
            best = max(choices, key=from_below)
            if not from_below(best):
                break
            found[first, last] = best
            choices = children[best]
            runtime = any(sources[child].constant is None for child in choices)
            if inner or sources[best].constant is None or not runtime:
                break  # else the loop was unrolled, and this is one inside it
    return found


def lane_bytes(text: str) -> int:
    """Of a load or store, for each of the 32 lanes."""
    parts = text.split()[0].split(".")
    if parts[0] in ("LDSM", "STSM"):
        return {"4": 16, "2": 8}.get(parts[-1], 4)
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in parts if part in widths), 4)


def cost(text: str) -> Counter:
    """Of one instruction of one warp: issue slots, MUFU instructions, multiply-adds, clocks of a processor's tensor
    cores, bytes through the first-level cache and shared memory, and bytes beyond it."""
    name = text.split()[0]
    base = name.partition(".")[0]
    counts = Counter(issue=1)
    if base == "MUFU":
        counts["mufu"] = 1
    elif base == "HMMA":
        macs = {"16816": 2048, "1688": 1024, "1684": 512}[name.split(".")[1]]
        counts += Counter(macs=macs, tensor=macs / MMA * (2 if "TF32" in name else 1))
    elif base == "HGMMA":  # one for four warps: 64 rows, from registers or from shared memory as the columns are
        n, k = map(int, re.match(r"HGMMA\.64x(\d+)x(\d+)", name).groups())
        rows = 0 if re.search(r"R\d+, R\d+, gdesc", text) else 64
        macs = 64 * n * k / 4
        counts += Counter(macs=macs, tensor=macs / WGMMA * (16 / k), l1=(n + rows) * 32 / 4)
    elif base in ("LDG", "STG", "LDGSTS"):
        counts += Counter(l1=32 * lane_bytes(text), l2=32 * lane_bytes(text))
    elif base in ("LDS", "STS", "LDSM", "STSM", "LDL", "STL"):
        counts["l1"] = 32 * lane_bytes(text)
    return counts


@dataclass
class Profile:
    """What one warp issues, by loops of the source: (outer, …, inner) → `cost`, for one iteration of each.

    l2 is counted by ("l2", pointer parameter), None for stores and for loads from one that is not known.
    """

    loops: list[int | None]  # of the source: how often each runs, if that is constant
    costs: dict[tuple[int, ...], Counter]

    def trips(self, named: tuple[float, ...]) -> tuple[float, ...] | None:
        """How often each loop runs, from a launch's `trips`, None if that cannot be told.

        A constant loop that runs once is none to Triton; one that is never reached may be named with 0.
        """
        found = set()
        for places in itertools.combinations(range(len(named)), len(self.loops)):
            kept = tuple(named[i] for i in places)
            left = [t for i, t in enumerate(named) if i not in places]
            fits = all(loop in (None, t) or t == 0 for loop, t in zip(self.loops, kept, strict=True))
            if fits and all(t <= 1 for t in left):
                found.add(kept)
        return found.pop() if len(found) == 1 else None

    def per_warp(self, trips: tuple[float, ...]) -> Counter:
        """`cost` of a whole program, whose loops run trips[i] times each time they are reached."""
        total = Counter()
        for path, counts in self.costs.items():
            times = math.prod(trips[i] for i in path)
            for name, count in counts.items():
                total[name] += times * count
        return total


def profile(listing: str, ttir: str) -> Profile:
    sources, lines = read_loops(ttir)
    loads = read_loads(ttir)
    instructions, loops = parse(listing)
    found = matched(instructions, loops, sources, lines)
    around = {loop: tuple(o for o in found if o[0] <= loop[0] and loop[1] <= o[1] and o != loop) for loop in found}
    versions = Counter((found[loop], around[loop]) for loop in found)
    costs: dict[tuple[int, ...], Counter] = {}
    for i, (text, line) in enumerate(instructions):
        path, share = [], 1.0
        for loop in found:
            if loop[0] <= i <= loop[1]:
                share /= versions[found[loop], around[loop]]  # one of several versions of it runs
                level, new = found[loop], []
                while level is not None and level not in path:  # with the unrolled ones between this and the last
                    new.insert(0, level)
                    level = sources[level].parent
                path += new
        counts = costs.setdefault(tuple(path), Counter())
        for name, count in cost(text).items():
            key = ("l2", loads.get(line) if text.startswith("LD") else None) if name == "l2" else name
            counts[key] += count * share
    return Profile([loop.constant for loop in sources], costs)


def microseconds(counts: Counter, warps: int, programs: int, moved: float, sizes: list[int]) -> dict[str, float]:
    """The time that each of PIPES takes for `programs` programs that move `moved` bytes in all from and to memory.

    sizes: bytes of the kernel's tensors, in the order of its pointers.
    """

    def fetched(parameter: int | None) -> float:
        size = counts["l2", parameter] * warps * programs
        small = parameter is not None and sizes[parameter] <= FIRST_LEVEL
        return min(size, PROCESSORS * sizes[parameter]) if small else size

    most = math.ceil(programs / PROCESSORS) * warps / CLOCK  # of the processor that runs the most programs
    seconds = {
        "dram": moved / DRAM,
        "l2": sum(fetched(name[1]) for name in counts if name[0] == "l2") / L2,
        "mma": counts["tensor"] * most,
        "mufu": counts["mufu"] * 2 * most,  # 16 a clock
        "issue": counts["issue"] / 4 * most,
        "l1_shared": counts["l1"] / 128 * most,
    }
    return {name: 1e6 * s for name, s in seconds.items()}

"""How many instructions a CUDA kernel issues: its machine code (SASS), with what the emulation counted in a run.

`functions` reads the machine code that `make cuda-check` leaves, each instruction with the lines of the source that it
is from, those of the functions it was inlined into included. `fitted` finds how often each basic block ran: of all ways
through the control flow that as many warps can take as there were, those that explain best how often the emulation saw
products, accesses, shuffles and special functions of each line, and of these the shortest. That is a linear program.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

FROM = re.compile(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?')
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([^;]+?)\s*;")
LABEL = re.compile(r"(\.L_\w+):")
BRANCH = re.compile(r"(BRA|EXIT|RET)\b")
# What the emulation counts, by the instruction that it is.
KINDS = {
    "LDS": "shared_read", "LDSM": "shared_read", "STS": "shared_write", "LDG": "global_read", "LDGSTS": "copy",
    "STG": "global_write", "MUFU": "special", "SHFL": "shuffle", "HMMA": "product",
}  # fmt: skip
NEAR = 2  # lines that two compilers may mean by one statement
SHORTER = 1e-4  # of two ways that explain as much: what an instruction costs, in what one that is not explained does


class Instruction(NamedTuple):
    text: str
    conditional: bool
    places: tuple[str, ...]  # file:line, from the innermost function outwards


class Function(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]


def functions(path: Path, tool: Path, arch: str) -> dict[str, Function]:
    """Mangled name → the kernels of an object file."""
    with tempfile.TemporaryDirectory() as folder:
        extract = [tool.with_name("cuobjdump"), "-xelf", "all", path.resolve()]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        (code,) = (p for p in Path(folder).glob("*.cubin") if f".{arch}." in p.name)
        listing = subprocess.run([tool, "-gi", "-c", code], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\.text\.(\w+):\n", listing)[1:]
    return {name: parsed(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def parsed(text: str) -> Function:
    instructions: list[Instruction] = []
    labels, places, told = {}, (), True  # told: an instruction came after the last place
    for line in text.splitlines():
        if place := FROM.match(line):
            places = (*(() if told else places), f"{Path(place[1]).name}:{place[2]}")
            told = False
        elif label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            conditional = found[1] is not None or re.search(r"^BRA\S*\s+!?U?P\w", found[2]) is not None
            instructions.append(Instruction(found[2], conditional, places))
            told = True
    return Function(instructions, labels)


def control_flow(function: Function) -> tuple[list[int], list[list[int]]]:
    """(where each basic block begins, the blocks that follow each)."""
    after = []
    for i, (text, conditional, _) in enumerate(function.instructions):
        target = re.search(r"`\((\.L_\w+)\)", text) if text.startswith("BRA") else None
        to = [function.labels[target[1]]] if target else []
        goes_on = (conditional or not BRANCH.match(text)) and i + 1 < len(function.instructions)
        after.append([i + 1] * goes_on + to)
    joined = [i > 0 and after[i - 1] == [i] for i in range(len(after))]  # to the one before it
    targets = {j for i, to in enumerate(after) for j in to if j != i + 1}
    begins = [i for i in range(len(after)) if not joined[i] or i in targets]
    block = np.searchsorted(begins, range(len(after)), side="right") - 1
    return begins, [sorted({int(block[j]) for j in after[end - 1]}) for end in [*begins[1:], len(after)]]


def observed(launch: dict) -> tuple[list[int], dict[tuple[str, str], int]]:
    """How many instructions of warps the emulation saw, by groups of neighbouring lines; the group of (kind, line)."""
    copies = {p for p, k, _ in launch["lines"] if k == "global_read"} & {
        p for p, k, _ in launch["lines"] if k == "shared_write"
    }
    counts: list[int] = []
    groups: dict[tuple[str, str], int] = {}
    lines = [
        ("copy" if p in copies else k, *p.split(":"), line["requests"])
        for p, k, line in launch["lines"]
        if p not in copies or k == "global_read"  # a copy is both
    ]
    for kind, file, line, requests in sorted(lines, key=lambda seen: (seen[0], seen[1], int(seen[2]))):
        around = [(kind, f"{file}:{int(line) + near}") for near in range(-NEAR, NEAR + 1)]
        group = next((groups[place] for place in around if place in groups), len(counts))
        if group == len(counts):
            counts.append(0)
        counts[group] += requests
        groups |= {place: groups.get(place, group) for place in around}
    return counts, groups


def fitted(function: Function, launch: dict) -> tuple[float, float]:
    """(instructions that all warps of a launch issue, the share of those seen that this does not explain)."""
    begins, after = control_flow(function)
    reached, open_ends = {0}, [0]
    while open_ends:
        new = [j for j in after[open_ends.pop()] if j not in reached]
        reached |= set(new)
        open_ends += new
    ways = [(i, j) for i in sorted(reached) for j in after[i] or [None]]
    seen, groups = observed(launch)
    lengths = np.diff([*begins, len(function.instructions)])
    standing: list[dict[int, int]] = [defaultdict(int) for _ in seen]
    for i in reached:
        for text, _, places in function.instructions[begins[i] : begins[i] + lengths[i]]:
            kind = KINDS.get(re.match(r"\w+", text)[0])
            group = next((groups[kind, place] for place in places if (kind, place) in groups), None)
            if group is not None:
                standing[group][i] += 1
    leaving = defaultdict(list)
    for way, (i, _) in enumerate(ways):
        leaving[i].append(way)
    # Unknown: how often each way was taken, and how many of each line were seen too many and too few.
    entries, right = [], []
    for row, i in enumerate(sorted(reached)):
        entries += [(row, way, 1) for way in leaving[i]]
        entries += [(row, way, -1) for way, (_, j) in enumerate(ways) if j == i]
        right.append(launch["counts"]["blocks"] * launch["threads"] / 32 if i == 0 else 0)
    for number, blocks in enumerate(standing):
        row = len(right)
        entries += [(row, way, times) for i, times in blocks.items() for way in leaving[i]]
        entries += [(row, len(ways) + 2 * number, 1), (row, len(ways) + 2 * number + 1, -1)]
        right.append(seen[number])
    rows, columns, values = zip(*entries, strict=True)
    unknown = len(ways) + 2 * len(standing)
    cost = np.ones(unknown)
    cost[: len(ways)] = [SHORTER * lengths[i] for i, _ in ways]
    equations = coo_array((values, (rows, columns)), shape=(len(right), unknown)).tocsr()
    found = linprog(cost, A_eq=equations, b_eq=right, method="highs")
    if not found.success:
        raise SystemExit(f"counters: no way through {launch['call']} was found: {found.message}")
    taken, off = found.x[: len(ways)], found.x[len(ways) :]
    return float(taken @ [lengths[i] for i, _ in ways]), float(off.sum() / max(1, sum(seen)))

"""One Triton kernel compiled without a GPU: what Triton's JIT would make of a launch (`specialised`), what that needs
of a processor (`compiled`), and what the compiler lost on the way (`dots_…`, `lost_names`)."""

import ast
import contextlib
import functools
import io
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import sass
from hdit_kernels.triton_launch import Launch, Target

TARGETS = {
    "sm_80": Target("cuda", "80", 108),
    "sm_90a": Target("cuda", "90", sass.PROCESSORS),
    "sm_100a": Target("cuda", "100", 148),
    "gfx942": Target("hip", "gfx942", 304),
}
CACHE = Path(__file__).parent.parent / "build" / "triton-check"
PREDICTED = "sm_90a"  # the architecture that sass.py knows the pipes of


# ---- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialised:
    """What Triton's JIT compiles for a launch: two launches with equal ones share a kernel. Dictionaries as items."""

    arch: str
    kernel: Any
    signature: tuple  # argument → type
    constants: tuple  # place of the argument → value: constexpr arguments, None, integers that are 1
    attributes: tuple  # place → what is known of it: divisible by 16
    options: tuple

    def __str__(self) -> str:
        page = self.kernel.__module__.rpartition(".")[2]
        return f"{page.removesuffix('_triton')}.{self.kernel.__name__}"


def specialised(launch: Launch, arch: str) -> Specialised:
    """By Triton's own rules. A tensor on the meta device has an address that counts from 0: its storage is taken to be
    aligned as allocators do, a view of it may not be."""
    kernel, backend = launch.kernel, make_backend(gpu(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.constants, **launch.options, "debug": False}
    bound, specialization, _ = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, None)
    chosen = {key: getattr(options, key) for key in keywords if key not in kernel.arg_names}
    attributes = {place: tuple(map(tuple, pairs)) for place, pairs in attributes.items() if pairs}
    return Specialised(arch, kernel, *(tuple(part.items()) for part in (signature, constants, attributes, chosen)))


def gpu(arch: str) -> GPUTarget:
    target = TARGETS[arch]
    return GPUTarget("hip", target.arch, 64) if target.backend == "hip" else GPUTarget("cuda", int(target.arch), 32)


# ---- compiling it ----------------------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """Bytes are for each thread (spill, stack) or program (shared)."""

    registers: int
    agpr: int | None  # accumulation registers (AMD)
    spill: int
    stack: int
    shared: int
    mma: int  # instructions of matrix units
    dots: int  # `tl.dot`s of the source
    dots_kept: int  # those that are there, and do not multiply zeros, once Triton has simplified
    dots_compiled: int
    serialised: bool  # ptxas cannot overlap wgmma instructions (sm_90a)
    profile: sass.Profile | None


def compiled(asked: Specialised) -> Compiled:
    """In a process of its own: it sets Triton's options, and compilers crash."""
    attributes = {place: [list(pair) for pair in pairs] for place, pairs in asked.attributes}
    source = ASTSource(asked.kernel, dict(asked.signature), dict(asked.constants), attributes)
    knobs.cache.dir = str(CACHE)
    knobs.compilation.use_ir_loc = "ttir"  # sass.py reads lines of that form, where nothing is inlined any more
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, target=gpu(asked.arch), options=dict(asked.options))
    text, shared = kernel.asm, kernel.metadata.shared
    dots = dots_of_source(text["source"]), dots_of_variables(text["ttir"]), dots_of_machine(text["ttgir"])
    if TARGETS[asked.arch].backend == "hip":
        value = lambda key: number(rf"\.{key}:\s*(\d+)", text["amdgcn"])  # noqa: E731
        registers = value("vgpr_count"), value("agpr_count"), 4 * value("vgpr_spill_count")
        mma = text["amdgcn"].count("v_mfma")
        return Compiled(*registers, value("private_segment_fixed_size"), shared, mma, *dots, False, None)
    stages = {}
    backend = make_backend(gpu(asked.arch))
    backend.add_stages(stages, backend.parse_options(dict(asked.options)), source.language)
    said = log.getvalue()
    if "registers" not in said:  # nothing is said of what lay in the cache
        said, _ = assembled(stages["cubin"], text["ptx"])
    profile = None
    if asked.arch == PREDICTED:
        profile = sass.profile(disassembled(assembled(stages["cubin"], plain(text["ptx"]))[1]), text["ttir"])
    spill = number(r"(\d+) bytes spill stores", said) + number(r"(\d+) bytes spill loads", said)
    stack = number(r"(\d+) bytes stack frame", said)
    shared += number(r"(\d+) bytes smem", said, 0)
    mma = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", text["ptx"]))
    registers, serialised = number(r"Used (\d+) registers", said), "wgmma.mma_async instructions are serialized" in said
    return Compiled(registers, None, spill, stack, shared, mma, *dots, serialised, profile)


def plain(ptx: str) -> str:
    """The same without unrolling, which adds remainders, and without the line numbers that Triton 3.8 counts up inside
    inline assembler."""
    ptx = re.sub(r"^\.address_size 64$", '\\g<0>\n.pragma "nounroll";', ptx, count=1, flags=re.MULTILINE)
    unnumbered = lambda block: re.sub(r"^\s*\.loc.*\n", "", block[0], flags=re.MULTILINE)  # noqa: E731
    return re.sub(r"// begin inline asm\n.*?// end inline asm", unnumbered, ptx, flags=re.DOTALL)


def assembled(assemble, ptx: str) -> tuple[str, bytes]:
    """(what `ptxas -v` says, the machine code), by Triton's own command."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        cubin = assemble(ptx, {})
    return log.getvalue(), cubin


def disassembled(cubin: bytes) -> str:
    """A listing with source lines."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([nvdisasm(), "-gi", "-c", file.name], capture_output=True, text=True)
    if "/*0000*/" not in result.stdout:
        raise RuntimeError(f"nvdisasm shows no code: {result.stderr.strip()}")
    return result.stdout


@functools.cache
def nvdisasm() -> str:
    own = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    tool = str(own) if own.exists() else shutil.which("nvdisasm")
    if tool is None:
        raise RuntimeError(
            f"nvdisasm is neither at {own} nor on PATH; it comes with the CUDA toolkit, and with "
            "`pip install nvidia-cuda-nvdisasm`"
        )
    return tool


def number(pattern: str, text: str, absent: int | None = None) -> int:
    match = re.search(pattern, text)
    if match is None and absent is None:
        raise RuntimeError(f"the compiler's output says nothing of {pattern}: {text[:200]!r}")
    return int(match[1]) if match else absent


# ---- what the compiler lost ------------------------------------------------------------------------------------------


def dots_of_source(module: str) -> int:
    """Of the public function and those it calls, before anything is simplified, but for loops that never run."""
    functions, public = {}, None
    for body in module.split("tt.func ")[1:]:
        head = re.match(r'(?P<public>public )?(?:\w+ )?@"?(?P<name>[^"(]+)', body)
        loops, lines = sass.read_loops(body)
        found = Counter()
        for line, inside in zip(body.splitlines(), lines.values(), strict=True):
            while inside is not None and loops[inside].constant != 0:
                inside = loops[inside].parent
            if inside is None:
                found[None] += " tt.dot " in line
                found.update(re.findall(r'tt\.call @"?([^"(]+)', line))
        functions[head["name"]] = found
        public = head["name"] if head["public"] else public

    def total(function: str) -> int:
        return sum(times * (1 if name is None else total(name)) for name, times in functions[function].items())

    return total(public)


def dots_of_variables(ttir: str) -> int:
    """Those that do not multiply zeros, which is what is left of a name that was lost: its value before the loop."""
    zeros = set(re.findall(r"(%\S+) = arith\.constant dense<0(?:\.0+e\+00)?>", ttir))
    factors = re.findall(r"\btt\.dot (%[^,\s]+), (%[^,\s]+),", ttir)
    return sum(zeros.isdisjoint(pair) for pair in factors)


def dots_of_machine(ttgir: str) -> int:
    return len(re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", ttgir))


def lost_names(source: str) -> list[tuple[str, int, str]]:
    """(function, line of the loop, name) of the loop-carried names that Triton drops without a word (3.6 and 3.8).

    Before a loop two names get one value (`now = zero; before = zero`), in the loop one takes the other's (`before =
    now; now = …`). To see what a loop carries, Triton reads its body once with the values from before; `before` then
    has not changed, and stays what it was. The interpreter computes it right. With a value of its own each is carried.
    """
    functions = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef)]
    kernels = [f for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)]
    return [(f.name, line, name) for f in kernels for line, name in lost_in(f.body, {})]


def lost_in(body: list[ast.stmt], values: dict[str, object]) -> list[tuple[int, str]]:
    """(line, name) of what the loops in `body` lose; `values`, what each name stands for, is brought up to date."""
    lost = []
    for statement in body:
        if isinstance(statement, ast.For | ast.While):
            after = dict(values)
            lost += lost_in(statement.body, after)
            written = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            carried = {name for name in values if after[name] is not values[name]}
            for name in (written & values.keys()) - carried:
                if any(values[other] is values[name] for other in carried):
                    lost.append((statement.lineno, name))
            values |= {name: object() for name in written}
        elif isinstance(statement, ast.If):
            lost += lost_in(statement.body, values) + lost_in(statement.orelse, values)
        elif isinstance(statement, ast.Assign):
            old = dict(values)  # the right side is read first
            for target in statement.targets:
                for name, value in pairs(target, statement.value):
                    if isinstance(value, ast.Name):
                        values[name] = old.setdefault(value.id, object())
                        values.setdefault(value.id, values[name])
                    else:
                        values[name] = object()
        elif isinstance(statement, ast.AugAssign | ast.AnnAssign) and isinstance(statement.target, ast.Name):
            values[statement.target.id] = object()
    return lost


def pairs(target: ast.expr, value: ast.expr) -> list[tuple[str, ast.expr | None]]:
    """(name, what is assigned to it) of an assignment, `a, b = c, d` taken apart."""
    if isinstance(target, ast.Tuple):
        alike = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
        values = value.elts if alike else [None] * len(target.elts)
        return [pair for t, v in zip(target.elts, values, strict=True) for pair in pairs(t, v)]
    return [(target.id, value)] if isinstance(target, ast.Name) else []

"""How many instructions a kernel issues, fitted to what the emulation counted (benchmarks/issue_slots.py)."""

from random import Random

from benchmarks import issue_slots

# A loop around two ways, of which one loads and is longer; `BRA` of the second form takes its predicate as an operand.
LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
	//## File "/csrc/core.cuh", line 9 inlined at "/csrc/kernel.cu", line 3
	//## File "/csrc/kernel.cu", line 3
        /*0010*/                   LDS.64 R2, [R0] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
	//## File "/csrc/kernel.cu", line 20
        /*0030*/                   LDG.E R4, [R2] ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0070*/                   MOV R4, R5 ;
.L_x_2:
        /*0080*/                   BRA P1, `(.L_x_0) ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA `(.L_x_2) ;
"""


def launch(warps: int, turns: int, loads: int) -> dict:
    lines = [
        ("kernel.cu:3", "shared_read", {"requests": turns}),
        ("kernel.cu:21", "global_read", {"requests": loads}),  # another compiler's line of the same statement
    ]
    return {"call": "kernel", "threads": 64, "counts": {"blocks": warps // 2}, "lines": lines}


def test_each_way_through_a_loop_is_counted():
    draw = Random(3)
    function = issue_slots.parsed(LISTING)
    assert [i.conditional for i in function.instructions] == [i in (2, 8) for i in range(11)]
    for _ in range(10):
        warps = 2 * draw.randint(1, 9)
        turns = warps * draw.randint(1, 9)
        loads = draw.randint(0, turns)
        issued, misfit = issue_slots.fitted(function, launch(warps, turns, loads))
        assert abs(issued - (2 * warps + 3 * turns + 4 * loads + (turns - loads))) < 1e-6 * issued
        assert misfit < 1e-9


def test_what_no_way_explains_is_the_misfit():
    """More loads than turns of the loop that they are in: all turns load, and the rest is not explained."""
    issued, misfit = issue_slots.fitted(issue_slots.parsed(LISTING), launch(2, 10, 14))
    assert abs(issued - (2 * 2 + 7 * 10)) < 20 and 4 / 24 * 0.99 < misfit < 4 / 24 * 1.01

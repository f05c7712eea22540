"""What native code prints inside is dropped, what stands before and after is kept, in order."""

import subprocess
import sys

PROGRAM = """
import ctypes, os
from llmpq.planner.silence import silent_stdout

libc = ctypes.CDLL(None)
print("before")
with silent_stdout():
    libc.puts(b"a banner in C's buffer")
    os.write(1, b"a banner\\n")
libc.puts(b"C again")
libc.fflush(None)
print("after")
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_what_is_written_inside_is_dropped():
    assert run(PROGRAM).splitlines() == ["before", "C again", "after"]


def test_a_closed_standard_output_is_no_fault():
    lines = ["import os", "from llmpq.planner.silence import silent_stdout", "os.close(1)"]
    assert run("\n".join([*lines, "with silent_stdout():", "    pass", "os._exit(0)"])) == ""


def test_a_solver_that_prints_when_it_is_made():
    """As HiGHS 1.16 does."""
    program = """
import os, highspy
from llmpq.planner import solver
made = highspy.Highs
def loud():
    os.write(1, b"Running HiGHS 1.16.0")
    return made()
highspy.Highs = loud
import numpy as np
one, row = np.ones(1), np.array([0, 1])
program = solver.LinearProgram(
    one, 0.0, row, np.zeros(1, int), one, 0 * one, 5 * one, 0.5 * one, 3 * one, one > 0
)
print(solver.Solver().integers(program).x)
"""
    assert run(program).strip() == "[1.]"

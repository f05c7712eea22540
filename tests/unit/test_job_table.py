"""What a resource takes in a run, from the table of its jobs, against each job priced alone."""

from dataclasses import replace
from functools import partial

import numpy as np
from test_search import cluster_of, problem_on

from llmpq.planner.job_table import table_of
from llmpq.planner.problem import Sizes
from llmpq.planner.works import Work, chunk_s

LENGTHS = ((40, 9), (96, 8), (300, 3), (700, 20)) * 8


def prefill_s(rows: int, tokens: np.ndarray) -> np.ndarray:
    return 0.5 + rows * tokens**1.5


def decode_s(rows: int, past: np.ndarray) -> np.ndarray:
    return 0.1 + rows * np.sqrt(past)


def test_costs_of_a_table_are_those_of_its_jobs_one_by_one() -> None:
    problem = problem_on(cluster_of({"t4-16g": 1}, mib=900), 4, 1024, ("16",))
    problem = replace(problem, lengths=LENGTHS, _known={})
    sizes = Sizes(8, (1, 2, 4), (2, 4, 8), chunk_tokens=128)
    costs = table_of(problem, sizes).costs(Work(prefill_s, decode_s))
    several = 0
    for p, q in np.ndindex(sizes.shape):
        counts = problem.job_counts(sizes, p, q)
        total = {"first": 0.0, "refills": 0.0}
        for name in total:
            for job, number in getattr(counts, name).items():
                whole = partial(prefill_s, job.rows)
                begin, end = float(job.begin), float(job.end)
                seconds = chunk_s(whole, begin, end) if begin else whole(np.array(end))
                total[name] += number * float(seconds)
                several += job.begin > 0
        prefill = sum(total.values())
        steps = sum(n * float(decode_s(r, np.array(past))) for r, past, n in counts.steps)
        assert np.isclose(costs.prefill[p, q], prefill)
        assert np.isclose(costs.busy[p, q], prefill + steps)
        assert np.isclose(costs.first[p, q], total["first"] / counts.num_first)
    assert several > 20

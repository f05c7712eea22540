"""Why nothing fits: what is short, where, by how much, and the cheapest changes that would do.

Memory is looked at for the cheapest setting: the lowest precision, the fewest requests in flight,
micro-batches of one, the best order. Where memory would do and the quality budget does not, the
least quality loss that memory allows is named. Each fix that is offered was checked to be enough
for what is short: one for memory makes room for every layer, and may still lose too much quality.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmpq.cluster import GIB, MIB
from llmpq.errors import InfeasibleError
from llmpq.model_spec import ModelSpec
from llmpq.planner.baselines import amount, in_bits, least_omega
from llmpq.planner.problem import Instance, Problem, Setting, make_instance
from llmpq.planner.search import all_settings, device_orders, is_hopeless, most_layers


def infeasible(problem: Problem, precisions: Sequence[str]) -> InfeasibleError:
    """The error for a problem without a plan. `precisions`: all that the costs offer."""
    settings = cheapest_settings(problem)
    if not settings:
        return InfeasibleError(_too_few_layers(problem.spec, len(problem.cluster.devices())))
    if lacks_memory(problem):
        return InfeasibleError(_memory_text(problem, settings, precisions))
    return InfeasibleError(_quality_text(problem, settings, precisions))


def lacks_memory(problem: Problem) -> bool:
    """Not even the cheapest settings have room for all layers."""
    settings = cheapest_settings(problem)
    return all(is_hopeless(make_instance(problem, setting)) for setting in settings)


def cheapest_settings(problem: Problem) -> list[Setting]:
    """Every order at the fewest requests in flight that the workload allows."""
    orders, _ = device_orders(problem.cluster.devices(), problem.spec.num_layers)
    batch = problem.workload.batch
    requests = 1 if batch == "auto" else min(batch, len(problem.lengths))
    return [Setting(order, _auto_floor(problem, requests), 1, 1) for order in orders]


def _auto_floor(problem: Problem, requests: int) -> int:
    if problem.workload.batch != "auto":
        return requests
    return min(s.batch for s in all_settings(problem, [tuple(problem.cluster.devices())]))


# ---- memory


def _memory_text(problem: Problem, settings: Sequence[Setting], precisions: Sequence[str]) -> str:
    best = min(settings, key=lambda s: missing_bytes(make_instance(problem, s)).sum())
    instance = make_instance(problem, best)
    lowest = _lowest(problem)
    lines = [
        f"no plan fits the memory: {problem.spec.name} at {in_bits(lowest)} with {best.batch} "
        f"requests in flight, micro-batches of 1: {_where(problem, best, instance)}"
    ]
    return "\n".join([*lines, *_fixes(problem, best, instance, precisions)])


def missing_bytes(instance: Instance) -> np.ndarray:
    """[N]: bytes that would have to be added; layers that fit nowhere go where least is missing."""
    held = most_layers(instance)
    least, unpacked = _least_layer(instance)
    need = np.maximum(held, 1)
    spare = instance.capacity - need * least - unpacked
    while need.sum() < instance.num_layers:
        j = int(spare.argmax())
        need[j] += 1
        spare[j] -= least
    return np.maximum(0.0, -spare)


def _least_layer(instance: Instance) -> tuple[float, float]:
    offered = instance.available.all(axis=0)
    offered = offered if offered.any() else instance.available.any(axis=0)
    least = int(np.where(offered, instance.layer_bytes, np.inf).argmin())
    return float(instance.layer_bytes[least]), instance.unpacked_bytes * bool(
        instance.packed[least]
    )


def _where(problem: Problem, setting: Setting, instance: Instance) -> str:
    missing = missing_bytes(instance)
    short = [
        f"{setting.devices[j].type}#{j} on {setting.devices[j].node} is {amount(missing[j])} short"
        for j in np.flatnonzero(missing)
    ]
    total = f"the cluster is {amount(float(missing.sum()))} short in all"
    held = int(most_layers(instance).sum())
    room = f"it has room for {held} of {instance.num_layers} layers"
    return "; ".join([*short, total, room])


def _fixes(
    problem: Problem, setting: Setting, instance: Instance, precisions: Sequence[str]
) -> list[str]:
    missing = missing_bytes(instance)
    tried = [
        _fewer_requests(problem, setting),
        _lower_precision(problem, setting, precisions),
        _shorter_prompts(problem, setting),
    ]
    worst = int(missing.argmax())
    device = setting.devices[worst].type
    enough = not is_hopeless(replace(instance, capacity=instance.capacity + missing))
    total = amount(_rounded_up_bytes(float(missing.sum())))
    more = f"{total} more memory in all (most of it on {device}#{worst})"
    more = more if enough else ""
    return [f"would fit: {fix}" for fix in [*tried, more] if fix]


def _rounded_up_bytes(num_bytes: float) -> float:
    """So that the amount that is printed, with two decimals, is enough."""
    unit = (GIB if num_bytes >= GIB else MIB) / 100
    return float(np.ceil(num_bytes / unit) * unit)


def _fewer_requests(problem: Problem, setting: Setting) -> str:
    batch = setting.batch
    while batch > 1:
        batch //= 2
        if not is_hopeless(make_instance(problem, replace(setting, batch=batch))):
            return f"{batch} requests in flight (workload: batch: {batch})"
    return ""


def _lower_precision(problem: Problem, setting: Setting, precisions: Sequence[str]) -> str:
    for name in precisions:
        if name in problem.precisions:
            continue
        wider = replace(problem, precisions=(*problem.precisions, name), _known={})
        if not is_hopeless(make_instance(wider, setting)):
            return f"allowing {in_bits(name)} (--precisions {','.join(wider.precisions)})"
    return ""


def _shorter_prompts(problem: Problem, setting: Setting) -> str:
    longest = problem.max_prompt_tokens
    while longest > 16:
        longest //= 2
        lengths = tuple((min(prompt, longest), new) for prompt, new in problem.lengths)
        if not is_hopeless(make_instance(replace(problem, lengths=lengths, _known={}), setting)):
            return f"prompts of at most {longest} tokens"
    return ""


def _lowest(problem: Problem) -> str:
    sizes = make_instance(problem, cheapest_settings(problem)[0]).layer_bytes
    return problem.precisions[int(sizes.argmin())]


def _too_few_layers(spec: ModelSpec, num_devices: int) -> str:
    return (
        f"{spec.name} has {spec.num_layers} layers and the cluster {num_devices} devices; "
        f"every device of a plan needs a layer: name at most {spec.num_layers} devices in the "
        "cluster file"
    )


# ---- quality


def _quality_text(problem: Problem, settings: Sequence[Setting], precisions: Sequence[str]) -> str:
    least = least_omega(problem, settings)
    asked, needed = problem.quality.percent(problem.budget), problem.quality.percent(least)
    lines = [
        f"no plan keeps the quality: memory allows none that loses less than {needed:.3g} % "
        f"(quality: {problem.quality.source}), asked for at most {asked:.3g} %",
        f"would fit: --max-quality-loss {_rounded_up(needed)}",
    ]
    batch = _batch_for_quality(problem, settings)
    lines += [f"would fit: {batch} requests in flight (workload: batch: {batch})"] if batch else []
    wider = _precision_for_quality(problem, settings, precisions)
    lines += [f"would fit: allowing {in_bits(wider)}"] if wider else []
    return "\n".join([*lines, "or give the cluster more memory"])


def _rounded_up(percent: float) -> str:
    digits = 3 if percent < 1 else 2
    return f"{np.ceil(percent * 10**digits + 1e-9) / 10**digits:.{digits}f}"


def _batch_for_quality(problem: Problem, settings: Sequence[Setting]) -> int:
    batch = settings[0].batch
    while batch > 1:
        batch //= 2
        if least_omega(problem, [replace(s, batch=batch) for s in settings]) <= problem.budget:
            return batch
    return 0


def _precision_for_quality(
    problem: Problem, settings: Sequence[Setting], precisions: Sequence[str]
) -> str:
    for name in precisions:
        if name not in problem.precisions:
            wider = replace(problem, precisions=(*problem.precisions, name), _known={})
            if least_omega(wider, settings) <= problem.budget:
                return name
    return ""

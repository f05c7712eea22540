"""The layer cake: who may import whom, and which third-party library is seen where.

Nouns <- costs <- planner <- cli, and nouns <- quant <- models <- checkpoint <- runtime <-
evaluation <- profiler <- cli; the runtime stands on `prompts` and `reliability` too. The two
branches meet only in `cli`, `dry_run`, `library` and through files, so that planning needs no torch
and the runtime needs no planner; `render` holds what people read. Imports inside functions count
too; a third-party library that is marked lazy may be imported there and nowhere else.

`python tests/unit/test_layering.py` prints the cake with the modules it holds.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmpq"


@dataclass(frozen=True)
class Part:
    """One slice: what it is made of and what it may import."""

    level: str
    name: str
    parts: frozenset[str] = frozenset()  # of llmpq, beside itself
    third_party: frozenset[str] = frozenset()
    lazy: frozenset[str] = frozenset()  # third-party too, inside functions only


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOUNS = _names(
    "expert_kernels "
    "version errors precision artifact config_keys windows family_sizes families"
    " language_part model_known model_spec judged_models model_lookup "
    "workload devices cluster profile_data plan_data plan_diff run_report link_data quantizer job "
    "schedule schedule_state machine workspace kernel kernel_table serving device_names placement "
    "seats launch "
    "plain whole_file others_files planning_methods planned_kernels "
    "cluster_draft vllm_support vllm_settings exported"
)
PLAIN = "pydantic yaml "
TORCH = "torch transformers safetensors tokenizers numpy "
KERNELS = "bitsandbytes gptqmodel triton humming huggingface_hub accelerate "

CAKE = [
    Part("0", "nouns", _names(""), _names(PLAIN), _names("pandas huggingface_hub")),
    Part("1", "costs", _names("nouns"), _names(PLAIN + "numpy"), _names("sklearn")),
    Part(
        "2a",
        "planner",
        _names("nouns costs"),
        _names(PLAIN + "numpy highspy"),
        _names("gurobipy"),
    ),
    Part("2b", "quant", _names("nouns"), _names(PLAIN + TORCH), _names(KERNELS)),
    Part("2b", "models", _names("nouns quant"), _names(PLAIN + TORCH), _names(KERNELS)),
    Part(
        "3",
        "checkpoint",
        _names("nouns models quant"),
        _names(PLAIN + TORCH),
        _names("huggingface_hub"),
    ),
    Part(
        "3",
        "prompts",
        _names("nouns"),
        _names("transformers"),
        _names("pyarrow"),
    ),
    Part("3", "reliability", _names("nouns prompts"), _names("pydantic torch")),
    Part(
        "4",
        "runtime",
        _names("nouns models quant checkpoint prompts reliability"),
        _names(PLAIN + TORCH),
    ),
    Part(
        "5",
        "evaluation",
        _names("nouns models quant checkpoint prompts runtime"),
        _names(PLAIN + TORCH),
        _names("lm_eval datasets"),
    ),
    Part(
        "6",
        "profiler",
        _names("nouns models quant checkpoint runtime evaluation"),
        _names(PLAIN + TORCH),
        _names(KERNELS),
    ),
    Part(
        "6",
        "export",
        _names("nouns costs models quant checkpoint"),
        _names(TORCH),
        _names("compressed_tensors vllm ray"),
    ),
    Part(
        "7",
        "library",
        _names("nouns costs planner models checkpoint prompts runtime export"),
        lazy=_names("torch"),
    ),
    Part(
        "7",
        "dry_run",
        _names("nouns costs planner quant models checkpoint runtime"),
        _names("pydantic"),
        _names("torch"),
    ),
    Part(
        "8",
        "render",
        _names("nouns costs planner dry_run models checkpoint evaluation"),
        _names("rich numpy"),
        _names("torch matplotlib"),
    ),
    Part(
        "9",
        "cli",
        _names(
            "nouns costs planner models quant checkpoint prompts reliability runtime evaluation "
            "profiler export dry_run render"
        ),
        _names(PLAIN + "click rich numpy"),
        _names(TORCH + KERNELS + "pandas compressed_tensors vllm"),
    ),
    Part("9", "run", _names("cli")),
    Part("10", "llmpq", _names("nouns library")),  # what `import llmpq` offers
]
PARTS = {part.name: part for part in CAKE}
# Modules that may import a little more than the rest of their part.
MORE_THIRD_PARTY = {
    # Triton's decorators wrap whole functions: these are imported when a kernel is launched.
    "llmpq.quant.triton_source": _names("triton"),
    "llmpq.quant.grouped_source": _names("triton"),
    "llmpq.models.attention_source": _names("triton"),
    # A subclass of lm-eval's model: imported when tasks are run.
    "llmpq.evaluation.lm_eval_model": _names("lm_eval"),
}
# Modules that may import only these of another part.
ONLY = {("llmpq.run.__main__", "cli"): _names("llmpq.cli.run")}


@dataclass(frozen=True)
class Import:
    """One imported module. Lazy: inside a function, or for the type checker alone."""

    module: str
    line: int
    lazy: bool


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """The slice that a module of llmpq lies in."""
    names = module.split(".")
    if len(names) == 1:
        return "llmpq" if module == "llmpq" else None
    if len(names) == 2 and names[1] in NOUNS:
        return "nouns"
    return "run" if module == "llmpq.__main__" else names[1] if names[1] in PARTS else None


def imports(name: str, path: Path, known: dict[str, Path]) -> list[Import]:
    """All imports of a module, `from package import module` resolved to the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[Import] = []
    for node, lazy in _walk(tree, lazy=False):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append(Import(full if full in known else base, node.lineno, lazy))
    return found


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = inside or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
        yield child, inside
        yield from _walk(child, inside)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def import_faults(known: dict[str, Path]) -> list[str]:
    """Every import that the cake forbids."""
    faults = []
    for name, path in known.items():
        part = part_of(name)
        if part is None:
            faults.append(f"{name}: has no place in the cake; give it one in CAKE or NOUNS")
            continue
        for item in imports(name, path, known):
            why = _why_forbidden(name, PARTS[part], item)
            if why:
                faults.append(f"{path.relative_to(ROOT)}:{item.line}: {why}")
    return faults


def _why_forbidden(name: str, part: Part, item: Import) -> str | None:
    top = item.module.partition(".")[0]
    if top == "llmpq":
        return _why_forbidden_inside(name, part, item.module)
    allowed = part.third_party | MORE_THIRD_PARTY.get(name, frozenset())
    if top in sys.stdlib_module_names or top in allowed or (item.lazy and top in part.lazy):
        return None
    if top in part.lazy:
        return f"{part.name} may import {top} only inside a function"
    return f"{part.name} (level {part.level}) may not import {top}"


def _why_forbidden_inside(name: str, part: Part, target: str) -> str | None:
    other = part_of(target)
    if other == part.name:
        return None
    if other is None or other not in part.parts:
        return f"{part.name} (level {part.level}) may not import {target}"
    only = ONLY.get((name, other))
    return f"may import only {', '.join(only)}" if only and target not in only else None


def cycles(known: dict[str, Path]) -> list[list[str]]:
    """Import cycles between modules, lazy imports included."""
    graph = {
        name: {i.module for i in imports(name, path, known) if i.module in known} - {name}
        for name, path in known.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def habit_faults(path: Path) -> list[str]:
    """Habits that this code base does without, wherever they are in a module."""
    faults = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        why = _bad_habit(node)
        if why:
            faults.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {why}")
    return faults


def _bad_habit(node: ast.AST) -> str | None:
    if isinstance(node, ast.Global):
        return "`global`: pass state, do not park it in a module"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.name.partition(".")[0] for alias in node.names}
        module = (getattr(node, "module", None) or "").partition(".")[0]
        banned = (names | {module}) & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
        return f"{', '.join(banned)}: files are JSON or safetensors" if banned else None
    if not isinstance(node, ast.Call):
        return None
    keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    if keywords.get("trust_remote_code"):
        return "trust_remote_code: a checkpoint's own code is never run"
    loads = ast.unparse(node.func) in ("torch.load", "torch.serialization.load")
    if loads and keywords.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    return None


def cake(known: dict[str, Path]) -> str:
    """The cake as a text, top level first."""
    lines = []
    for part in reversed(CAKE):
        inside = [n.removeprefix("llmpq.") for n in known if part_of(n) == part.name]
        if inside:
            below = ", ".join(p.name for p in CAKE if p.name in part.parts) or "-"
            lines.append(f"[{part.level:>2}] {part.name:<9} <- {below}")
            lines.append(f"       {' '.join(inside)}")
    return "\n".join(lines)


def test_imports_follow_the_cake() -> None:
    known = modules()
    print(cake(known))
    faults = import_faults(known)
    assert not faults, "\n" + "\n".join(faults)


def test_parts_stand_on_parts_below_them() -> None:
    for place, part in enumerate(CAKE):
        assert part.parts <= {below.name for below in CAKE[:place]}, part.name


def test_no_import_cycles() -> None:
    found = [" -> ".join(cycle) for cycle in cycles(modules())]
    assert not found, "\n" + "\n".join(found)


def test_habits() -> None:
    faults = [fault for path in modules().values() for fault in habit_faults(path)]
    assert not faults, "\n" + "\n".join(faults)


def test_the_checks_see_faults(tmp_path: Path) -> None:
    """The rules above bite: each fault below is found."""
    assert _why_forbidden("llmpq.planner.ilp", PARTS["planner"], Import("torch", 1, True))
    assert _why_forbidden("llmpq.runtime.x", PARTS["runtime"], Import("llmpq.profiler", 1, True))
    assert _why_forbidden("llmpq.runtime.x", PARTS["runtime"], Import("llmpq.costs.a", 1, False))
    assert _why_forbidden("llmpq.plan_data", PARTS["nouns"], Import("pandas", 1, False))
    assert not _why_forbidden("llmpq.plan_data", PARTS["nouns"], Import("pandas", 1, True))
    assert _why_forbidden("llmpq.costs.memory", PARTS["costs"], Import("scipy", 1, True))
    assert _why_forbidden("llmpq.run.__main__", PARTS["run"], Import("llmpq.cli.plan", 1, False))
    assert not _why_forbidden("llmpq.run.__main__", PARTS["run"], Import("llmpq.cli.run", 1, False))
    bad = "global x", "import pickle", "from pickle import loads", "torch.load(f)"
    bad += ("load(m, trust_remote_code=True)", "torch.load(f, weights_only=False)")
    for code in bad:
        assert any(_bad_habit(node) for node in ast.walk(ast.parse(code))), code
    assert not any(_bad_habit(n) for n in ast.walk(ast.parse("torch.load(f, weights_only=True)")))
    for name, text in {"a": "from llmpq import b", "b": "def f():\n import llmpq.a"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    known = {f"llmpq.{name}": tmp_path / f"{name}.py" for name in "ab"}
    assert cycles(known) == [["llmpq.a", "llmpq.b", "llmpq.a"]]


def test_every_level_0_noun_exists() -> None:
    missing = [n for n in NOUNS - {"llmpq"} if not find_spec(f"llmpq.{n}")]
    assert not missing, "drop these from NOUNS"


if __name__ == "__main__":
    print(cake(modules()))

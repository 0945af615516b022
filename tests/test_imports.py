"""The order of the package's layers, read off its imports; and the size of its files.

A layer may import the layers above it in `LAYERS`, and itself where it is a package; `BESIDE` names those that
may import less than their place allows.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ep_prune"
LINES = 450

# From the ground up. A layer is a module or a package of `ep_prune`, by its first name.
LAYERS = (
    "errors",
    "modules",
    "graph",
    "slots",
    "channels",
    "rules",
    "trace",
    "sharing",
    "cost",
    "evaluate",
    "bounds",
    "find",
    "numbering",
    "embedding",
    "demand",
    "heads",
    "nearest",
    "streams",
    "selection",
    "rewrite",
    "norm_folding",
    "spaces",
    "linear_places",
    "linear_cases",
    "reflections",
    "mixing",
    "head_mixing",
    "verification",
    "plan",
    "trial",
    "widen_rules",
    "widen_spaces",
    "widen_report",
    "widen_plan",
    "widen",
    "probes",
    "report",
    "records",
    "consumers",
    "elimination",
    "gauge",
    "refine",
    "effective_width",
    "monitor",
    "criticality",
    "pipeline",
    "calibrate",
    "projection",
    "gauss_newton",
    "readers",
    "branches",
    "structure",
    "pairs",
    "divergence",
    "augment",
    "curves",
    "measurements",
    "fitting",
    "layer_times",
    "budget",
    "latency",
    "memory",
    "compress_report",
    "narrowing",
    "compress",
    "integrations",
    "why",
    "storage",
    "demo_model",
    "cli_models",
    "cli_files",
    "cli_embed",
    "cli_compress",
    "cli",
    "__init__",
    "__main__",
)

BESIDE = {
    "verification": {"errors"},  # the checker shares no code with the prover
    "channels": set(),  # claims on channels know no graph
    "slots": set(),
    "demo_model": set(),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(tree: ast.AST, path: Path) -> list[tuple[str, ast.AST]]:
    """Every module of the package that a file imports, by full name, at any depth of the code."""
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by a relative path"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in MODULES else str(node.module), node))
    return [(name, node) for name, node in found if name.partition(".")[0] == PACKAGE.name]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_layer_is_in_the_order():
    assert {layer_of(path) for path in FILES} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path):
    layer = layer_of(path)
    allowed = BESIDE.get(layer, set(LAYERS[: LAYERS.index(layer)]) - {"__init__"})
    if layer in ("cli", "__main__"):
        allowed = allowed | {"__init__"}  # the version
    for name, node in imports(parsed(path), path):
        target = layer_of(MODULES[name]) if name in MODULES else f"{name}, which is no module"
        inside = target == layer and (PACKAGE / layer).is_dir()
        assert inside or target in allowed, f"{path.name}:{node.lineno}: {layer} must not import {target}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_import_of_the_package_hides_in_a_function(path):
    tree = parsed(path)
    top = {id(node) for node in tree.body}
    for name, node in imports(tree, path):
        assert id(node) in top, f"{path.name}:{node.lineno} imports {name} late"


def test_modules_of_a_package_make_no_cycle():
    """Inside `rules`, `numbering` and `verification` too; a package's own front imports all of its parts."""
    edges = {name: {target for target, _ in imports(parsed(path), path)} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_the_verifier_imports_torch_and_errors_alone():
    for path in FILES:
        if layer_of(path) == "verification":
            for node in ast.walk(parsed(path)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    root = name.partition(".")[0]
                    own = name == "ep_prune.errors" or name.startswith("ep_prune.verification")
                    assert own or root == "torch" or root in STANDARD, f"{path.name} imports {name}"


STANDARD = {
    "__future__",
    "collections",
    "contextlib",
    "copy",
    "ctypes",
    "dataclasses",
    "functools",
    "itertools",
    "json",
    "math",
    "numbers",
    "typing",
}


def test_nothing_but_integrations_imports_torch_pruning():
    for path in FILES:
        if layer_of(path) != "integrations":
            for node in ast.walk(parsed(path)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                assert "torch_pruning" not in {name.partition(".")[0] for name in names}, path.name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


def test_every_algebra_is_loaded_with_the_walk():
    """A handler that registers itself on import is none until it is imported; a test that does hides that."""
    from ep_prune.numbering import walk

    files = (PACKAGE / "numbering").glob("*.py")
    own = {path.stem for path in files if "@transfer.register" in path.read_text()}
    loaded = {handler.__name__.rpartition(".")[2] for handler in walk._HANDLERS}
    assert own - {"elementwise"} == loaded

# SPDX-License-Identifier: Apache-2.0
"""docs/design.md says who may import whom; this is the same table, enforced."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "flax_vlm"
BASE = {"shapes", "meters", "trees", "batch", "build", "figures", "snapshots"}

# layer: what it may import inside flax_vlm, besides itself. "a.b" allows one module of a layer.
ALLOWED = {
    **{name: BASE for name in BASE},
    "nn": {"shapes", "build"},
    "losses": {"shapes"},
    "data": {"batch", "build", "snapshots"},
    "models": BASE | {"nn"},
    "objectives": BASE | {"models", "losses", "nn.norms"},
    "scaling": BASE | {"models", "nn"},
    "convert": BASE | {"models", "nn"},
    "training": BASE | {"objectives.base"},
    "evaluation": BASE | {"objectives.base", "data"},
    "hub": BASE
    | {"convert", "models", "objectives", "data", "evaluation"}
    | {"training.checkpoints", "training.workdir", "training.sharding", "nn"},
    "start": BASE | {"nn", "models", "objectives", "training", "convert"},
    "program": BASE | {"nn", "models", "objectives", "scaling", "training", "start"},
    "experiment": BASE
    | {"program"}
    | {"nn", "losses", "data", "models", "objectives", "scaling", "training", "evaluation", "hub"},
    "report": BASE | {"experiment", "program", "models", "training"},
}
# layer: packages from outside that it must not import
FORBIDDEN = {
    "data": {"jax", "flax", "optax", "orbax"},
    "losses": {"flax"},
    "training": {"flax"},
}
NOWHERE = {"tensorflow", "torch", "transformers", "clu", "jax._src"}


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path, layer):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "flax_vlm":
            forbidden = FORBIDDEN.get(layer, set()) | NOWHERE
            if parts[0] in forbidden or ".".join(parts[:2]) in forbidden:
                yield name
        elif len(parts) > 1 and parts[1] not in (layer, "__version__"):
            allowed = ALLOWED.get(layer, set())
            if not ({parts[1], ".".join(parts[1:3])} & allowed):
                yield name


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_imports_flow_one_way():
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if layer_of(path) not in ("tools", "__init__")
        for name in violations(path, layer_of(path))
    ]
    assert not bad, bad


def test_a_planted_violation_is_found(tmp_path):
    planted = tmp_path / "x.py"
    planted.write_text("from flax_vlm.training import loop\nimport flax\nfrom torch import nn\n")
    found = set(violations(planted, "losses"))
    assert found == {"flax_vlm.training.loop", "flax", "torch.nn"}


def test_every_layer_is_in_the_design_page():
    design = (ROOT / "docs" / "design.md").read_text()
    layers = {layer_of(path) for path in SOURCES} - {"__init__", "tools"}
    assert layers <= ALLOWED.keys(), layers - ALLOWED.keys()
    assert not [layer for layer in layers if layer not in design]


def test_no_file_is_above_400_lines():
    files = [*SOURCES, *ROOT.glob("*.py"), *(ROOT / "configs").rglob("*.py")]
    assert not [str(f) for f in files if len(f.read_text().splitlines()) > 400]


def test_no_function_is_above_80_lines():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
                long += [f"{path.name}:{node.name} {lines}"] if lines > 80 else []
    assert not long, long


def test_files_are_named_for_their_content():
    empty = {"utils", "util", "common", "misc", "helpers", "helper", "lib"}
    assert not [str(p) for p in ROOT.rglob("*.py") if p.stem in empty and ".venv" not in p.parts]


def test_every_file_starts_with_its_licence():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
    line = "# SPDX-License-Identifier: Apache-2.0"
    assert not [
        str(f) for f in files if f.read_text().strip() and not f.read_text().startswith(line)
    ]


@pytest.mark.parametrize("module", ["flax_vlm", "flax_vlm.experiment", "flax_vlm.hub"])
def test_importing_needs_no_tensorflow_and_no_torch(module):
    code = f"import sys, {module}; print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip().endswith("[]"), found.stdout + found.stderr

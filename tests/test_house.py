"""The house rules that a machine can check: which folder may import which, and what must not exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAF = ("profiles.nvtx", "profiles.records")
# what each folder may import of ours (DESIGN 1), as prefixes of the names after "dejavu."
DECODING = ("predictors.selection", "predictors.networks", "predictors.files")
MAY_IMPORT = {
    "kernels": (*LEAF, "kernels"),
    "parallel": (*LEAF, "parallel", "kernels"),
    **{f"{name.replace('.', '/')}.py": (*LEAF, "kernels", "parallel", *DECODING) for name in DECODING},
    "runtime": (*LEAF, "profiles.graph_nodes", "kernels", "parallel", *DECODING, "runtime"),
    **{f"{name.replace('.', '/')}.py": () for name in LEAF},
    "profiles/graph_nodes.py": (*LEAF, "kernels.driver"),
    "profiles": (*LEAF, "profiles", "kernels", "parallel", "predictors", "runtime"),
    "predictors": (*LEAF, "profiles", "kernels", "parallel", "predictors", "runtime"),
    "launch": ("",),
}
SOURCES = sorted(
    path for folder in ("kernels", "parallel", "predictors", "runtime", "profiles", "launch")
    for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip


def imports(path):
    """The names after ``dejavu.`` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("dejavu.") for name in names if name.startswith("dejavu."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    relative = path.relative_to(ROOT)
    allowed = MAY_IMPORT.get(str(relative), MAY_IMPORT[relative.parts[0]])
    forbidden = [name for name in imports(path) if not name.startswith(allowed)]
    assert not forbidden


def test_kernels_is_no_package_that_transformers_would_find():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_no_file_depends_on_a_private_path():
    private = re.compile(r"\bshared/|(?<![\w.])/(?:home|mnt|root|work)/\w")
    scripts = [ROOT / "Makefile", ROOT / ".ci" / "run", *ROOT.glob("*.toml"), *ROOT.glob("launch/**/*.s*h")]
    sources = [*SOURCES, *scripts, *(p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__))]
    assert not [p for p in sources if private.search(p.read_text())]

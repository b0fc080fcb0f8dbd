"""The rules of the house that a machine can check: who imports whom, what is not imported, how long
the core is.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSIDE = sorted((ROOT / "wan5b").glob("*.py"))
EXTRAS = sorted((ROOT / "wan5b" / "extras").glob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
TOOLS = [ROOT / "prepare.py", ROOT / "live.py", *sorted((ROOT / "tools").rglob("*.py"))]
CORE = [*INSIDE, *SCRIPTS]
EVERYTHING = [*CORE, *EXTRAS, *TOOLS]
# A module of wan5b imports only from those before it.
ORDER = (
    *("util", "fuse", "flow", "attention", "kvcache", "dit", "vae22", "t5", "data"),
    *("weights", "distill", "runs", "stages", "fsdp", "optim"),
)
# PIL is the package pillow.
RUN_TIME = {
    "torch",
    "safetensors",
    "sentencepiece",
    "numpy",
    "imageio",
    "ftfy",
    "tqdm",
    "PIL",
    "av",
}
OPTIONAL = {"matplotlib", "wandb", "tensorboard"}  # imported inside functions only
LOCAL = {"wan5b", "train", "sample", "prepare", "live"}
DISTRIBUTED = {"fsdp.py", "optim.py", "checkpoints.py"}
# These alone need triton, which is not where there is no GPU.
KERNELS = ("fp8_kernels", "fp8_attention_kernels")
LINES, FILE_LINES = 2600, 450


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


everywhere = pytest.mark.parametrize("path", EVERYTHING, ids=named)


def imports(node: ast.AST) -> set[str]:
    """Dotted names of all modules that are imported anywhere below the node.

    `from a import b` gives a and a.b.
    """
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            names |= {child.module, *(f"{child.module}.{alias.name}" for alias in child.names)}
    return names


def modules(path: Path) -> set[str]:
    """The modules of wan5b that a file imports: "flow", "extras.formats"."""
    known = {path.stem for path in INSIDE} | {f"extras.{path.stem}" for path in EXTRAS}
    found = {name.removeprefix("wan5b.") for name in imports(ast.parse(path.read_text()))}
    return found & known


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    rows = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            rows |= set(range(token.start[0], token.end[0] + 1))
    return len(rows - docstrings)


def test_counting():
    text = '"""Doc.\n\nMore."""\n\nimport os  # why\n\n# comment\n'
    text += 'def f(a):\n    "doc"\n    return """x\ny"""\n'
    assert code_lines(text) == 4
    assert imports(ast.parse("def f():\n    import a.b\n    from c import d")) == {
        "a.b",
        "c",
        "c.d",
    }
    assert {"flow", "kvcache"} <= modules(ROOT / "wan5b" / "distill.py")
    assert "extras.formats" in modules(ROOT / "train.py")


def test_import_order():
    """Inside wan5b upward only; extras import wan5b and one another, without a circle; nothing
    imports scripts.
    """
    assert {path.stem for path in INSIDE} == {"__init__", *ORDER}
    for path in INSIDE:
        allowed = set(ORDER[: ORDER.index(path.stem)]) if path.stem in ORDER else set()
        assert modules(path) <= allowed, f"{path.name} imports {modules(path) - allowed}"
    for path in [*INSIDE, *EXTRAS]:
        roots = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not roots & {"train", "sample", "prepare", "live", "tools"}, (
            f"{path.name} imports a script"
        )

    # Take away what imports nothing that is left, until nothing is left.
    left = {f"extras.{path.stem}": modules(path) for path in EXTRAS}
    while left:
        free = {name for name, needs in left.items() if not needs & (left.keys() - {name})}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@everywhere
def test_packages(path):
    tree = ast.parse(path.read_text())
    roots = {name.split(".")[0] for name in imports(tree)}
    local = set(LOCAL)
    if path.stem in KERNELS:
        local.add("triton")
    if path in TOOLS:
        local |= {tool.stem for tool in TOOLS} | {"release", "training", "odd_files"}
    assert roots <= sys.stdlib_module_names | RUN_TIME | OPTIONAL | local
    body = ast.Module(
        [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
    )
    at_once = {name.split(".")[0] for name in imports(body)}
    assert not OPTIONAL & at_once, "optional: import it where it is asked for"
    for name in KERNELS:
        assert f"wan5b.extras.{name}" not in imports(body), "import it where there is a GPU"


@everywhere
def test_torch_distributed_is_in_three_files(path):
    tree = ast.parse(path.read_text())
    used = {name for name in imports(tree) if name.startswith("torch.distributed")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "distributed":
            used.add("torch.distributed")
    assert not used or path.name in DISTRIBUTED, f"{path.name} uses {used}"


@pytest.mark.parametrize("path", [*CORE, *EXTRAS], ids=named)
def test_file_length(path):
    length = len(path.read_text().splitlines())
    assert length <= FILE_LINES, f"{path.name} has {length} lines"


def test_core_size():
    sizes = {path.name: code_lines(path.read_text()) for path in CORE}
    assert {"flow.py", "kvcache.py", "dit.py", "distill.py"} <= sizes.keys()
    assert sum(sizes.values()) <= LINES, sizes


def test_the_readme_names_every_file():
    """The order of reading names all files of wan5b and extras, and none that is gone."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Order of reading")[2].partition("\n## ")[0]
    found = set(re.findall(r"`(?:wan5b/)?(?:extras/)?(\w+\.py)`", section))
    files = {path.name for path in [*INSIDE, *EXTRAS]} - {"__init__.py"}
    scripts = {path.name for path in [*SCRIPTS, *TOOLS]}
    assert not files - found, "name them in the README"
    assert not found - files - scripts, "they are gone"

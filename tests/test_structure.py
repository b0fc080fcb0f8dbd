"""The rules of the house that a machine can check: who imports whom, what is not imported, how long the core is."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "wan5b").glob("*.py"))
SCRIPTS = [
    path for name in ("train.py", "sample.py", "prepare.py") if (path := ROOT / name).exists()
]
CORE = [*PACKAGE, *SCRIPTS]
ORDER = [  # a module imports only from groups above its own
    {"fuse", "fp8"},
    {"flow", "attention", "kvcache", "vae22", "t5", "fsdp", "media"},
    {"dit", "optim"},
    {"distill", "weights"},
    {"data"},
    {"stages"},
]
# PIL and av come with imageio
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
STANDARD = sys.stdlib_module_names

core = pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)


def imports(node: ast.AST) -> set[str]:
    """Dotted names of all modules that are imported anywhere below the node; `from a import b` gives a and a.b."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            names |= {child.module, *(f"{child.module}.{alias.name}" for alias in child.names)}
    return names


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    docstrings, layout = (
        set(),
        {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT},
    )
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    rows = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            rows |= set(range(token.start[0], token.end[0] + 1))
    return len(rows - docstrings)


def test_counting():
    text = '"""Doc.\n\nMore."""\n\nimport os  # why\n\n# comment\ndef f(a):\n    "doc"\n    return """x\ny"""\n'
    assert code_lines(text) == 4
    assert imports(ast.parse("def f():\n    import a.b\n    from c import d")) == {
        "a.b",
        "c",
        "c.d",
    }


@core
def test_import_order(path):
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    inside = path in PACKAGE and path.stem != "__init__"
    assert not inside or path.stem in rank, (
        f"{path.name} has no place in the order: give it one in ORDER"
    )
    found = {
        name.split(".")[1]
        for name in imports(ast.parse(path.read_text()))
        if name.startswith("wan5b.")
    }
    assert found <= rank.keys(), f"unknown modules {found - rank.keys()}"
    if path in PACKAGE:
        wrong = {name for name in found if rank[name] >= rank.get(path.stem, 0)}
        assert not wrong, f"{path.name} imports {wrong}, which do not come before it"


@core
def test_packages(path):
    tree = ast.parse(path.read_text())
    roots = {name.split(".")[0] for name in imports(tree)}
    local = (
        {"wan5b"} if path in PACKAGE else {"wan5b", "plot", *(script.stem for script in SCRIPTS)}
    )  # no script in wan5b
    assert roots <= STANDARD | RUN_TIME | OPTIONAL | local
    body = ast.Module(
        [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
    )
    assert not OPTIONAL & {name.split(".")[0] for name in imports(body)}, (
        "optional: import it where it is asked for"
    )


@core
def test_torch_distributed_is_in_fsdp_and_optim_only(path):
    tree = ast.parse(path.read_text())
    used = {name for name in imports(tree) if name.startswith("torch.distributed")}
    used |= {
        f"torch.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and n.attr == "distributed"
    }
    assert not used or path.name in ("fsdp.py", "optim.py"), f"{path.name} uses {used}"


@core
def test_file_length(path):
    length = len(path.read_text().splitlines())
    assert length <= 450, f"{path.name} has {length} lines"


def test_core_size():
    sizes = {path.name: code_lines(path.read_text()) for path in CORE}
    assert {"flow.py", "kvcache.py", "dit.py", "distill.py"} <= sizes.keys()
    assert sum(sizes.values()) <= 2400, sizes

"""What the compiler is told of kernels, which only a GPU's are made by."""

from types import SimpleNamespace

import pytest
import torch
from common import compiling, rel
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V
from torch.fx import Graph

from wan5b import fuse
from wan5b.extras import compiler


@pytest.fixture(autouse=True)
def graph():
    """Kernels' sizes are compared by a graph's."""
    sizes = SimpleNamespace(statically_known_leq=lambda a, b: a <= b)
    with V.set_graph_handler(SimpleNamespace(sizevars=sizes)):
        yield
    V.set_choices_handler(InductorChoices())


def features(length=3072, hint=ReductionHint.INNER, done=torch.ops.aten.mul.Tensor):
    """Of a kernel that reduces rows of a length, and does something to them besides."""
    origin = Graph().call_function(done)
    node = SimpleNamespace(node=SimpleNamespace(get_origins=lambda: [origin]))
    return SimpleNamespace(
        reduction_numel=length,
        get_reduction_hint=lambda: hint,
        scheduler_nodes=lambda: (node,),
    )


@pytest.mark.parametrize(
    ("kernel", "held", "by_itself"),
    [
        ({"length": 1024}, True, True),
        ({}, True, False),
        ({"length": 4096}, True, False),
        ({"length": 4097}, False, False),
        ({"hint": ReductionHint.OUTER_TINY}, False, False),
        ({"done": torch.ops.prims.rev.default}, False, False),
        ({"done": torch.ops.prims.rev.default, "length": 1024}, True, True),
    ],
    ids=str,
)
def test_which_kernels_hold_their_rows(kernel, held, by_itself):
    default = V.choices.should_use_persistent_reduction
    assert default(features(**kernel), False) == by_itself
    compiler.read_rows_once()
    assert V.choices.should_use_persistent_reduction(features(**kernel), False) == held


def test_rope_is_known_by_what_it_compiles_to():
    """It flips pairs of channels, which is a `rev` when kernels are made."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    from wan5b.attention import rope_table, rotate

    rope = rope_table(8, 0, 1, 1, 2, torch.device("cpu"))
    made = make_fx(rotate, decomposition_table=select_decomp_table())(torch.randn(1, 2, 3, 8), rope)
    assert torch.ops.prims.rev.default in {node.target for node in made.graph.nodes}


def test_pieces_are_compiled_by_it():
    @fuse.fused
    def norm(x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:])

    x = torch.randn(4, 3072)
    expected = norm(x)
    V.set_choices_handler(InductorChoices())
    with compiling():
        compiler.enable()
        assert type(V.choices) is not InductorChoices
        assert rel(norm(x), expected) < 1e-6
        compiler.enable(False)
        assert norm(x).equal(expected)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightlab.optim import is_matrix_name, split_named_parameters


class TinyGPT(nn.Module):
    def __init__(self, tied=False, head=True):
        super().__init__()
        self.wte = nn.Embedding(11, 4)
        self.pos = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4))
        if head:
            self.readout = nn.Linear(4, 11, bias=False)
            if tied:
                self.readout.weight = self.wte.weight


def names(pairs):
    return [name for name, _ in pairs]


def test_module_keeps_embeddings_and_the_last_linear_out():
    matrices, rest = split_named_parameters(TinyGPT())
    assert names(matrices) == ["block.1.weight", "block.2.weight"]
    assert {"wte.weight", "pos.weight", "readout.weight"} <= set(names(rest))


def test_tied_head_is_the_head_so_that_no_other_layer_is():
    matrices, rest = split_named_parameters(TinyGPT(tied=True))
    assert names(matrices) == ["block.1.weight", "block.2.weight"]
    assert "readout.weight" not in names(rest)  # the same parameter as wte.weight


def test_named_head_that_is_not_last():
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 9), "body": nn.Linear(4, 4)})
    assert names(split_named_parameters(model)[0]) == ["body.weight"]


def test_mlp_in_an_embedding_is_no_head():
    model = nn.ModuleDict({"time_embed": nn.Linear(4, 4), "body": nn.Linear(4, 4), "last": nn.Linear(4, 2)})
    matrices, rest = split_named_parameters(model)
    assert names(matrices) == ["body.weight"]
    assert "last.weight" in names(rest)


def test_convolutions_are_matrices():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert names(split_named_parameters(model)[0]) == ["0.weight"]


def test_names_alone():
    pairs = [
        (name, nn.Parameter(torch.zeros(2, 2)))
        for name in (
            "model.embed_tokens.weight",
            "transformer.wpe.weight",
            "lm_head.weight",
            "output.weight",
            "encoder.layer.0.output.dense.weight",
            "layers.0.attention.wq.weight",
            "cls_token",
            "layers.0.relative_bias",
            "layers.0.bias",
        )
    ]
    matrices, rest = split_named_parameters(pairs)
    assert names(matrices) == [
        "encoder.layer.0.output.dense.weight",
        "layers.0.attention.wq.weight",
        "layers.0.relative_bias",
    ]
    assert names(rest) == [n for n in names(pairs) if n not in names(matrices)]


def test_predicate_overrides_everything_else():
    def choose(name, parameter):
        return {"readout.weight": True, "block.1.weight": False}.get(name)

    matrices, rest = split_named_parameters(TinyGPT(), is_matrix=choose)
    assert names(matrices) == ["block.2.weight", "readout.weight"]
    assert "block.1.weight" in names(rest)


def test_module_without_linears():
    matrices, rest = split_named_parameters(nn.LayerNorm(3))
    assert matrices == []
    assert names(rest) == ["weight", "bias"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True), st.integers(0, 4))
    )
)
def test_every_parameter_lands_in_one_list_in_order(entries):
    pairs = [(name, nn.Parameter(torch.zeros([1] * ndim))) for name, ndim in entries]
    matrices, rest = split_named_parameters(pairs)
    order = {id(p): i for i, (_, p) in enumerate(pairs)}
    for part in (matrices, rest):
        positions = [order[id(p)] for _, p in part]
        assert positions == sorted(positions)
    assert len(matrices) + len(rest) == len(pairs)
    assert all(p.ndim >= 2 and is_matrix_name(name) for name, p in matrices)


def test_parameters_without_names_are_refused():
    with pytest.raises(TypeError, match="named_parameters"):
        split_named_parameters(nn.Linear(2, 2).parameters())

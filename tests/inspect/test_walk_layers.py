import json

import pytest
import torch
from safetensors.torch import save_file

from weightlab.exceptions import UsageError
from weightlab.inspect import Checkpoint, esd, walk_layers


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kinds_by_shape():
    checkpoint = Checkpoint(
        {
            "norm": torch.ones(4),
            "steps": torch.ones(2, 2, dtype=torch.int64),
            "none": torch.ones(0, 3),
            "dense": gaussian(4, 3),
            "conv1d": gaussian(4, 3, 5),
            "conv2d": gaussian(4, 3, 2, 2),
            "experts": gaussian(2, 5, 40),
            "odd": gaussian(2, 2, 2, 40),
        }
    )
    found = list(walk_layers(checkpoint))
    assert [(layer.name, layer.kind, layer.shape) for layer in found] == [
        ("dense", "matrix", (4, 3)),
        ("conv1d", "conv", (4, 3, 5)),
        ("conv2d", "conv", (4, 3, 2, 2)),
        ("experts[0]", "matrix", (5, 40)),
        ("experts[1]", "matrix", (5, 40)),
    ]
    for layer in found:
        assert layer.load().shape == layer.shape
    assert torch.equal(found[4].load(), checkpoint["experts"][1])


@pytest.mark.parametrize(
    ("name", "shape"), [("h.0.attn.c_attn.weight", (4, 12)), ("in_proj_weight", (12, 4))]
)
def test_fused_projections_are_split_on_demand(name, shape):
    W = gaussian(*shape)
    checkpoint = Checkpoint({name: W, "c_proj.weight": gaussian(4, 12)})
    assert [layer.name for layer in walk_layers(checkpoint)] == [name, "c_proj.weight"]
    q, k, v, other = walk_layers(checkpoint, split_qkv=True)
    assert [q.name, k.name, v.name, other.name] == [f"{name}[q]", f"{name}[k]", f"{name}[v]", "c_proj.weight"]
    assert torch.equal(torch.cat([part.load() for part in (q, k, v)], dim=shape.index(12)), W)
    assert q.shape == tuple(q.load().shape) == (4, 4)


def write(folder, name, W, config):
    save_file({name: W}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return [layer.load() for layer in walk_layers(Checkpoint(folder), split_qkv=True)]


ATTENTION = {"num_attention_heads": 4, "hidden_size": 12, "n_head": 4, "n_embd": 12}


def by_group(W, groups, heads):
    """q, k, v of weights that take turns: `heads` of queries, one of keys, one of values in a group; heads are 3 wide."""
    turns = W.reshape(groups, heads + 2, 3, W.shape[1])
    return [part.reshape(-1, W.shape[1]) for part in (turns[:, :-2], turns[:, -2], turns[:, -1])]


@pytest.mark.parametrize(
    ("facts", "groups", "heads"),
    [
        ({"model_type": "gpt_neox"}, 4, 1),
        ({"model_type": "bloom"}, 4, 1),
        ({"model_type": "falcon", "multi_query": False}, 4, 1),
        ({"model_type": "falcon", "multi_query": True}, 1, 4),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}, 2, 2),
        ({"model_type": "gpt_bigcode", "multi_query": False}, 4, 1),
    ],
)
def test_parts_that_take_turns_are_told_by_the_config(tmp_path, facts, groups, heads):
    W = gaussian(groups * (heads + 2) * 3, 12)
    parts = write(tmp_path, "h.0.query_key_value.weight", W, {**ATTENTION, **facts})
    for part, expected in zip(parts, by_group(W, groups, heads), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("qkv_proj", {"model_type": "phi3", "num_key_value_heads": 2}),
        ("Wqkv", {"model_type": "dbrx", "attn_config": {"kv_n_heads": 2}}),
    ],
)
def test_fewer_heads_of_keys_are_told_by_the_config(tmp_path, name, facts):
    W = gaussian(24, 12)
    parts = write(tmp_path, f"h.0.{name}.weight", W, {**ATTENTION, **facts})
    assert [len(part) for part in parts] == [12, 6, 6]
    assert torch.equal(torch.cat(parts), W)


def test_layouts_that_are_not_known_are_left_whole(tmp_path):
    W = gaussian(36, 12)
    for name, facts in (
        ("query_key_value", {}),
        ("qkv_proj", {"model_type": "codegen", **ATTENTION}),
        ("query_key_value", {"model_type": "gpt_neox", "num_attention_heads": 5, "hidden_size": 12}),
    ):
        (whole,) = write(tmp_path, f"{name}.weight", W, facts)
        assert torch.equal(whole, W)


def test_selection():
    checkpoint = Checkpoint({"a.x": gaussian(3, 3), "b.x": gaussian(3, 3), "b.y": gaussian(3, 3)})
    assert [layer.name for layer in walk_layers(checkpoint, layers=["b.*", "a.x"])] == ["a.x", "b.x", "b.y"]
    with pytest.raises(UsageError, match=r"no layer of dict matches c\.\*, d; names are like a\.x"):
        list(walk_layers(checkpoint, layers=["c.*", "d"]))


def adapter(folder, tensors, **config):
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, **config}))
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"q": 6}}, 3.0),
        ({"alpha_pattern": {"k": 6}}, 4.0),
    ],
)
def test_a_lora_is_the_change_it_makes(tmp_path, config, scaling):
    A, B = gaussian(2, 7), gaussian(5, 2, seed=1)
    checkpoint = adapter(tmp_path, {"layer.0.q.lora_A.weight": A, "layer.0.q.lora_B.weight": B}, **config)
    (layer,) = walk_layers(checkpoint)
    assert (layer.name, layer.kind, layer.shape) == ("layer.0.q", "delta", (5, 7))
    expected = torch.linalg.svdvals(scaling * B.double() @ A.double())[:2].square().flip(0)
    torch.testing.assert_close(esd(layer.load()), expected, rtol=1e-9, atol=1e-9)


def test_adapters_that_are_none(tmp_path):
    A, B = gaussian(2, 7), gaussian(5, 2)
    with pytest.raises(UsageError, match="only one of its factors"):
        list(walk_layers(adapter(tmp_path, {"q.lora_A.weight": A})))
    with pytest.raises(UsageError, match="do not fit"):
        list(walk_layers(adapter(tmp_path, {"q.lora_A.weight": A, "q.lora_B.weight": B.mT.contiguous()})))
    with pytest.raises(UsageError, match="of type BONE, not a LoRA"):
        list(walk_layers(adapter(tmp_path, {"q.bone": A}, peft_type="BONE")))
    with pytest.raises(UsageError, match="trained with DoRA"):
        list(walk_layers(adapter(tmp_path, {"q.lora_A.weight": A, "q.lora_B.weight": B}, use_dora=True)))
    with pytest.raises(UsageError, match="holds no LoRA"):
        list(walk_layers(adapter(tmp_path, {"q.other": A})))
    with pytest.raises(UsageError, match="no lora_alpha"):
        list(walk_layers(adapter(tmp_path, {"q.lora_A.weight": A, "q.lora_B.weight": B}, lora_alpha=None)))

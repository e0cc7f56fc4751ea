import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightlab.tasks.models import MLP, ResNet, seeded_by
from weightlab.tasks.models.resnet import BasicBlock


def test_mlp_is_affine_maps_with_relu_between():
    model = MLP([6, 5, 4, 3]).double()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = (p.detach() for p in model.parameters())
    inner = torch.relu(torch.relu(x.reshape(7, 6) @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(model(x), inner @ w3.T + b3)


def test_mlp_without_hidden_layers_is_linear():
    assert [name for name, _ in MLP([4, 2]).named_parameters()] == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"sizes must name at least input and output, not \[4\]"):
        MLP([4])


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_resnets_have_the_papers_number_of_layers_and_weights(depth, parameters):
    with torch.device("meta"):
        model = ResNet(depth)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be 6 n \\+ 2 .*, not {depth}"):
        ResNet(depth)


def test_shortcut_is_option_a():
    block = BasicBlock(2, 6, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 2:4], x[:, :, ::2, ::2])
    assert (out[:, [0, 1, 4, 5]] == 0).all()


def test_resnet_keys_are_those_of_the_checkpoints():
    keys = set(ResNet(20).state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer2.0.conv1.weight", "layer3.2.bn2.bias"} <= keys
    assert {"linear.weight", "linear.bias"} <= keys
    assert len({key for key in keys if "num_batches" not in key}) == 97


def test_resnet_stages_halve_the_image_and_double_the_channels():
    model = ResNet(8).eval()
    x = F.relu(model.bn1(model.conv1(torch.rand(2, 3, 32, 32))))
    assert model.layer1(x).shape == (2, 16, 32, 32)
    assert model.layer2(model.layer1(x)).shape == (2, 32, 16, 16)
    assert model.layer3(model.layer2(model.layer1(x))).shape == (2, 64, 8, 8)


def test_seeded_by_depends_on_the_generator_and_leaves_the_global_one():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(0)
    with seeded_by(generator):
        first = MLP([4, 2])
    with seeded_by(generator):
        second = MLP([4, 2])
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(first.head.weight, second.head.weight)
    with seeded_by(torch.Generator().manual_seed(0)):
        assert torch.equal(MLP([4, 2]).head.weight, first.head.weight)

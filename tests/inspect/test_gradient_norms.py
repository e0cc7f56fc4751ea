import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from weightlab.inspect import grad_norm_methods, grad_norms
from weightlab.inspect._ghost_norms import Window, _conv_square_by_pixels, kernel_gradients
from weightlab.inspect._ghost_rules import Batch, Use, read
from weightlab.tasks.models.gpt import GPT, GPTConfig


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gaussian(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def squares(outputs, targets):
    """A loss of any outputs: the squares of their differences to targets that broadcast."""
    return (outputs - targets).square().flatten(1).sum(1)


def language_loss(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def looped(model, inputs, targets, loss_fn, wanted=None):
    """Reference: backward for each example alone."""
    norms = []
    for i in range(len(targets)):
        arguments = [x[i : i + 1] for x in (inputs if isinstance(inputs, tuple) else (inputs,))]
        loss = loss_fn(model(*arguments), targets[i : i + 1]).sum()
        parameters = [p for n, p in model.named_parameters() if wanted is None or n in wanted]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
    return torch.stack(norms)


def check(model, inputs, targets=None, loss_fn=squares, method="ghost", rtol=1e-12):
    """Norms equal the loop's, and every parameter is computed by `method`."""
    model.double().eval()
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    if targets is None:
        targets = gaussian(
            len(first), *[1] * (model(*(inputs if isinstance(inputs, tuple) else [inputs])).ndim - 1)
        )
    expected = looped(model, inputs, targets, loss_fn)
    assert (expected > 0).all()
    found = grad_norms(model, inputs, targets, loss_fn)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    methods = grad_norm_methods(model, inputs, targets, loss_fn)
    assert list(methods) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(methods.values()) == {method}


class Calls(nn.Module):
    """A module whose forward is a function of it and the inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.call = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.call(self, *inputs)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [(), (4,), (2, 3)])
def test_linear(batch, bias, positions):
    model = nn.Sequential(nn.Linear(3, 6, bias=bias), nn.ReLU(inplace=True), nn.Linear(6, 2, bias=bias))
    check(model, gaussian(batch, *positions, 3))


def test_linear_by_both_ways_and_in_pieces(monkeypatch):
    monkeypatch.setattr("weightlab.inspect.gradient_norms._BUFFER", 1)
    for positions, width in ((2, 9), (30, 3)):
        check(nn.Linear(width, 8), gaussian(4, positions, width))


def test_linear_on_transposed_input():
    model = Calls(lambda self, x: self.linear(x.transpose(0, 1)).transpose(0, 1), linear=nn.Linear(3, 4))
    for batch in (2, 3, 5):
        check(model, gaussian(batch, 5, 3), method="ghost" if batch > 2 else "vmap")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_convolution_of_any_geometry(data):
    torch.manual_seed(0)
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dims, groups = draw(1, 3), draw(1, 2)
    kernel, stride, dilation = ([draw(1, 3) for _ in range(dims)] for _ in range(3))
    padding = data.draw(st.sampled_from([[draw(0, 2) for _ in range(dims)], "same", "valid"]))
    if padding == "same":
        stride = [1] * dims
    mode = data.draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    options = {"dilation": dilation, "groups": groups, "padding_mode": mode, "bias": data.draw(st.booleans())}
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    channels = groups * draw(1, 3), groups * draw(1, 3)
    model = layer(
        *channels,
        tuple(kernel),
        tuple(stride),
        padding if isinstance(padding, str) else tuple(padding),
        **options,
    )
    space = [max(dilation[d] * (kernel[d] - 1) + 1, draw(4, 7)) for d in range(dims)]
    check(model, gaussian(3, channels[0], *space))


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_transposed_convolution_of_any_geometry(data):
    torch.manual_seed(0)
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dims, groups = draw(1, 3), draw(1, 2)
    kernel, stride, dilation = ([draw(1, 3) for _ in range(dims)] for _ in range(3))
    padding = [draw(0, 2) for _ in range(dims)]
    out = [draw(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    model = layer(2 * groups, 3 * groups, kernel, stride, padding, out, groups, True, dilation)
    inside = all(o < s for o, s in zip(out, stride, strict=True))
    x = gaussian(3, 2 * groups, *[draw(5, 6)] * dims)
    if inside:
        check(model, x)
    else:
        model.double()
        torch.testing.assert_close(
            grad_norms(model, x, gaussian(3, *[1] * (dims + 1)).zero_(), squares),
            looped(model, x, torch.zeros(3, *[1] * (dims + 1)), squares),
            rtol=1e-12,
            atol=0,
        )


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_pixels_give_what_kernel_gradients_give(data):
    torch.manual_seed(0)
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dims, groups = draw(1, 3), draw(1, 2)
    window = Window(*(tuple(draw(low, 3) for _ in range(dims)) for low in (1, 1, 0, 1)))
    space = [k + (k - 1) * (d - 1) + draw(0, 4) for k, d in zip(window.kernel, window.dilation, strict=True)]
    x = gaussian(2, 3 * groups, *space)
    weight = gaussian(2 * groups, 3, *window.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    g = torch.randn_like(convolve(x, weight, None, window.stride, window.padding, window.dilation, groups))
    expected = kernel_gradients(x[:, None], g[:, None], window, groups).flatten(1).square().sum(1)
    torch.testing.assert_close(_conv_square_by_pixels(x, g, window, groups), expected, rtol=1e-12, atol=0)


def test_wide_convolution_on_few_pixels(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "weightlab.inspect._ghost_norms._conv_square_by_pixels",
        lambda *arguments: calls.append(1) or _conv_square_by_pixels(*arguments),
    )
    monkeypatch.setattr("weightlab.inspect.gradient_norms._BUFFER", 5000)
    for size in (4, 14):
        check(nn.Conv2d(32, 32, 3, padding=1), gaussian(3, 32, size, size))
        assert bool(calls) == (size == 4)
        calls.clear()


def test_convolution_on_several_inputs_an_example():
    model = Calls(
        lambda self, x: self.conv(x.flatten(0, 1)).unflatten(0, (len(x), -1)), conv=nn.Conv1d(2, 3, 2)
    )
    check(model, gaussian(4, 5, 2, 6))


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding_with_repeated_indices(padding_idx):
    model = nn.Embedding(4, 3, padding_idx=padding_idx)
    indices = torch.tensor([[0, 1, 1, 3, 1], [2, 2, 2, 2, 2], [0, 3, 3, 0, 1]])
    check(model, indices)


def test_embedding_scaled_by_frequency_is_left_to_another_way():
    model = nn.Embedding(4, 3, scale_grad_by_freq=True)
    indices = torch.tensor([[0, 1, 1, 3, 1], [2, 2, 2, 2, 2], [0, 3, 3, 0, 1]])
    model.double()
    targets = gaussian(3, 1, 1)
    torch.testing.assert_close(
        grad_norms(model, indices, targets, squares), looped(model, indices, targets, squares)
    )
    assert grad_norm_methods(model, indices, targets, squares)["weight"] != "ghost"


NORMS = {
    "layer": nn.LayerNorm(6),
    "layer of two dimensions": nn.LayerNorm((4, 6)),
    "layer without bias": nn.LayerNorm(6, bias=False),
    "rms": nn.RMSNorm(6),
    "group": nn.GroupNorm(2, 4),
    "instance": nn.InstanceNorm1d(4, affine=True),
    "instance with statistics": nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "batch": nn.BatchNorm1d(4),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_norms(name, batch):
    norm = NORMS[name]
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    check(nn.Sequential(norm, nn.Tanh()), gaussian(batch, 4, 6))


class Accelerated:
    """What a node of an accelerator would be, from one of the CPU."""

    def __init__(self, node, name, **saved):
        self.node, self.name = node, lambda: name
        self._input_metadata = node._input_metadata
        for key, value in saved.items():
            setattr(self, f"_saved_{key}", value)


def test_nodes_that_only_accelerators_have():
    x, g = gaussian(3, 4, 6), gaussian(3, 4, 6)
    batch = Batch(3, 0)
    norm = nn.BatchNorm1d(4).double().eval()
    nn.init.uniform_(norm.running_mean)
    nodes = [norm(part).grad_fn for part in (x, x[:1])]
    names = ("input", "running_mean", "running_var", "training")
    stand_ins = [
        Accelerated(
            node,
            "CudnnBatchNormBackward0",
            epsilon=node._saved_eps,
            **{name: getattr(node, f"_saved_{name}") for name in names},
        )
        for node in nodes
    ]
    found = [read(Use(*pair, 1, norm.weight.shape, batch))(g) for pair in (nodes, stand_ins)]
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=0, atol=0)

    norm = nn.RMSNorm(6).double()
    scale = (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
    nodes = [norm(part).grad_fn for part in (x, x[:1])]
    stand_ins = [
        Accelerated(node, "FusedRmsNormBackward0", input=x[:n], result1=scale[:n])
        for node, n in zip(nodes, (3, 1), strict=True)
    ]
    found = [read(Use(*pair, 1, norm.weight.shape, batch))(g) for pair in (nodes, stand_ins)]
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=1e-12, atol=0)


def test_batch_norm_of_vectors():
    check(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Tanh()), gaussian(5, 4))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [4, 6, 1])
def test_transformer(tied, batch):
    """Also with as many examples as positions, and a head tied to the embedding."""
    model = GPT(GPTConfig(11, context=6, width=8, depth=2, heads=2, tied=tied))
    tokens = torch.randint(11, (batch, 7))
    check(model, tokens[:, :-1], tokens[:, 1:], language_loss)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_modules(batch_first):
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=batch_first)

    def forward(self, x, memory):
        if batch_first:
            return self.layer(x, memory)
        return self.layer(x.transpose(0, 1), memory.transpose(0, 1)).transpose(0, 1)

    check(Calls(forward, layer=layer), (gaussian(4, 5, 8), gaussian(4, 3, 8)))


def test_vision_transformer_with_raw_parameters():
    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = (
            torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
            + self.positions[:, : 1 + patches.shape[1]]
        )
        tokens = tokens + self.scale * torch.tanh(self.inner(tokens))
        return self.head(tokens[:, 0] + tokens.mean(1))

    model = Calls(
        forward,
        patches=nn.Conv2d(3, 6, 2, 2),
        token=parameter(1, 1, 6),
        positions=parameter(1, 12, 6),
        scale=parameter(6),
        inner=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )
    check(model, gaussian(4, 3, 6, 6))


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_modules(layer):
    model = Calls(
        lambda self, x: self.rnn(x)[0][:, -1], rnn=layer(3, 4, 2, batch_first=True, bidirectional=True)
    )
    check(model, gaussian(4, 5, 3))


def test_module_called_several_times():
    def forward(self, x):
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        x = torch.relu(self.linear(self.norm(x)))
        return self.norm(self.linear(x))

    model = Calls(forward, conv=nn.Conv2d(2, 2, 3, padding=1), linear=nn.Linear(5, 5), norm=nn.LayerNorm(5))
    check(model, gaussian(4, 2, 4, 5))


def test_kernel_used_with_two_strides():
    def forward(self, x):
        return F.conv1d(F.conv1d(x, self.kernel, stride=2), self.kernel)

    check(Calls(forward, kernel=parameter(2, 2, 3)), gaussian(4, 2, 9), method="vmap")


def test_stack_of_matrices_used_twice():
    def forward(self, x):
        turned = torch.tanh(torch.einsum("bi,hoi->bho", x, self.stack)).sum(1)
        return torch.einsum("bi,hio->bho", turned, self.stack)

    check(Calls(forward, stack=parameter(3, 3, 3)), gaussian(4, 3), method="vmap")


def test_embedding_called_twice_and_tied_to_a_transposed_product():
    def forward(self, a, b):
        h = torch.tanh(self.embed(a).sum(1) * self.embed(b).sum(1))
        return (
            torch.tanh(h @ self.embed.weight.mT) @ self.embed.weight
            + F.linear(h, self.embed.weight[:3])[:, :1]
        )

    model = Calls(forward, embed=nn.Embedding(7, 4))
    check(model, (torch.randint(7, (4, 5)), torch.randint(7, (4, 3))), method="vmap")

    def without_slice(self, a, b):
        h = torch.tanh(self.embed(a).sum(1) * self.embed(b).sum(1))
        return torch.tanh(h @ self.embed.weight.mT) @ self.embed.weight

    check(
        Calls(without_slice, embed=nn.Embedding(7, 4)), (torch.randint(7, (4, 5)), torch.randint(7, (4, 3)))
    )


def test_parameters_used_outside_their_module():
    def forward(self, x):
        h = torch.addmm(self.linear.bias, x, self.linear.weight.T, beta=0.5, alpha=2.0)
        h = torch.sub(h, self.linear.bias, alpha=3) * self.scale
        return torch.einsum("bi,hio->bho", torch.tanh(h), self.heads) + (self.columns @ h.T).T[:, None]

    model = Calls(
        forward, linear=nn.Linear(3, 4), scale=parameter(1), heads=parameter(2, 4, 5), columns=parameter(5, 4)
    )
    check(model, gaussian(5, 3))


def test_pieces_of_a_parameter():
    def forward(self, x):
        first, second = self.weight.chunk(2)
        return F.linear(torch.tanh(F.linear(x, first)), second) + F.linear(x, first)

    check(Calls(forward, weight=parameter(6, 3)), gaussian(4, 3))

    def overlapping(self, x):
        return F.linear(F.linear(x, self.weight.chunk(2)[0]), self.weight.split(2)[0][:, :3])

    check(Calls(overlapping, weight=parameter(6, 3)), gaussian(4, 3), method="vmap")


def test_adapters_added_to_a_weight():
    model = Calls(
        lambda self, x: F.linear(x, self.linear.weight + self.up @ self.down, self.linear.bias),
        linear=nn.Linear(3, 4),
        up=parameter(4, 1),
        down=parameter(1, 3),
    )
    model.double()
    x, y = gaussian(5, 3), gaussian(5, 1)
    torch.testing.assert_close(
        grad_norms(model, x, y, squares), looped(model, x, y, squares), rtol=1e-12, atol=0
    )
    assert grad_norm_methods(model, x, y, squares) == {
        "up": "vmap",
        "down": "vmap",
        "linear.weight": "vmap",
        "linear.bias": "ghost",
    }


def test_parametrized_weights():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.PReLU(4), nn.Bilinear(4, 4, 2))
    model[2] = Calls(lambda self, x: self.layer(x, x), layer=model[2])
    model.double()
    x, y = gaussian(5, 3), gaussian(5, 1)
    torch.testing.assert_close(
        grad_norms(model, x, y, squares), looped(model, x, y, squares), rtol=1e-12, atol=0
    )
    methods = grad_norm_methods(model, x, y, squares)
    assert methods.pop("0.bias") == methods.pop("2.layer.bias") == "ghost"
    assert set(methods.values()) == {"vmap"}
    with pytest.raises(
        ValueError,
        match=r"no closed form for (0\.parametrizations.*|1\.weight|2\.layer\.weight), which is used",
    ):
        grad_norms(model, x, y, squares, method="ghost")


def test_layers_on_positions_only():
    """Of what is the same for all examples, the last layer has a closed form."""

    def forward(self, x):
        places = torch.arange(x.shape[1])
        return torch.tanh(x + self.project(self.embed(places)) + self.scale(self.embed(places)[None]))

    model = Calls(forward, embed=nn.Embedding(9, 4), project=nn.Linear(4, 4), scale=nn.LayerNorm(4)).double()
    x, y = gaussian(5, 5, 4), gaussian(5, 1, 1)
    torch.testing.assert_close(
        grad_norms(model, x, y, squares), looped(model, x, y, squares), rtol=1e-12, atol=0
    )
    methods = grad_norm_methods(model, x, y, squares)
    assert methods.pop("embed.weight") == "vmap"
    assert set(methods.values()) == {"ghost"}


def test_output_without_examples():
    model = Calls(lambda self, x: (x * 1.0, self.scale * 2), scale=parameter(3))
    x, y = gaussian(4, 3), gaussian(4, 3)

    def loss(outputs, targets):
        return squares(outputs[0] * outputs[1], targets)

    assert grad_norm_methods(model, x, y, loss) == {"scale": "vmap"}
    torch.testing.assert_close(grad_norms(model, x, y, loss), looped(model, x, y, loss), rtol=1e-12, atol=0)


@pytest.mark.parametrize("captured", [False, True])
def test_loss_that_uses_parameters(captured):
    model = nn.Linear(3, 2).double()
    x, y, weight = gaussian(4, 3), gaussian(4, 1), model.weight

    def loss(outputs, targets):
        return squares(outputs, targets) + (weight if captured else model.weight).square().sum()

    # What a function has captured cannot be replaced.
    expected = {"weight": "loop" if captured else "vmap", "bias": "ghost"}
    assert grad_norm_methods(model, x, y, loss) == expected
    torch.testing.assert_close(grad_norms(model, x, y, loss), looped(model, x, y, loss), rtol=1e-12, atol=0)


def test_examples_that_change_places_inside():
    model = Calls(lambda self, x: self.linear(x.flip(0)).flip(0), linear=nn.Linear(3, 2))
    check(model, gaussian(4, 3), method="vmap")


def test_model_that_cannot_be_vectorised():
    def forward(self, x):
        return self.linear(x) if float(x.sum()) > -1e9 else x

    model = Calls(forward, linear=parametrizations.weight_norm(nn.Linear(3, 2), dim=None)).double()
    x, y = gaussian(4, 3), gaussian(4, 1)
    torch.testing.assert_close(
        grad_norms(model, x, y, squares), looped(model, x, y, squares), rtol=1e-12, atol=0
    )
    assert grad_norm_methods(model, x, y, squares)["linear.parametrizations.weight.original0"] == "loop"
    with pytest.raises(RuntimeError):
        grad_norms(model, x, y, squares, method="vmap")


def test_checkpointed_activations():
    inner = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    model = Calls(lambda self, x: checkpoint(self.inner, x, use_reentrant=False), inner=inner).double()
    x, y = gaussian(4, 3), gaussian(4, 1)
    torch.testing.assert_close(
        grad_norms(model, x, y, squares), looped(model, x, y, squares), rtol=1e-12, atol=0
    )


def test_methods_agree_and_squares():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()
    x, y = gaussian(6, 2, 5, 5), torch.randint(4, (6,))
    norms = grad_norms(model, x, y)
    for method, chunk_size in itertools.product(("ghost", "vmap", "loop"), (None, 4)):
        found = grad_norms(model, x, y, method=method, chunk_size=chunk_size, squared=True)
        torch.testing.assert_close(found, norms.square(), rtol=1e-12, atol=0)
    for method in ("ghost", "vmap", "loop"):
        assert set(grad_norm_methods(model, x, y, method=method).values()) == {method}


def test_reduction_of_the_loss_does_not_matter():
    model = nn.Linear(3, 5).double()
    x, y = gaussian(4, 3), torch.randint(5, (4,))
    expected = looped(model, x, y, F.cross_entropy)
    losses = [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        lambda o, t: F.cross_entropy(o[t >= 0], t[t >= 0]),  # cannot be vectorised
    ]
    for loss in losses:
        torch.testing.assert_close(grad_norms(model, x, y, loss), expected, rtol=1e-12, atol=0)


def test_mean_over_counted_positions_is_that_of_each_example():
    model = nn.Linear(3, 5).double()
    x, y = gaussian(4, 6, 3), torch.randint(5, (4, 6))
    y[1, 2:] = y[3, 1:] = -100

    def loss(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    torch.testing.assert_close(grad_norms(model, x, y, loss), looped(model, x, y, loss), rtol=1e-12, atol=0)


def test_last_layer_is_error_times_features():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x, y = gaussian(6, 3), torch.randint(4, (6,))
    features = model[1](model[0](x))
    error = (model(x).softmax(1) - F.one_hot(y, 4)).norm(dim=1)
    expected = error * (features.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(grad_norms(model, x, y, params="last"), expected.detach(), rtol=1e-12, atol=0)


def test_choice_of_parameters():
    model = GPT(GPTConfig(7, context=4, width=4, depth=1, heads=1, tied=True)).double()
    x, y = torch.randint(7, (3, 4)), torch.randint(7, (3, 4))
    for choice in (
        ["blocks.0.norm1.*", "norm.bias"],
        lambda name, p: name in ("norm.bias", "blocks.0.norm1.weight", "blocks.0.norm1.bias"),
    ):
        expected = looped(
            model, x, y, language_loss, {"norm.bias", "blocks.0.norm1.weight", "blocks.0.norm1.bias"}
        )
        torch.testing.assert_close(
            grad_norms(model, x, y, language_loss, params=choice), expected, rtol=1e-12, atol=0
        )
    assert list(grad_norm_methods(model, x, y, language_loss, params=["head.weight"])) == [
        "token_embedding.weight"
    ]
    model.requires_grad_(False)
    model.blocks.requires_grad_(True)
    assert all(name.startswith("blocks") for name in grad_norm_methods(model, x, y, language_loss))


def test_inputs_as_tuple_and_dict():
    model = Calls(lambda self, a, b: self.linear(a) * b, linear=nn.Linear(3, 2)).double()
    a, b, y = gaussian(4, 3), gaussian(4, 2), gaussian(4, 1)
    expected = looped(model, (a, b), y, squares)
    torch.testing.assert_close(grad_norms(model, (a, b), y, squares), expected)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *, first, second, flag):
            assert flag == "on"
            return {"outputs": self.model(first, second), "nothing": None}

    inputs = {"first": a, "second": b, "flag": "on"}
    for loss in (
        lambda o, t: squares(o["outputs"], t["targets"]),
        lambda o, t: squares(o["outputs"], t["targets"]).mean(),
    ):
        for method in ("ghost", "vmap", "loop"):
            norms = grad_norms(Named(), inputs, {"targets": y}, loss, method=method)
            torch.testing.assert_close(norms, expected)


def test_examples_do_not_see_each_other():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.GroupNorm(3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    x, y = gaussian(8, 2, 6), torch.randint(4, (8,))
    norms = grad_norms(model, x, y)
    order = torch.randperm(8)
    torch.testing.assert_close(grad_norms(model, x[order], y[order]), norms[order], rtol=1e-12, atol=0)
    pieces = [grad_norms(model, x[i : i + 3], y[i : i + 3]) for i in range(0, 8, 3)]
    torch.testing.assert_close(torch.cat(pieces), norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    x, y = gaussian(6, 4, 8), torch.randint(5, (6,))
    exact = grad_norms(model.to(dtype).double(), x.to(dtype).double(), y)
    norms = grad_norms(model.to(dtype), x.to(dtype), y, method="ghost")
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


def test_half_precision_sums_in_single():
    """10⁵ equal squares: in bfloat16 the sum would stop growing at 2⁸."""
    model = nn.Linear(100_000, 1, bias=False).bfloat16()
    nn.init.zeros_(model.weight)
    norms = grad_norms(
        model, torch.ones(3, 100_000, dtype=torch.bfloat16), torch.ones(3, 1), lambda o, t: (o * t).sum(1)
    )
    torch.testing.assert_close(norms, torch.full((3,), 100_000**0.5))


def test_under_autocast_and_in_inference_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x, y = gaussian(6, 8, dtype=torch.float32), torch.randint(4, (6,))
    norms = grad_norms(model, x, y)
    with torch.inference_mode():
        assert torch.equal(grad_norms(model, x.clone(), y), norms)
    with torch.no_grad():
        assert torch.equal(grad_norms(model, x, y), norms)
    with torch.autocast("cpu", torch.bfloat16):
        assert set(grad_norm_methods(model, x, y).values()) == {"ghost"}
        torch.testing.assert_close(grad_norms(model, x, y), norms, rtol=3e-2, atol=0)


def test_non_contiguous_input():
    model = nn.Linear(5, 3).double()
    x, y = gaussian(5, 6).T, torch.randint(3, (6,))
    expected = grad_norms(model, x.contiguous(), y)
    torch.testing.assert_close(grad_norms(model, x, y), expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings(
    "ignore:.*script_method. is deprecated:DeprecationWarning"
)  # importing dynamo does
def test_compiled_model():
    model = nn.Linear(5, 3)
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(grad_norms(compiled, x, y, method="ghost"), grad_norms(model, x, y))


def test_gradients_of_zero_and_of_parts_without_use():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model.unused = nn.Linear(2, 2)
    x = torch.zeros(3, 3)
    norms = grad_norms(model, x, torch.zeros(3, 1), lambda o, t: (o * 0).sum(1))
    assert torch.equal(norms, torch.zeros(3))
    constant = Calls(lambda self, x: x, linear=nn.Linear(3, 3))
    with pytest.raises(ValueError, match="losses do not depend on the parameters"):
        grad_norms(constant, x, torch.zeros(3, 1), squares)


def test_non_finite_numbers_stay_with_their_example():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = gaussian(4, 3, dtype=torch.float32)
    x[2, 1] = float("nan")
    norms = grad_norms(model, x, torch.zeros(4, dtype=torch.long), method="ghost")
    assert norms.isnan().tolist() == [False, False, True, False]


class Largest(TorchDispatchMode):
    """Watches how many entries tensors have."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(200, 300), (16, 125, 200)),
        (nn.Conv2d(48, 64, 3), (16, 48, 14, 14)),
        (nn.Conv2d(64, 128, 3, padding=1), (16, 64, 4, 4)),
    ],
    ids=["direct", "kernel", "pixels"],
)
def test_memory_does_not_hold_the_gradients(model, shape, monkeypatch):
    """No tensor is larger than the activations or the buffer, where one gradient an example would be."""
    buffer = 2**17
    monkeypatch.setattr("weightlab.inspect.gradient_norms._BUFFER", buffer)
    x = torch.randn(shape)
    activations = max(x.numel(), model(x).numel())
    with Largest() as largest:
        grad_norms(model, x, torch.zeros(16, *[1] * (x.ndim - 1)), squares, method="ghost")
    gradients = 16 * model.weight.numel()
    assert largest.entries <= max(activations, buffer) < gradients


def snapshot(model):
    return (
        {name: x.clone() for name, x in model.state_dict().items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("method", ["auto", "ghost", "vmap", "loop"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_stay(method, fails):
    calls = []

    def forward(self, x):
        calls.append(1)
        if fails and len(calls) > 1:
            raise KeyError("broken")
        torch.rand(1)
        return self.rest(x)

    rest = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model = Calls(forward, rest=rest).eval()
    model.rest[0].weight.grad = torch.ones(4, 3)
    model.rest[3].bias.requires_grad_(False)
    x, y = gaussian(4, 3, dtype=torch.float32).requires_grad_(), torch.randint(2, (4,))
    before = snapshot(model)
    try:
        grad_norms(model, x, y, method=method)
    except (KeyError, RuntimeError):
        assert fails or method == "vmap"
    after = snapshot(model)
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old.keys() == new.keys()
        assert all(
            (a is None and b is None) or torch.equal(a, b)
            for a, b in zip(old.values(), new.values(), strict=True)
        )
    assert before[2:5] == after[2:5]
    assert torch.equal(before[5], after[5])
    assert x.grad is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(3)), r"BatchNorm1d '0' mixes the examples of a batch.*model\.eval"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "BatchNorm1d mixes.*no running statistics"),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)), r"Dropout '1' drops at random; call model\.eval"),
        (
            nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
            "InstanceNorm1d would change its running",
        ),
        (nn.LSTM(3, 3, 2, dropout=0.5), "LSTM drops at random"),
        (nn.ReLU(), "no parameter of the model requires a gradient"),
    ],
)
def test_refused_models(model, message):
    with pytest.raises(ValueError, match=message):
        grad_norms(model, torch.ones(4, 3), torch.zeros(4, dtype=torch.long))


def test_random_numbers_outside_modules_are_refused():
    model = Calls(lambda self, x: self.linear(F.dropout(x, 0.5)), linear=nn.Linear(64, 3))
    with pytest.raises(ValueError, match="draws at random"):
        grad_norms(model, gaussian(4, 64, dtype=torch.float32), torch.randint(3, (4,)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "linear"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"method": "fast"}, ValueError, 'method must be "auto"'),
        ({"params": "head"}, ValueError, "params must be .*'head'"),
        (
            {"params": ["weight", "scale"]},
            ValueError,
            "no parameter that requires a gradient is named 'scale'; .*'weight'",
        ),
        ({"params": []}, ValueError, "params names no parameter"),
        ({"params": lambda name, p: False}, ValueError, "params chose no parameter"),
        ({"inputs": torch.ones(0, 3), "targets": torch.ones(0)}, ValueError, "inputs hold no example"),
        ({"inputs": 3}, TypeError, "inputs must be a tensor.*got int"),
        ({"inputs": torch.ones(5, 3)}, ValueError, r"\(5, 3\) and \(4,\)"),
        ({"loss_fn": lambda o, t: o}, ValueError, r"shape \(4,\), or one number; got shape \(4, 2\)"),
        ({"loss_fn": lambda o, t: 1.0}, TypeError, "loss_fn must return a tensor, got float"),
        ({"targets": torch.tensor([0, 1, -1, 0])}, IndexError, "out of bounds"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"model": nn.Linear(3, 2), "inputs": torch.ones(4, 3), "targets": torch.tensor([0, 1, 1, 0])}
    with pytest.raises(error, match=message):
        grad_norms(**(arguments | change))


def test_outputs_that_the_loss_cannot_take():
    model = Calls(lambda self, x: (self.linear(x), self.linear.weight * 2), linear=nn.Linear(3, 2))
    x, y = torch.ones(4, 3), torch.tensor([0, 1, 1, 0])
    with pytest.raises(TypeError, match="cross_entropy cannot take the model's outputs, a tuple"):
        grad_norms(model, x, y)
    with pytest.raises(ValueError, match=r"cannot be taken apart, as they hold a tensor of shape \(2, 3\)"):
        grad_norms(model, x, y, lambda o, t: F.cross_entropy(o[0], t))


def test_transformers_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.randint(20, (4, 8))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones(4, 8, dtype=torch.long)}

    def loss(outputs, targets):
        return language_loss(outputs.logits[:, :-1], targets[:, 1:])

    norms = grad_norms(model, inputs, tokens, loss, method="ghost")
    torch.testing.assert_close(
        norms, grad_norms(model, inputs, tokens, loss, method="loop"), rtol=1e-12, atol=0
    )

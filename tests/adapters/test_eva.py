import math
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

from weightlab.adapters import eva_init_  # noqa: E402
from weightlab.adapters.eva import _mask  # noqa: E402
from weightlab.linalg import StreamingMoments  # noqa: E402

HIDDEN, LAYERS = 16, 2


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


class Net(nn.Module):
    """Layers whose inputs have spectra of very different decay, and a name that ends like another's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.inner = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 3)
        with torch.no_grad():
            # One direction of the head's input is all there is: it needs one component.
            self.inner[2].weight.copy_(torch.outer(torch.ones(12), torch.randn(12)))

    def forward(self, x):
        return self.head(self.inner(self.first(x).tanh()))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def text(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 32, (4, 10), generator=generator)} for _ in range(count)]


def vectors(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(20, 8, generator=generator) * torch.linspace(3, 0.2, 8) for _ in range(count)]


def lora(model, **options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**options))


def eva(model, data, **options):
    return eva_init_(model, data, progress=False, **{"tau": 1.0, **options})


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def scaling(model):
    return {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}


@torch.no_grad()
def run(model, batch):
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out.logits if hasattr(out, "logits") else out


MODELS = {
    "llama": (llama, text),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        ),
        text,
    ),
    "plain": (net, vectors),
}
EACH = pytest.mark.parametrize(("make", "data"), MODELS.values(), ids=MODELS)


@EACH
@pytest.mark.parametrize("method", ["covariance", "incremental", "sketch"])
def test_function_is_the_base_models_to_the_bit_and_a_is_orthonormal(make, data, method):
    torch.manual_seed(0)
    model = make().eval()
    batch = data()[0]
    expected = run(model, batch)
    wrapped = lora(model, r=3)
    for layer in lora_layers(wrapped).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    report = eva(wrapped, data(), method=method)
    assert torch.equal(run(wrapped, batch), expected)
    for name, rows in report.eva_state_dict.items():
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
        if len(rows):
            layer = wrapped.get_submodule(name)
            assert torch.equal(layer.lora_A["default"].weight, rows)
            assert torch.equal(
                layer.lora_B["default"].weight, torch.zeros_like(layer.lora_B["default"].weight)
            )
            assert layer.lora_A["default"].weight.requires_grad
            assert layer.lora_A["default"].out_features == layer.lora_B["default"].in_features == len(rows)
    assert report.batches == 4
    assert not report.converged


def test_rows_are_the_exact_components_of_what_flows_in():
    base, data = net(), vectors()
    inputs = base.first(torch.cat(data)).tanh().detach().double()
    inputs -= inputs.mean(0)
    expected = torch.linalg.svd(inputs, full_matrices=False).Vh[:4]
    wrapped = lora(base, target_modules=["inner.0"])
    report = eva(wrapped, data, rho=1.0)
    A = report.eva_state_dict["base_model.model.inner.0"].double()
    assert (A @ expected.T).square().sum() / 4 > 1 - 1e-6
    assert report.explained["inner.0"] == pytest.approx(
        float((inputs @ expected.T).square().sum() / inputs.square().sum())
    )


@EACH
def test_ranks_add_up_to_the_budget(make, data):
    torch.manual_seed(0)
    wrapped = lora(make(), r=3)
    count = len(lora_layers(wrapped))
    report = eva(wrapped, data(), rho=2.0)
    assert sum(report.ranks.values()) == 3 * count
    assert all(0 <= rank <= 6 for rank in report.ranks.values())
    assert report.parameters[1] == sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)


@EACH
def test_rho_one_leaves_all_ranks_and_the_configuration(make, data):
    torch.manual_seed(0)
    wrapped = lora(make(), r=3)
    targets = set(wrapped.peft_config["default"].target_modules)
    report = eva(wrapped, data(), rho=1.0)
    assert set(report.ranks.values()) == {3}
    assert report.parameters[0] == report.parameters[1]
    config = wrapped.peft_config["default"]
    assert (config.rank_pattern, config.alpha_pattern, set(config.target_modules)) == ({}, {}, targets)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_stays_equal_over_layers(rslora):
    wrapped = lora(net(), use_rslora=rslora)
    report = eva(wrapped, vectors())
    assert len(set(report.ranks.values())) > 1
    assert list(scaling(wrapped).values()) == pytest.approx(
        [8 / (2 if rslora else 4)] * len(scaling(wrapped))
    )
    fixed = lora(net(), use_rslora=rslora)
    report = eva(fixed, vectors(), adjust_scaling=False)
    for name, value in scaling(fixed).items():
        rank = report.ranks[name.removeprefix("base_model.model.")]
        assert value == pytest.approx(8 / (math.sqrt(rank) if rslora else rank))
    assert fixed.peft_config["default"].alpha_pattern == {}


class TestRankZero:
    @pytest.fixture
    def data(self):
        return vectors()

    @staticmethod
    def state(wrapped, ranks):
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(
                ranks[name.removeprefix("base_model.model.")], layer.in_features, generator=generator
            )
            for name, layer in lora_layers(wrapped).items()
        }

    def test_layers_without_rank_are_plain_again(self, data):
        base = net()
        plain = base.inner[2]
        wrapped = lora(base)
        state = self.state(wrapped, {"first": 5, "inner.0": 6, "inner.2": 0, "head": 5})
        report = eva_init_(wrapped, eva_state_dict=state)
        assert wrapped.base_model.model.inner[2] is plain
        assert report.ranks == {"first": 5, "inner.0": 6, "inner.2": 0, "head": 5}
        assert wrapped.peft_config["default"].target_modules == {"first", "inner.0", "head"}
        assert report.parameters == (4 * (20 + 24 + 24 + 15), 5 * 20 + 6 * 24 + 5 * 15)
        assert report.batches == 0

    def test_it_comes_about_from_data(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 8))
        steep = torch.randn(100, 8) * torch.tensor([10.0, 9.0, 8.0, 7.0, 0.1, 0.1, 0.1, 0.1])
        wrapped = lora(model, r=2, target_modules=["0", "1"])
        report = eva(
            wrapped,
            [(steep, torch.randn(100, 64))],
            forward_fn=lambda m, b: (m.base_model.model[0](b[0]), m.base_model.model[1](b[1])),
        )
        assert report.ranks == {"0": 4, "1": 0}
        assert isinstance(model[1], nn.Linear)

    @pytest.mark.parametrize("low_memory", [False, True])
    def test_plain_peft_loads_what_is_saved(self, data, tmp_path, low_memory):
        wrapped = lora(net())
        state = self.state(wrapped, {"first": 5, "inner.0": 4, "inner.2": 0, "head": 7})
        eva_init_(wrapped, eva_state_dict=state)
        for layer in lora_layers(wrapped).values():
            nn.init.normal_(layer.lora_B["default"].weight)
        wrapped.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(run(loaded, data[0]), run(wrapped, data[0]))
        assert scaling(loaded) == scaling(wrapped)

    def test_names_that_end_alike_do_not_mislead_peft(self, tmp_path):
        def nested(seed=0):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))

        x = vectors(1)[0]
        for ranks in (
            {"0": 3, "1.0": 0, "1.1": 4},
            {"0": 3, "1.0": 4, "1.1": 4},
            {"0": 3, "1.0": 6, "1.1": 4},
            {"0": 4, "1.0": 6, "1.1": 0},
        ):
            wrapped = lora(nested(), target_modules=["0", "1.0", "1.1"])
            eva_init_(wrapped, eva_state_dict=self.state(wrapped, ranks))
            for layer in lora_layers(wrapped).values():
                nn.init.normal_(layer.lora_B["default"].weight)
            wrapped.save_pretrained(tmp_path)
            loaded = PeftModel.from_pretrained(nested(), tmp_path)
            assert torch.equal(run(loaded, x), run(wrapped, x))
            assert set(lora_layers(loaded)) == {f"base_model.model.{n}" for n, r in ranks.items() if r}

    def test_other_adapters_of_the_layer_stay(self, data):
        wrapped = lora(net())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
        for layer in lora_layers(wrapped).values():
            nn.init.normal_(layer.lora_B["other"].weight)
        wrapped.set_adapter("other")
        other = run(wrapped, data[0])
        wrapped.set_adapter("default")
        state = self.state(wrapped, {"first": 8, "inner.0": 0, "inner.2": 4, "head": 4})
        with wrapped.disable_adapter():
            base = run(wrapped, data[0])
        eva_init_(wrapped, eva_state_dict=state)
        assert torch.equal(run(wrapped, data[0]), base)
        assert "inner.0" not in wrapped.peft_config["default"].target_modules
        wrapped.set_adapter("other")
        assert torch.equal(run(wrapped, data[0]), other)


def test_queries_keys_and_values_are_counted_once(monkeypatch):
    updates = []
    update = StreamingMoments.update
    monkeypatch.setattr(
        StreamingMoments, "update", lambda self, rows: (updates.append(1), update(self, rows))[1]
    )
    wrapped = lora(llama())
    eva(wrapped, text(3))
    assert len(lora_layers(wrapped)) <= 7 * LAYERS
    # Queries, keys and values; the output; gate and up; down.
    assert len(updates) == 3 * 4 * LAYERS


def test_padding_and_masked_labels_do_not_count():
    data = text(2)
    for batch in data:
        batch["attention_mask"] = torch.ones(4, 10, dtype=torch.long)
        batch["attention_mask"][:, 7:] = 0
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :3] = -100
    other = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in data]
    for batch in other:
        batch["input_ids"][:, 7:] = 5
    found, same, unmasked = (
        eva(lora(llama()), batches, **options).eva_state_dict
        for batches, options in ((data, {}), (other, {}), (data, {"label_mask": None}))
    )
    for name, rows in found.items():
        torch.testing.assert_close(rows, same[name])
    assert any(
        rows.shape != unmasked[name].shape or not torch.allclose(rows, unmasked[name], atol=1e-3)
        for name, rows in found.items()
    )
    pairs = [(x, torch.where(torch.arange(20) < 12, 1, -100)) for x in vectors()]
    masked, cut = (eva(lora(net()), data).eva_state_dict for data in (pairs, [x[:12] for x in vectors()]))
    for name, rows in masked.items():
        torch.testing.assert_close(rows, cut[name])


def test_labels_of_other_positions_mask_nothing():
    attention = torch.tensor([[1, 1, 0], [1, 1, 1]])
    examples = _mask({"attention_mask": attention, "labels": torch.tensor([-100, 2])}, -100)
    assert torch.equal(examples, torch.tensor([[False] * 3, [True] * 3]))
    decoder = _mask({"attention_mask": attention, "labels": torch.full((2, 5), -100)}, -100)
    assert torch.equal(decoder, attention.bool())
    assert _mask({"labels": torch.tensor([0.5])}, -100) is None


class TestExchange:
    def test_peft_takes_ours(self):
        ours, theirs = lora(llama()), lora(llama(), init_lora_weights="eva")
        report = eva(ours, text())
        initialize_lora_eva_weights(theirs, eva_state_dict=dict(report.eva_state_dict))
        assert {n: tuple(p.shape) for n, p in theirs.named_parameters() if "lora" in n} == {
            n: tuple(p.shape) for n, p in ours.named_parameters() if "lora" in n
        }
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours.get_parameter(name))
        assert scaling(theirs) == pytest.approx(scaling(ours))
        assert theirs.peft_config["default"].rank_pattern == ours.peft_config["default"].rank_pattern
        assert theirs.peft_config["default"].alpha_pattern == ours.peft_config["default"].alpha_pattern

    def test_ours_takes_pefts(self):
        config = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0, tau=0.5)}
        theirs = lora(llama(), **config)
        state = peft.get_eva_state_dict(theirs, text(), show_progress_bar=False)
        initialize_lora_eva_weights(theirs, eva_state_dict=dict(state))
        ours = lora(llama())
        report = eva_init_(ours, eva_state_dict=state)
        assert sum(report.ranks.values()) == 4 * 7 * LAYERS
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours.get_parameter(name))

    def test_one_batch_gives_pefts_components(self):
        # On a single batch repeated, PEFT's incremental SVD sees the same covariance.
        batch = vectors(1)[0]
        options = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0, tau=0.99)}
        # Of eight dimensions it draws twice the rank, which leaves nothing out.
        theirs = lora(net(), target_modules=["first"], **options)
        state = peft.get_eva_state_dict(
            theirs,
            [batch],
            forward_fn=lambda model, batch: model(batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        report = eva(lora(net(), target_modules=["first"]), [batch], rho=1.0)
        for name, rows in state.items():
            torch.testing.assert_close(report.eva_state_dict[name], rows.float(), rtol=0, atol=1e-4)

    def test_layers_without_an_entry_keep_their_start(self):
        wrapped = lora(net())
        before = wrapped.base_model.model.head.lora_A["default"].weight.clone()
        with pytest.warns(
            UserWarning, match=r"nothing for \['base_model\.model\.inner\.0'.*keep their start"
        ):
            eva_init_(wrapped, eva_state_dict={"base_model.model.first": torch.eye(8)[:6]})
        assert torch.equal(wrapped.base_model.model.head.lora_A["default"].weight, before)
        assert wrapped.peft_config["default"].rank_pattern == {"first": 6}

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (
                {"first": torch.eye(8)},
                r"\['first'\], no LoRA layer of this model; layers are named as 'base_model",
            ),
            (
                {"base_model.model.first": torch.eye(7)},
                r"has shape \(7, 7\) for .*first', whose A has \(4, 8\)",
            ),
            ({"base_model.model.first": torch.full((2, 8), math.nan)}, "that are not finite"),
            ({"base_model.model.first": torch.zeros(0, 8)}, "holds no component for any layer"),
        ],
    )
    def test_wrong_states_are_refused(self, state, message):
        with pytest.raises(ValueError, match=message):
            eva_init_(lora(net()), eva_state_dict=state)


def test_whitening_divides_by_roots_of_singular_values():
    plain, white = (
        eva(lora(net()), vectors(), rho=1.0, whiten=flag).eva_state_dict for flag in (False, True)
    )
    inputs = torch.cat(vectors())
    inputs = (inputs - inputs.mean(0)).double()
    name = "base_model.model.first"
    values = torch.linalg.svdvals(inputs)[:4].float()
    torch.testing.assert_close(white[name] * values.sqrt()[:, None], plain[name], rtol=1e-4, atol=1e-5)


def test_convolutions_are_started_by_their_patches():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))

    images = [torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    model = make()
    expected = run(model, images[0])
    wrapped = lora(model, r=2, target_modules=["0", "2"])
    report = eva(wrapped, images, rho=1.5)
    assert torch.equal(run(wrapped, images[0]), expected)
    rows = report.eva_state_dict["base_model.model.0"]
    assert rows.shape[1:] == (2, 3, 3)
    flat = rows.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), rtol=0, atol=1e-5)
    wrapped.base_model.model[0].lora_B["default"].weight.data.normal_()
    run(wrapped, images[0])


def test_embeddings_are_left_alone():
    wrapped = lora(llama(), target_modules=["embed_tokens", "q_proj"])
    before = wrapped.base_model.model.model.embed_tokens.lora_embedding_A["default"].clone()
    report = eva(wrapped, text())
    assert torch.equal(wrapped.base_model.model.model.embed_tokens.lora_embedding_A["default"], before)
    assert len(report.ranks) == LAYERS


def test_bfloat16_adapters_stay_bfloat16():
    wrapped = lora(llama().bfloat16())
    dtype = wrapped.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype
    report = eva(wrapped, text())
    assert {p.dtype for n, p in wrapped.named_parameters() if "lora" in n} == {dtype}
    exact = eva(lora(llama()), text())
    overlaps = [
        float(
            (rows.float() @ exact.eva_state_dict[name].T).square().sum()
            / min(map(len, (rows, exact.eva_state_dict[name])))
        )
        for name, rows in report.eva_state_dict.items()
    ]
    assert sum(overlaps) / len(overlaps) > 0.95


def test_everything_else_is_left_as_it_was():
    wrapped = lora(net(), lora_dropout=0.1, bias="lora_only").train()
    wrapped.base_model.model.head.lora_A["default"].weight.requires_grad_(False)
    parameters = {n: p.requires_grad for n, p in wrapped.named_parameters()}
    eva(wrapped, vectors(), rho=1.0)
    assert {n: p.requires_grad for n, p in wrapped.named_parameters()} == parameters
    assert all(module.training for module in wrapped.modules())
    assert wrapped.active_adapters == ["default"]


def test_a_failure_changes_nothing():
    wrapped = lora(net()).train()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    bad = [*vectors(2), torch.full((3, 8), math.nan)]
    with pytest.raises(
        ValueError, match=r"layer 'base_model\.model\.first': rows hold values that are not finite"
    ):
        eva(wrapped, bad)
    assert all(torch.equal(before[name], value) for name, value in wrapped.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in wrapped.modules())


def test_runs_are_repeated_to_the_bit():
    first, second = (eva(lora(net()), vectors()).eva_state_dict for _ in range(2))
    assert all(torch.equal(rows, second[name]) for name, rows in first.items())


def test_report_prints_as_a_table():
    rich_console = pytest.importorskip("rich.console")
    report = eva(lora(net()), vectors(), max_batches=3)
    console = rich_console.Console(width=100)
    with console.capture() as capture:
        console.print(report)
    printed = capture.get()
    assert "3 batches" in printed
    assert "inner.0" in printed
    assert [row["rank"] for row in report.table()] == list(report.ranks.values())
    assert "eva_state_dict" not in repr(report)


class TestBadInput:
    def test_options(self):
        wrapped = lora(net())
        with pytest.raises(ValueError, match=r"rho must be at least 1, got 0\.9; 1 keeps all ranks"):
            eva(wrapped, vectors(), rho=0.9)
        for tau in (-0.1, 1.5):
            with pytest.raises(ValueError, match=r"tau must be in \[0, 1\]"):
                eva(wrapped, vectors(), tau=tau)
        with pytest.raises(ValueError, match="method must be one of covariance"):
            eva(wrapped, vectors(), method="pca")
        with pytest.raises(ValueError, match="needs batches: give dataloader, or eva_state_dict"):
            eva_init_(wrapped)
        with pytest.raises(ValueError, match="batches is empty"):
            eva(wrapped, [])

    def test_too_few_rows(self):
        with pytest.raises(
            ValueError, match=r"'base_model\.model\.first' saw 5 rows, fewer than its 8 components"
        ):
            eva(lora(net()), [vectors()[0][:5]])

    def test_components_beyond_the_dimension_are_cut(self):
        wrapped = lora(net(), r=6)
        with pytest.warns(UserWarning, match=r"12 of 8 in 'base_model\.model\.first'; it is cut"):
            report = eva(wrapped, vectors())
        assert report.ranks["first"] <= 8
        assert sum(report.ranks.values()) == 24

    def test_models(self):
        with pytest.raises(TypeError, match=r"needs a PeftModel, as get_peft_model.*gives, not Net"):
            eva(net(), vectors())
        wrapped = get_peft_model(net(), peft.LoKrConfig(r=2, target_modules=["first"]))
        with pytest.raises(TypeError, match="eva_init_ starts LoRA adapters"):
            eva(wrapped, vectors())
        with pytest.raises(ValueError, match="has no LoRA on a Linear, Conv1D or Conv2d"):
            eva(lora(llama(), target_modules=["embed_tokens"]), text())
        with pytest.raises(ValueError, match="init_lora_weights='pissa' has changed the base weights"):
            eva(lora(net(), init_lora_weights="pissa"), vectors())

    def test_adapters(self):
        wrapped = lora(net())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
        wrapped.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match=r"one active adapter, got \['default', 'other'\]"):
            eva(wrapped, vectors())
        merged = lora(net())
        merged.merge_adapter()
        with pytest.raises(ValueError, match=r"is merged; call unmerge_adapter\(\) first"):
            eva(merged, vectors())

    def test_layers_without_input(self):
        with pytest.raises(ValueError, match=r"no input reached .*head"):
            eva(
                lora(net()),
                vectors(),
                forward_fn=lambda m, x: m.base_model.model.inner(m.base_model.model.first(x)),
            )

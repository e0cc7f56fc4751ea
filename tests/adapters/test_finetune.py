import json
import math
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from tiny_causal_lm import TEXT, byte_tokenizer, save_tiny_llama, tiny_llama
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from weightlab import adapters
from weightlab.adapters.finetune import Display, Settings, finetune, summary
from weightlab.adapters.finetune.files import Workplace
from weightlab.adapters.finetune.methods import METHODS, peft_config, target_shapes
from weightlab.adapters.finetune.model import load_model
from weightlab.adapters.finetune.text import cut, read_documents, tokenize
from weightlab.exceptions import UsageError, WeightlabError

QUIET = Display(quiet=True)
# PEFT asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model_folder, tmp_path):
    """Build settings of a run of seconds; keywords override."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)

    def build(**changes):
        usual = {
            "model": str(model_folder),
            "data": str(file),
            "out": str(tmp_path / "adapter"),
            "steps": 6,
            "batch_size": 4,
            "block_size": 32,
            "rank": 4,
            "lr": 1e-2,
            "cpu": True,
        }
        return Settings(**{**usual, **changes})

    return build


def adapted(model_folder, adapter_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    return PeftModel.from_pretrained(base, adapter_folder).eval()


def held_out_loss(model, settings):
    tokens = tokenize(read_documents(settings.data), byte_tokenizer())
    _, blocks = cut(tokens, settings.block_size, settings.eval_fraction)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in blocks.rows]
    return torch.stack(losses).mean().item()


METHODS_AND_CHANGES = [
    ("lora", {}),
    ("rslora", {"alpha": 8.0}),
    ("dora", {}),
    ("pissa", {}),
    ("eva", {"options": {"rho": 2.0}}),
    ("orthogonal", {"options": {"slot": 1}}),
    ("bone", {"variant": "affine"}),
    ("bone", {"variant": "additive", "as_lora": True}),
    ("sorsa", {"as_lora": True}),
    ("sorsa", {"variant": "decoupled"}),
    ("svfit", {"rank": None}),
]


@pytest.mark.parametrize(
    ("method", "changes"), METHODS_AND_CHANGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_adapter_in_the_folder_has_the_loss_of_the_report(settings, model_folder, method, changes):
    chosen = settings(method=method, **changes)
    report = finetune(chosen, display=QUIET)
    out = chosen.out
    assert (
        sorted(os.listdir(out))
        == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "weightlab.json",
        ][1 if chosen.as_lora else 0 :]
    )
    assert json.loads(Path(out, "weightlab.json").read_text()) == json.loads(json.dumps(report))
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert held_out_loss(base, chosen) == pytest.approx(report["loss"]["before"], rel=1e-5)
    assert report["loss"]["after"] < report["loss"]["before"]
    model = adapted(model_folder, out)
    assert held_out_loss(model, chosen) == pytest.approx(report["loss"]["after"], rel=1e-4)
    if METHODS[method].config == "LoraConfig" or chosen.as_lora:
        assert PeftConfig.from_pretrained(out).peft_type.value == "LORA"
    assert PeftConfig.from_pretrained(out).base_model_name_or_path == chosen.model
    text = summary(report)
    assert out in text
    assert f"{report['parameters']['trained']:,} parameters" in text
    assert not os.path.exists(f"{out}.unfinished")


def test_every_method_is_tested():
    assert {method for method, _ in METHODS_AND_CHANGES} == set(METHODS)


def test_trained_parameters_are_counted(settings):
    report = finetune(settings(steps=1, targets=("q_proj",)), display=QUIET)
    assert report["parameters"]["trained"] == 2 * 4 * (32 + 32)
    assert report["settings"]["targets"] == ("q_proj",)


class StopAt(TrainerCallback):
    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("lora", signal.SIGINT),
        ("lora", signal.SIGTERM),
        *((method, signal.SIGINT) for method in ("pissa", "eva", "orthogonal", "sorsa")),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(settings, tmp_path, monkeypatch, method, number):
    changes = {"method": method, "options": {"key": "k"} if method == "orthogonal" else {}}
    straight = settings(out=str(tmp_path / "straight"), **changes)
    finetune(straight, display=QUIET)
    stopped = settings(out=str(tmp_path / "stopped"), **changes)
    train = Trainer.train

    def with_stop(self, *args, **kwargs):
        self.add_callback(StopAt(2, lambda: signal.raise_signal(number)))
        return train(self, *args, **kwargs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", with_stop)
        with pytest.raises(KeyboardInterrupt, match=r"Stopped after step 3.*--resume"):
            finetune(stopped, display=QUIET)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(UsageError, match="--resume continues it, --force starts over"):
        finetune(stopped, display=QUIET)
    with pytest.raises(UsageError, match=r"has lr=0.01, not 0.1"):
        finetune(settings(out=stopped.out, **{**changes, "lr": 0.1}), resume=True, display=QUIET)
    report = finetune(stopped, resume=True, display=QUIET)
    assert report["steps"] == 6
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "stopped")
    )
    assert first == second
    kept = json.loads((tmp_path / "straight" / "weightlab.json").read_text())
    assert (report["loss"]["before"], report["loss"]["after"]) == (
        kept["loss"]["before"],
        kept["loss"]["after"],
    )


def test_a_run_that_failed_after_training_resumes_without_training(settings, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "publish", fail)
        with pytest.raises(OSError, match="disk full"):
            finetune(settings(), display=QUIET)
    monkeypatch.setattr(Trainer, "train", fail)
    report = finetune(settings(), resume=True, display=QUIET)
    assert report["loss"]["after"] < report["loss"]["before"]


def test_text_that_changed_is_not_resumed(settings, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "publish", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            finetune(settings(), display=QUIET)
    (tmp_path / "text.txt").write_text(TEXT.upper())
    with pytest.raises(UsageError, match="text has changed"):
        finetune(settings(), resume=True, display=QUIET)


def test_nothing_is_left_of_a_run_that_failed_early(settings, tmp_path):
    with pytest.raises(UsageError, match="no layer of the model"):
        finetune(settings(targets=("nothing",)), display=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_a_folder_that_exists_is_replaced_only_by_force_and_only_if_it_is_an_adapter(settings, tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "precious.txt").write_text("keep")
    for force, message in ((False, "exists; give another --out"), (True, "not an adapter's folder")):
        with pytest.raises(UsageError, match=message):
            finetune(settings(), force=force, display=QUIET)
    assert (out / "precious.txt").read_text() == "keep"
    (out / "adapter_config.json").write_text("{}")
    finetune(settings(steps=1), force=True, display=QUIET)
    assert not (out / "precious.txt").exists()
    with pytest.raises(UsageError, match="nothing to resume"):
        finetune(settings(steps=1), resume=True, display=QUIET)


def test_a_loss_that_is_not_finite_ends_the_run(settings):
    with pytest.raises(WeightlabError, match=r"the loss is (nan|inf) at step \d; lower --lr \(now 1e\+30\)"):
        finetune(settings(lr=1e30), display=QUIET)


def test_bfloat16_keeps_the_adapter_in_float32(settings):
    from safetensors.torch import load_file

    chosen = settings(bf16=True, gradient_checkpointing=True, accumulate=2)
    report = finetune(chosen, display=QUIET)
    assert report["loss"]["after"] < report["loss"]["before"]
    saved = load_file(f"{chosen.out}/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_accumulated_batches_are_one_larger_batch(settings, tmp_path):
    reports = [
        finetune(
            settings(
                batch_size=batch_size, accumulate=accumulate, steps=3, out=str(tmp_path / str(batch_size))
            ),
            display=QUIET,
        )
        for batch_size, accumulate in ((4, 1), (2, 2))
    ]
    assert reports[0]["loss"]["after"] == pytest.approx(reports[1]["loss"]["after"], rel=1e-5)


def test_epochs_count_the_steps(settings):
    # 2701 tokens make 84 blocks of 32, 8 of them held out; 76 blocks make 19 batches of 4, so 10 steps of two.
    report = finetune(settings(steps=None, epochs=0.3, accumulate=2), display=QUIET)
    assert report["blocks"] == {"size": 32, "train": 76, "evaluation": 8}
    assert report["steps"] == math.ceil(0.3 * 10)


def test_without_a_held_out_part_there_is_no_evaluation(settings):
    report = finetune(settings(eval_fraction=0.0, steps=2), display=QUIET)
    assert (report["loss"]["before"], report["loss"]["after"]) == (None, None)
    assert report["blocks"]["evaluation"] == 0
    assert "held-out" not in summary(report)


def test_a_loss_that_rose_is_told():
    report = {
        "method": "lora",
        "adapter": "out",
        "steps": 2,
        "parameters": {"trained": 10, "all": 1000},
        "loss": {"before": 1.0, "after": 1.5},
        "seconds": {"training": 1.0, "start": 0.1},
        "peak_memory_mb": None,
    }
    assert "! it did not fall" in summary(report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "pisa"}, "unknown method 'pisa', did you mean pissa"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"block_size": 1}, "block_size must be at least 2; got 1"),
        ({"lr": -1.0}, "lr must be above 0 and finite; got -1.0"),
        ({"epochs": math.inf}, "epochs must be above 0 and finite; got inf"),
        ({"eval_fraction": 1.0}, r"eval_fraction must be in \[0, 1\); got 1.0"),
        ({"targets": ()}, "no targets given"),
        ({"rank": 0}, "rank must be at least 1; got 0"),
        ({"rank": 33}, "rank 33 is larger than model.layers.0.self_attn.q_proj, whose weight is 32×32"),
        ({"targets": ("q_prj",)}, r"called q_prj \(did you mean q_proj\?\); .*: q_proj, k_proj, v_proj"),
        ({"block_size": 65}, "block_size 65 is more than the model's 64 positions"),
        ({"method": "bone", "alpha": 2.0}, "bone has no alpha"),
        ({"method": "bone", "rank": 5}, "5.*32"),
        ({"variant": "affine"}, "lora has no variants"),
        ({"method": "bone", "variant": "afine"}, "afine"),
        ({"options": {"lora_dropuot": 0.1}}, "no setting 'lora_dropuot'; did you mean lora_dropout"),
        ({"method": "eva", "options": {"rho": 0.5}}, "eva: rho must be at least 1"),
        (
            {"method": "orthogonal", "options": {"slot": 99}},
            "orthogonal: layer .*q_proj: slot 99 does not exist",
        ),
        ({"method": "bone", "variant": "affine", "as_lora": True}, "--as-lora"),
        ({"model": "/nowhere/model"}, "no folder /nowhere/model"),
        ({"data": "/nowhere/text.txt"}, "no file or folder /nowhere/text.txt"),
    ],
)
def test_bad_requests_are_refused(settings, changes, message):
    with pytest.raises(UsageError, match=message):
        finetune(settings(**changes), display=QUIET)


def test_several_processes_are_refused(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        finetune(settings(), display=QUIET)


def test_text_is_read_from_every_kind_of_file(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "x": 1}\n\n{"text": "four"}\n')
    pq.write_table(pa.table({"text": ["five", None, " "], "n": [1, 2, 3]}), tmp_path / "c.parquet")
    assert read_documents(str(tmp_path / "a.txt")) == ["one\n\ntwo"]
    assert read_documents(str(tmp_path / "b.jsonl")) == ["three", "four"]
    assert read_documents(str(tmp_path / "c.parquet")) == ["five"]
    assert read_documents(str(tmp_path)) == ["one\n\ntwo", "three", "four", "five"]


def test_a_folder_and_a_repository_give_the_split(tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "name" / "config"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}-00000-of-00001.jsonl").write_text(json.dumps({"body": split}))
    assert read_documents(str(folder), field="body") == ["train"]
    assert read_documents(str(folder), field="body", split="test") == ["test"]
    monkeypatch.setenv("WEIGHTLAB_DATA", str(tmp_path))
    assert read_documents("owner/name:config", field="body") == ["train"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "holds no text"),
        ("binary.txt", b"\xff\xfe\x00", "not text in UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("field.jsonl", b'{"body": "a"}\n', r"line 1 has no text in 'text'; it has: body \(.*--text-field"),
        ("list.jsonl", b"[1]\n", "line 1 has no text in 'text'; it has: list"),
        ("bad.parquet", b"PAR1", "not a Parquet file"),
    ],
)
def test_unusable_text_is_refused(tmp_path, name, content, message):
    pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_documents(str(file))


def test_columns_of_a_parquet_file_are_named(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "c.parquet")
    with pytest.raises(UsageError, match="no column 'text'; it has: body, n"):
        read_documents(str(tmp_path / "c.parquet"))
    with pytest.raises(UsageError, match="holds int, not text"):
        read_documents(str(tmp_path / "c.parquet"), field="n")


def test_repositories_are_not_asked_for_when_the_hub_is_offline(monkeypatch):
    monkeypatch.setattr("weightlab.adapters.finetune.text.hub_answers", lambda: False)
    monkeypatch.setattr("weightlab.adapters.finetune.model.hub_answers", lambda: False)
    monkeypatch.delenv("WEIGHTLAB_DATA", raising=False)
    with pytest.raises(UsageError, match="WEIGHTLAB_DATA is not set, and from the Hugging Face Hub: it does"):
        read_documents("no-such-owner/no-such-name")
    with pytest.raises(UsageError, match="no model no-such-owner/no-such-name: there is no such folder"):
        load_model("no-such-owner/no-such-name")


def test_documents_end_with_the_tokenizers_end():
    tokenizer = byte_tokenizer()
    tokens = tokenize(["ab", "c"], tokenizer)
    assert tokens[[2, 4]].tolist() == [256, 256]
    assert tokenizer.decode(tokens) == "ab<end>c<end>"


def test_blocks_are_cut_in_order_and_the_end_is_held_out():
    tokens = torch.arange(103)
    train, held_out = cut(tokens, 10, 0.25)
    assert torch.equal(torch.cat([train.rows, held_out.rows]).flatten(), torch.arange(100))
    assert (len(train), len(held_out)) == (8, 2)
    assert cut(tokens, 10, 0.0)[1].rows.shape == (0, 10)
    for fraction, message in (
        (0.5, "103 tokens, which is less than two blocks"),
        (0.0, "less than one block"),
    ):
        with pytest.raises(UsageError, match=message):
            cut(tokens, 60 if fraction else 104, fraction)


def test_models_from_folders(model_folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no config.json"):
        load_model(str(tmp_path))
    without = tmp_path / "without"
    tiny_llama().save_pretrained(without)
    with pytest.raises(UsageError, match=r"no tokenizer in .*without"):
        load_model(str(without))
    model, tokenizer = load_model(str(without), tokenizer=str(model_folder), bf16=True)
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"
    (without / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter"):
        load_model(str(without))
    monkeypatch.setenv("WEIGHTLAB_DATA", str(model_folder.parent))
    monkeypatch.chdir(tmp_path)
    model, _ = load_model(model_folder.name)
    assert model.name_or_path == model_folder.name


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_pickles_are_loaded_only_if_they_hold_tensors(tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    weights = tiny_llama().state_dict()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"cannot load .*: Error no file named model.safetensors"):
        load_model(str(folder))
    torch.save(weights, folder / "pytorch_model.bin")
    model, _ = load_model(str(folder))
    assert torch.equal(model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])
    torch.save({**weights, "payload": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickle that holds more than tensors"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_model_is_refused(settings, tmp_path):
    folder = save_tiny_llama(tmp_path / "small", vocab_size=64, eos_token_id=1)
    with pytest.raises(UsageError, match="but the model knows 64"):
        finetune(settings(model=str(folder)), display=QUIET)


def test_targets_are_ends_of_names():
    model = tiny_llama()
    linear = target_shapes(model, ["all-linear"])
    assert len(linear) == 14
    assert "lm_head" not in linear
    assert set(target_shapes(model, ["q_proj", "layers.1.mlp.up_proj"])) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert target_shapes(model, ["embed_tokens"]) == {"model.embed_tokens": (257, 32)}
    with pytest.raises(UsageError, match="no layer of the model is called self_attn"):
        target_shapes(model, ["self_attn"])


def test_alpha_is_the_rank_unless_given():
    shapes = {"layer": (32, 32)}
    for method, field in (("lora", "lora_alpha"), ("sorsa", "alpha")):
        for alpha, expected in ((None, 8), (2.0, 2.0)):
            config, _ = peft_config(method, shapes, targets=["layer"], rank=8, alpha=alpha)
            assert getattr(config, field) == expected


def test_every_method_names_what_exists():
    for name, method in METHODS.items():
        for attribute in (method.start, method.callback):
            assert attribute is None or callable(getattr(adapters, attribute)), name
        if method.config != "LoraConfig":
            assert callable(getattr(adapters, method.config))


def test_progress_is_told_in_lines_where_there_is_no_terminal(settings, monkeypatch):
    from io import StringIO

    from rich.console import Console

    monkeypatch.setattr("weightlab.adapters.finetune.display._PLAIN_EVERY", 0.0)
    stream = StringIO()
    finetune(settings(), display=Display(console=Console(file=stream)))
    told = stream.getvalue()
    for part in (
        "loading",
        "starting lora on 14 layers",
        "evaluating before",
        "step 6 of 6 · loss",
        "evaluating after",
    ):
        assert part in told


def test_progress_is_drawn_on_a_terminal(settings):
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    finetune(settings(), display=Display(console=console))
    assert "6/6 steps · loss" in stream.getvalue()


def test_warnings_of_others_that_a_user_cannot_mend_are_not_shown(settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        finetune(settings(steps=1), display=QUIET)
    assert [str(entry.message) for entry in caught if "deprecated" in str(entry.message)] == []

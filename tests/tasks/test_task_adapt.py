import itertools
import shutil

import pytest
import torch

from weightlab import tasks
from weightlab.exceptions import TaskError, UsageError
from weightlab.tasks import AdaptCode, AdaptDigits, AdaptGPT, DigitsMLP, adapt_code, pretrained
from weightlab.tasks.adapt_code import MODULES, module_text
from weightlab.tasks.data import cache_folder
from weightlab.tasks.docs_gpt import split_text

SMALL = {"width": 16, "depth": 1, "heads": 2, "context": 8, "batch_size": 4, "eval_characters": 64}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small_digits(**options):
    return AdaptDigits(**{"hidden": (16,), "batch_size": 32, "steps": 10, "pretrain_steps": 12, **options})


def small_code(**options):
    return AdaptCode(**{**SMALL, "pretrain_steps": 3, **options})


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def forbid_training(monkeypatch):
    def trained(*arguments):
        raise AssertionError("trained although the cache has it")

    monkeypatch.setattr("weightlab.tasks.pretraining._train", trained)


@pytest.mark.parametrize("make", [small_digits, small_code, lambda: small_code(tied=True, dropout=0.1)])
def test_the_cache_gives_what_training_gives_bit_for_bit(make, monkeypatch):
    fresh = make().build(seeded(0))
    shutil.rmtree(cache_folder())
    again = make().build(seeded(0))
    assert same(fresh, again)
    forbid_training(monkeypatch)
    assert same(fresh, make().build(seeded(0)))
    with pytest.raises(AssertionError, match="although"):
        make().build(seeded(1))


def test_building_draws_one_number_and_leaves_the_global_state_alone():
    generator, other = seeded(3), seeded(3)
    before = torch.get_rng_state()
    small_code(dropout=0.1).build(generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randint(2**62, (), generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


def test_training_starts_from_the_sources_own_weights_and_has_its_steps():
    source = DigitsMLP(hidden=(16,))
    start = source.build(seeded(int(torch.randint(2**62, (), generator=seeded(0)))))
    assert same(start, pretrained(source, seeded(0), steps=0))
    one, two = (pretrained(source, seeded(0), steps=steps) for steps in (1, 2))
    assert not same(start, one)
    assert not same(one, two)


def test_a_first_step_is_that_of_adamw():
    source, seed = DigitsMLP(hidden=(16,)), int(torch.randint(2**62, (), generator=seeded(0)))
    generator = seeded(seed)
    model = source.build(generator)
    torch.randint(2**62, (), generator=generator)
    source.loss(model, next(source.batches("train", generator))).backward()
    lr = 0.01
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * (1 - lr * 0.01) - lr * p.grad / (p.grad.abs() + 1e-8))
    for a, b in zip(
        model.parameters(), pretrained(source, seeded(0), steps=1, lr=lr).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_everything_that_weights_depend_on_has_a_file_of_its_own():
    def files():
        return len(list(cache_folder().glob("pretrained--*")))

    threads = torch.get_num_threads()
    try:
        for number, (task, count) in enumerate(
            [
                (small_digits(), 1),
                (small_digits(pretrain_steps=13), 1),
                (small_digits(batch_size=16), 1),
                (small_digits(hidden=(17,)), 1),
                (small_digits(), 2),
            ],
            start=1,
        ):
            torch.set_num_threads(count)
            task.build(seeded(0))
            assert files() == number
        small_digits(shift="contrast", steps=3).build(seeded(0))
        assert files() == 5
    finally:
        torch.set_num_threads(threads)


def test_a_cache_that_cannot_be_written_or_read_only_costs_time(tmp_path, monkeypatch):
    expected = small_digits().build(seeded(0))
    (file,) = cache_folder().glob("pretrained--*")
    file.write_bytes(b"no such thing")
    assert same(expected, small_digits().build(seeded(0)))
    (tmp_path / "occupied").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    assert same(expected, small_digits().build(seeded(0)))


def test_digits_are_known_and_shifted_ones_are_not():
    task, mild = AdaptDigits(), tasks.get("adapt-digits-contrast")
    model = task.build(seeded(0))
    assert same(model, mild.build(seeded(0)))
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        turned, grey = task.evaluate(model, "test"), mild.evaluate(model, "test")
        known = DigitsMLP().evaluate(model, "test")
    assert turned["source_error"] == grey["source_error"] == known["error"] < 0.06
    assert turned["error"] > 0.7
    assert 0.1 < grey["error"] < 0.5


def test_shifts_are_what_they_say():
    pixels, labels = DigitsMLP().images("validation")
    for shift, expected in (
        ("rotate", pixels.transpose(1, 2).flip(1) / 16),
        ("contrast", 0.25 + pixels / 32),
    ):
        task = AdaptDigits(shift=shift)
        assert torch.equal(task.prepare(task.images("validation")[0]), expected)
        assert torch.equal(task.images("validation")[1], labels)
    with pytest.raises(UsageError, match="shift must be rotate or contrast, not 'blur'"):
        AdaptDigits(shift="blur")


@pytest.mark.parametrize("make", [small_digits, small_code])
def test_batches_depend_on_the_generator_alone(make):
    one, two = (
        [hash(str(batch)) for batch in itertools.islice(make().batches("train", seeded(0)), 3)]
        for _ in range(2)
    )
    assert one == two


def test_fingerprints_follow_settings():
    variants = [
        small_digits(), small_digits(shift="contrast"), small_digits(pretrain_steps=13), small_digits(hidden=(8,)),
        small_code(), small_code(pretrain_steps=4), small_code(width=8), small_code(eval_characters=32),
    ]  # fmt: skip
    assert len({task.fingerprint() for task in variants}) == len(variants)
    assert small_digits().fingerprint() == small_digits().fingerprint()


def test_text_is_judged_on_both_domains():
    task = small_code()
    model = task.build(seeded(0)).eval()
    with torch.no_grad():
        values = task.evaluate(model, "validation")
        assert values["source_loss"] == task.source.evaluate(model, "validation")["loss"]
    assert torch.equal(task.source.text("test"), split_text("test"))
    assert torch.equal(task.text("test"), module_text("test"))
    assert values["loss"] != values["source_loss"]


def test_code_is_split_by_module_and_long_enough():
    names = [name for split in MODULES.values() for name in split]
    assert len(names) == len(set(names))
    assert len(module_text("train")) > 500_000
    assert min(len(module_text("validation")), len(module_text("test"))) > 60_000


def test_a_python_without_sources_is_named(monkeypatch):
    monkeypatch.setattr(adapt_code, "find_spec", lambda name: None)
    module_text.cache_clear()
    with pytest.raises(TaskError, match="has no source of its module fractions"):
        small_code().text("validation")


def test_gpt_names_the_data_it_lacks(data_folder):
    task = AdaptGPT(**SMALL, pretrain_steps=2)
    with pytest.raises(TaskError, match=f"no data for karpathy/tiny_shakespeare.*{data_folder}"):
        task.build(seeded(0))
    with pytest.raises(TaskError, match="no data for technical-english"):
        next(task.batches("train", seeded(0)))


def test_gpt_goes_from_shakespeare_to_english(data_folder):
    import pyarrow
    import pyarrow.parquet

    for folder, text in (
        ("karpathy/tiny_shakespeare", "to be or not "),
        ("technical-english", "we propose "),
    ):
        (data_folder / folder).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            table = pyarrow.table({"text": [text * 20]})
            pyarrow.parquet.write_table(table, data_folder / folder / f"{split}-00000.parquet")
    task = AdaptGPT(**SMALL, pretrain_steps=150)
    model = task.build(seeded(0)).eval()
    with torch.no_grad():
        values = task.evaluate(model, "test")
    assert values["source_loss"] < 2 < 3 < values["loss"]

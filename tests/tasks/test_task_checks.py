import pytest
import torch
from torch import nn

from weightlab.exceptions import TaskError, UsageError
from weightlab.tasks import Task, as_task


class Duck:
    name, metric, mode, batch_size = "duck", "loss", "min", 4

    def build(self, generator):
        return nn.Linear(1, 1)

    def batches(self, split, generator):
        yield torch.ones(self.batch_size, 1)

    def loss(self, model, batch):
        return model(batch).mean()

    def evaluate(self, model, split):
        return {"loss": 0.5}


class Proper(Duck, Task):
    pass


def complaint(candidate, **options):
    with pytest.raises(UsageError) as caught:
        as_task(candidate, "file.py:task", **options)
    text = str(caught.value)
    assert text.startswith("file.py:task")
    assert "\n" not in text
    return text


def with_attributes(**attributes):
    return type("Changed", (Duck,), attributes)()


def test_a_task_is_returned_itself():
    task = Proper()
    assert as_task(task, "file.py:task") is task


@pytest.mark.parametrize("candidate", [Duck(), Duck, lambda: Duck(), Proper, lambda: Proper()])
def test_whatever_can_serve_becomes_a_task(candidate):
    task = as_task(candidate, "file.py:task")
    assert isinstance(task, Task)
    assert (task.name, task.metric, task.mode, task.batch_size) == ("duck", "loss", "min", 4)
    model = task.build(torch.Generator())
    (batch,) = task.batches("train", torch.Generator())
    assert task.loss(model, batch).requires_grad
    assert task.evaluate(model, "test") == {"loss": 0.5}


def test_optional_facts_default_and_are_kept_where_given():
    bare = as_task(Duck(), "file.py:task")
    assert (bare.steps, bare.target, bare.minimal_effect, bare.description) == (200, None, 0.0, "")
    assert bare.fingerprint() == ""
    full = with_attributes(
        steps=7, target=0.25, minimal_effect=0.5, description="d", fingerprint=lambda self: "f"
    )
    task = as_task(full, "file.py:task")
    assert (task.steps, task.target, task.minimal_effect, task.description) == (7, 0.25, 0.5, "d")
    assert task.fingerprint() == "f"


def test_a_callable_object_with_a_tasks_attributes_is_the_task_itself():
    task = as_task(with_attributes(__call__=lambda self: pytest.fail("called")), "file.py:task")
    assert task.name == "duck"


def test_options_reach_the_maker_only():
    def make(batch_size):
        return with_attributes(batch_size=batch_size)

    assert as_task(make, "file.py:task", batch_size=9).batch_size == 9
    assert "takes no options (batch_size)" in complaint(Duck(), batch_size=9)
    assert "unexpected keyword argument 'width'" in complaint(make, width=9)


@pytest.mark.parametrize("missing", ["name", "metric", "mode", "batch_size", "build", "loss", "evaluate"])
def test_missing_attribute_is_named(missing):
    attributes = {key: value for key, value in vars(Duck).items() if key != missing and key[0] != "_"}
    text = complaint(type("Partial", (), attributes)())
    assert f"a Partial has no attribute {missing};" in text


def test_an_abstract_task_says_what_is_not_written():
    class Unfinished(Task):
        name, metric, mode, batch_size = "unfinished", "loss", "min", 4

    assert "abstract method" in complaint(Unfinished)
    assert "evaluate" in complaint(Unfinished)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("name", ""),
        ("name", 3),
        ("metric", None),
        ("mode", "lower"),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("batch_size", True),
        ("steps", -1),
        ("target", float("nan")),
        ("target", "low"),
        ("minimal_effect", -0.1),
        ("minimal_effect", float("inf")),
        ("description", None),
    ],
)
def test_impossible_facts_are_named_with_their_value(attribute, value):
    text = complaint(with_attributes(**{attribute: value}))
    assert f": {attribute} must be " in text
    assert repr(value) in text


def test_methods_must_be_callable_in_the_agreed_form():
    assert "build must be a method, build(generator)" in complaint(with_attributes(build=3))
    text = complaint(with_attributes(batches=lambda self, split: []))
    assert "batches(split) must be callable as batches(split, generator)" in text
    as_task(with_attributes(loss=lambda self, model, batch, scale=1.0: batch), "file.py:task")


def test_errors_of_a_maker():
    def broken():
        raise ValueError("no disk\nand more")

    def without_data():
        raise TaskError("no data")

    assert complaint(broken).endswith("ValueError: no disk")
    with pytest.raises(TaskError, match=r"^no data$"):
        as_task(without_data, "file.py:task")

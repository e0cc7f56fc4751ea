import os

import pytest
import torch
from safetensors.torch import save_file

from weightlab.exceptions import TaskError, UsageError
from weightlab.tasks import Cifar10ResNet
from weightlab.tasks.models import ResNet, load_pretrained_resnet

real_data = pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("WEIGHTLAB_DATA", ""), "akamaster")),
    reason="WEIGHTLAB_DATA with akamaster/* and uoft-cs/cifar10 is not set",
)


def write_checkpoint(path, depth=14, classes=7):
    torch.manual_seed(0)
    model = ResNet(depth, classes).train()
    with torch.no_grad():
        model(torch.rand(4, 3, 32, 32))
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    save_file(state, path)
    return model.eval()


def test_a_checkpoint_comes_back_by_id_name_folder_and_file(data_folder):
    path = data_folder / "akamaster/resnet14-cifar10/model.safetensors"
    original = write_checkpoint(path)
    x = torch.rand(2, 3, 32, 32)
    for source in ("resnet14", "akamaster/resnet14-cifar10", path, str(path), path.parent):
        model = load_pretrained_resnet(source)
        assert not model.training
        assert torch.equal(model(x), original(x))
        assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_loading_draws_nothing(data_folder):
    path = data_folder / "model.safetensors"
    write_checkpoint(path)
    state = torch.get_rng_state()
    load_pretrained_resnet(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_unusable_checkpoints_are_named(data_folder):
    with pytest.raises(UsageError, match="'resnet' is no checkpoint"):
        load_pretrained_resnet("resnet")
    with pytest.raises(TaskError, match="no data for akamaster/resnet20-cifar10"):
        load_pretrained_resnet("resnet20")
    path = data_folder / "model.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(TaskError, match=r"cannot read .*model\.safetensors"):
        load_pretrained_resnet(path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(TaskError, match=r"model\.safetensors does not hold a CIFAR ResNet"):
        load_pretrained_resnet(path)
    with pytest.raises(TaskError, match=r"cannot read .*nowhere\.safetensors"):
        load_pretrained_resnet(data_folder / "nowhere.safetensors")


@real_data
@pytest.mark.parametrize(("name", "error"), [("resnet20", 0.1915), ("resnet32", 0.17), ("resnet56", 0.1625)])
def test_published_checkpoints_have_their_known_error_on_the_local_copy(name, error):
    with torch.no_grad():
        assert (
            Cifar10ResNet(eval_images=2000).evaluate(load_pretrained_resnet(name), "test")["error"] == error
        )

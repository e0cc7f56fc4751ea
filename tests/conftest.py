import pytest


@pytest.fixture(autouse=True)
def compiled_code_of_other_tests_is_forgotten(request):
    """Compilation stops at a number of variants of one function that a process shares between its tests."""
    if "compile" in request.node.name:
        import torch

        torch.compiler.reset()

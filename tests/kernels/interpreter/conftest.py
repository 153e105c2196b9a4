"""The interpreter of Triton, repaired (tests/interpreted.py); these tests run in a process of their own."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":  # see tests/kernels/test_interpreter.py
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.interpreted import repair

    repair()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)

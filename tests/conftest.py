"""Fixtures that several test files use."""

import numpy as np
import pytest
import torch

from data.shakespeare_char import prepare
from train import TrainConfig

torch.set_num_threads(1)  # for sizes this small more threads only wait for each other


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A small text with some structure: 5,000 characters, 28 different ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(2, 7))) for _ in range(40)]
    text = "".join(f"{rng.choice(words)} " if i % 9 else "\n" for i in range(1500))[:5000]
    (folder / "text.txt").write_bytes(text.encode())
    prepare.main(["--input", str(folder / "text.txt"), "--out", str(folder / "set")])
    return folder / "set"


@pytest.fixture
def tiny(dataset, tmp_path):
    """Options of a run that takes a fraction of a second."""
    return TrainConfig(
        out_dir=str(tmp_path / "run"), dataset=str(dataset), device="cpu", block_size=16, batch_size=4, n_layer=2,
        n_head=2, n_embd=16, predictor_hidden=4, max_iters=6, eval_interval=3, warmup_iters=2, dropout=0.1,
    )  # fmt: skip

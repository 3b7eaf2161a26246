"""Settings and fixtures for all tests."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# The tensors are tiny: waking a second thread costs more than it computes.
torch.set_num_threads(1)

# Libraries read these when they are imported, so the fixtures import them late. No test needs the network, and
# none may wait for it; a build server may ask for colours, but what the tests compare is plain text.
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True)
def forget_what_is_inferred() -> Iterator[None]:
    """No test depends on which families another one has inferred."""
    yield
    from modegpt import inference
    from modegpt.modeling import FAMILIES

    inference._INFERRED.clear()
    for name in [name for name, family in FAMILIES.items() if family.inferred]:
        del FAMILIES[name]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of about 3,800 tokens."""
    from helpers import random_text

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(random_text(200, seed=0))
    return path


@pytest.fixture(scope="session")
def other_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation text of about 1,100 tokens, unlike :func:`text_file`."""
    from helpers import random_text

    path = tmp_path_factory.mktemp("text") / "evaluation.txt"
    path.write_text(random_text(60, seed=1))
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A random dense Llama of three layers with its tokenizer, as a Hugging Face directory. Not to be changed."""
    from helpers import tiny_llama, tiny_tokenizer

    directory = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer(text_file.read_text())
    model = tiny_llama(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str], Path]:
    """Makes a row's stock checkpoint with a tokenizer, as a Hugging Face directory. Not to be changed."""
    from family_table import BY_NAME
    from helpers import tiny_tokenizer

    tokenizer, scratch = tiny_tokenizer(text_file.read_text()), tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        if not (scratch / name).exists():
            BY_NAME[name].build(vocab_size=len(tokenizer) + 8).save_pretrained(scratch / name)
            tokenizer.save_pretrained(scratch / name)
        return scratch / name

    return make


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of :func:`tiny_checkpoint` that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))

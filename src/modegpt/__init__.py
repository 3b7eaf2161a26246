"""modegpt: make Hugging Face causal language models smaller without training."""

from .api import compress
from .checkpoint import load, save
from .config import CompressionConfig, RunConfig
from .data import TokenWindows
from .errors import CheckpointError, InvalidRequest, ModeGPTError, NumericalError
from .evaluation import generate_text, perplexity
from .hub import push_to_hub
from .pipeline import compress_to_directory
from .report import CompressionReport

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompressionConfig",
    "CompressionReport",
    "InvalidRequest",
    "ModeGPTError",
    "NumericalError",
    "RunConfig",
    "TokenWindows",
    "compress",
    "compress_to_directory",
    "generate_text",
    "load",
    "perplexity",
    "push_to_hub",
    "save",
]

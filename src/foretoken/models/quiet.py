"""Keeps the libraries that load models from writing to a terminal that is not theirs."""

from __future__ import annotations

import logging

from transformers.utils import logging as transformers_logging


def silence_libraries() -> None:
    """Turn off log lines and progress bars of transformers and of the hub client.

    For the command line only: a library does not change the settings of a process it is a
    guest of. What goes wrong still arrives as an exception.
    """
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


__all__ = ["silence_libraries"]

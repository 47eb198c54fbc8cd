"""Imports the code of transformers that imports torchao, and keeps back what torchao logs while it is imported.

torchao tries libraries built for other machines and warns of each that does not load. Levels of loggers are put back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Keeps these loggers to errors."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


with only_errors(*LOGGERS):
    import transformers.modeling_utils  # noqa: F401

"""`lazyllm lm-eval`: lm-eval's own command line, where `--model lazyllm` is known."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from lazyllm.errors import InputError
from lazyllm.extras import installed_by


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Runs lm-eval's command line with `arguments`, after registering the model `lazyllm`.

    lm-eval 0.4.13 finds models of other packages only once they are imported, which its own command does not do.

    Raises:
        InputError: when lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError(f"the command lm-eval needs lm-eval, which is not installed: {installed_by('lm-eval')}")
    from lm_eval.__main__ import cli_evaluate

    import lazyllm.evaluation.harness  # noqa: F401  # registers the model

    own = sys.argv
    sys.argv = ["lm-eval", *arguments]  # which is all it reads
    try:
        cli_evaluate()
    finally:
        sys.argv = own

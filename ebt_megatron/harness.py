"""lm-evaluation-harness with runs as models: `ebt-lm-eval --model ebt --model_args run=RUN_DIR,steps=4 --tasks ...`.

Everything else is `lm_eval`'s own command line; it has no way to find models of other packages by itself.
"""

from __future__ import annotations

import os
import sys

from ebt_megatron.core.cli import guarded, quiet_libraries
from ebt_megatron.core.errors import RecipeError


def main() -> None:
    """Run lm_eval's command line; under torchrun the first rank alone prints."""

    def work() -> None:
        quiet_libraries()
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise RecipeError(f"lm-evaluation-harness is not installed ({error}): "
                              "pip install 'ebt-megatron[lm-eval]'") from None  # fmt: skip
        from ebt_megatron.inference import lm_eval_adapter  # noqa: F401, registers the model

        if os.environ.get("RANK", "0") != "0":
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end
        cli_evaluate()

    guarded(work)


if __name__ == "__main__":
    main()

"""Text's suite and report, as `Task.evaluation` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebt_megatron.evaluation.interface import Evaluation, SuiteOptions
from ebt_megatron.evaluation.report import write_report
from ebt_megatron.evaluation.suite import evaluate_suite
from ebt_megatron.evaluation.tables import Table, suite_tables

NEXT_STEPS = """\
# your own text (txt, HTML, JSONL, Parquet; also .gz and .zst)
ebt-prepare text --input 'corpus/**/*.jsonl.zst' --tokenizer EleutherAI/gpt-neox-20b --output data/text
# the paper's S1 recipe at its xxs size on 8 GPUs, tensor parallel 2
torchrun --nproc-per-node 8 -m ebt_megatron.train text/s1_xxs parallel.tensor=2
# think longer than in training
ebt-evaluate runs/ebt-s1-xxs --steps 8
# every key a recipe may have
ebt-train --help"""


class TextEvaluation(Evaluation):
    """Starts, energies, uncertainty and shifts, beside Transformer++."""

    def suite(self, run_dir: Path, overrides: Sequence[str], options: SuiteOptions) -> dict[str, Any]:
        """See `Evaluation`."""
        return evaluate_suite(run_dir, overrides, options)

    def tables(self, numbers: dict[str, Any]) -> list[Table]:
        """See `Evaluation`."""
        return suite_tables(numbers)

    def report(
        self, runs: Mapping[str, Path] | Sequence[Path], output: Path, title: str, next_steps: str
    ) -> dict[str, Path]:
        """See `Evaluation`."""
        return write_report(runs, output, title, next_steps or NEXT_STEPS)

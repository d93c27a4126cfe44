"""The checkpoints of the lowest validation losses, beside those that a run goes on from."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

from ebt_megatron.checkpoint.checkpoints import Checkpoints
from ebt_megatron.checkpoint.history import BEST, losses_of
from ebt_megatron.core.files import write_whole
from ebt_megatron.training.loop import Hook, Moment


class KeepingBest(Hook):
    """Keeps training.keep_best checkpoints in OUTPUT_DIR/best, and their losses in best/losses.json."""

    checkpoints: Checkpoints | None = None

    def begin(self) -> None:
        """Those of later steps than the run goes on from are of another history."""
        run = self.run
        if run.recipe.training.keep_best:
            self.checkpoints = Checkpoints(run.folder / BEST, 0, run.session.identity, report=run.warn)
            self.checkpoints.go_on_from(run.step)
            self._consider(run.unwritten)  # a run may have been ended between saving a step and validating it

    def after_step(self, moment: Moment) -> None:
        """Save a step whose validation loss is among the lowest; of one too many, that of the highest goes."""
        self._consider(moment.row)

    def _consider(self, row: dict[str, Any] | None) -> None:
        run, loss = self.run, (row or {}).get("validation_loss")
        if self.checkpoints is None or loss is None or not math.isfinite(loss) or run.bad.in_a_row:
            return
        known = run.on_main(lambda: losses_of(run.folder / BEST))
        if len(known) >= run.recipe.training.keep_best and loss >= max(known.values()):
            return
        error = run.write_checkpoint(row, self.checkpoints)
        run.report_unsaved(error)
        if not error:
            run.on_main(lambda: self._keep(known, loss))

    def _keep(self, known: dict[str, float], loss: float) -> None:
        folder = self.run.folder / BEST
        known[f"step-{self.run.step:08d}"] = loss
        lowest = sorted(known, key=lambda name: (known[name], name))[: self.run.recipe.training.keep_best]
        write_whole(folder / "losses.json", json.dumps({name: known[name] for name in lowest}, indent=1) + "\n")
        for name in set(known) - set(lowest):
            shutil.rmtree(folder / name, ignore_errors=True)

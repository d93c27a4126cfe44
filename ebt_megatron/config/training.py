"""The loop, its optimizer, and how both are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ebt_megatron.config.fields import at_least, fraction, one_of, path, positive, some_of, within
from ebt_megatron.core.errors import RecipeError


@dataclass
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then cosine to min_lr_ratio * lr."""

    lr: float | None = positive(None)  # default: the model size's
    min_lr_ratio: float = within(0, 1, 0.1, "between 0 and 1")  # the schedule ends at this times lr
    warmup_steps: int = at_least(0, 10000)  # steps in which the rate rises from 0 to lr
    # default: training.steps; a run made longer keeps its schedule with the old number
    decay_steps: int | None = at_least(1, None)
    weight_decay: float = at_least(0, 0.01)  # decoupled, as AdamW
    # all: of norms and biases, too, as the public code; the step size never decays
    weight_decay_on: str = one_of("matrices", "all", default="matrices")
    beta1: float = fraction(0.9)  # decay of the mean gradient
    beta2: float = fraction(0.999)  # decay of the mean squared gradient
    epsilon: float = positive(1e-8)  # added to Adam's denominator
    clip_grad: float = at_least(0, 1.0)  # the largest norm of the gradient; 0: not clipped
    # > 0: an exponential moving average of the weights, which validation and every command use
    ema_decay: float = fraction(0.0)


@dataclass
class ParallelConfig:
    """How the model and the batch are split; data parallelism takes the ranks that are left."""

    tensor: int = positive(1)  # ranks that share each layer
    pipeline: int = positive(1)  # stages that share the layers
    sequence_parallel: bool = False  # norms and residuals split the sequence over the tensor ranks
    distributed_optimizer: bool = False  # optimizer state is split over the data-parallel ranks
    micro_batches_in_flight: int | None = at_least(1, None)  # pipeline: bounds memory; default: five times the stages
    timeout_seconds: float = positive(600.0)  # a collective that takes longer is reported as a hang

    def check(self) -> None:
        """Raise RecipeError where there is no tensor parallelism to split the sequence by."""
        if self.sequence_parallel and self.tensor == 1:
            raise RecipeError("parallel.sequence_parallel=true needs parallel.tensor > 1")


@dataclass
class TrainingConfig:
    """The part of a recipe that says how the loop runs."""

    steps: int = positive(1000)  # optimizer steps
    global_batch_size: int = positive(64)  # fresh samples per optimizer step, over all ranks
    micro_batch_size: int = positive(8)  # samples per forward on one rank
    cuda_graphs: bool = False  # launch a micro-batch as one recorded graph: for small models on one GPU each
    # fp8: bf16, with the layers' matrix products in 8 bits
    precision: str = one_of("fp32", "bf16", "fp8", default="fp32")
    seed: int = within(0, (1 << 62) - 1, 1234, "at least 0 and less than 2^62")  # of weights, order, noise and draws
    output_dir: str = path("runs/run")  # the run's folder
    # go on from the newest good checkpoint in output_dir; false: move what is there aside first (not after a restart)
    resume: bool = True
    # a run, an exported model or a Llama of transformers whose weights a new run begins with: a Transformer++'s go into
    # the context stream and its output
    start_from: str | None = path(None)
    log_interval: int = positive(10)  # steps from one line of metrics to the next
    # the report reads jsonl
    metrics: list[str] = some_of("jsonl", "tensorboard", "wandb", default=["jsonl", "tensorboard"])
    validation_interval: int = at_least(0, 200)  # 0: never
    validation_samples: int = 256  # held-out samples that are looked at
    save_interval: int = at_least(0, 200)  # 0: only at the end and on SIGTERM
    # the newest so many; 0: all
    keep_checkpoints: int = within(0, 1 << 30, 2, "a number of checkpoints, or 0 for all")
    # those of the lowest validation losses, beside the newest, in OUTPUT_DIR/best; 0: none
    keep_best: int = within(0, 1 << 30, 0, "a number of checkpoints, or 0 for none")
    async_save: bool = False  # training goes on while a checkpoint is written
    max_bad_steps: int = at_least(1, 10)  # non-finite steps in a row before the run stops
    spike_factor: float = at_least(0, 0.0)  # > 0: rewind when the loss exceeds this times its running mean
    spike_window: int = at_least(1, 100)  # steps of that running mean
    peak_tflops: float = at_least(0, 0.0)  # per rank; > 0: metrics report model FLOPs utilisation against it
    profile_steps: int = at_least(0, 0)  # > 0: write a torch profiler trace of that many steps

    def check(self) -> None:
        """Raise RecipeError where the best checkpoints are to be kept and nothing says which they are."""
        if self.keep_best and not self.validation_interval:
            raise RecipeError(
                f"training.keep_best={self.keep_best} goes by validation losses, and training.validation_interval=0 "
                "makes none: set an interval, or training.keep_best=0"
            )

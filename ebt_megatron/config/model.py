"""What the network is."""

from __future__ import annotations

from dataclasses import dataclass

from ebt_megatron.config.fields import one_of, positive, require_divides
from ebt_megatron.core.errors import RecipeError

# layers, heads, width, learning rate: arXiv 2507.02092, except `tiny` (ours, for the quickstart).
MODEL_SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (2, 2, 96, 3e-3),
    "4xs": (2, 2, 128, 2.4e-3),
    "3xs": (4, 4, 256, 1.8e-3),
    "xxs": (6, 6, 384, 1.2e-3),
    "xs": (12, 6, 384, 9e-4),
    "small": (12, 12, 768, 6e-4),
    "medium": (24, 16, 1024, 3e-4),
    "large": (24, 16, 1536, 2.5e-4),
    "xl": (24, 32, 2048, 2e-4),
}


@dataclass
class ModelConfig:
    """What the network is."""

    # baseline: Transformer++; of images a DiT; of puzzles by puzzles.passes
    architecture: str = one_of("ebt", "baseline", default="ebt")
    size: str | None = None  # a name of MODEL_SIZES; explicit fields below win over it
    num_layers: int | None = positive(None)  # layers; default: the size's
    num_attention_heads: int | None = positive(None)  # query heads; default: the size's
    num_query_groups: int | None = positive(None)  # grouped-query attention; default: num_attention_heads
    hidden_size: int | None = positive(None)  # width; default: the size's
    ffn_hidden_size: int | None = positive(None)  # default: hidden_size (multiplier 1, as the paper)
    # how the step index enters
    conditioning: str = one_of(
        "none", "time_embed", "time_embed_sequence", "adaln", "adaln_zero", "adaln_sequence", default="time_embed"
    )
    # unit_logits: the first step's logits have a deviation of about 1 at any vocabulary and width | paper: embeddings
    # N(0, 1), the prediction's Xavier; with step_size=500
    initialization: str = one_of("unit_logits", "paper", default="unit_logits")
    # linear: <w, n> of the last hidden state, normalised (the paper's) | quadratic: and 1/2 sum_i q_i h_i^2 of the
    # hidden state itself, whose gradient reads it out as a Transformer's output does (docs/learning.md)
    energy_head: str = one_of("linear", "quadratic", default="linear")
    norm_epsilon: float = 1e-5  # added to the mean square by RMSNorm
    rotary_base: float = 10000.0  # of the angles of rotary positions
    vocab_multiple: int = positive(128)  # the vocabulary is padded to a multiple of this
    kernels: str = one_of("auto", "reference", "torch", "triton", default="auto")  # auto: triton on CUDA, else torch
    recompute_layers: bool = False  # recompute context activations in the backward pass

    def resolve(self) -> float | None:
        """Fill in what the size implies; returns its learning rate, if there is a size.

        Raises:
            RecipeError: for a size there is not, or sizes that are missing.
        """
        lr = None
        if self.size is not None:
            if self.size not in MODEL_SIZES:
                raise RecipeError(f"model.size={self.size}: choose one of {', '.join(MODEL_SIZES)}")
            layers, heads, width, lr = MODEL_SIZES[self.size]
            self.num_layers = self.num_layers or layers
            self.num_attention_heads = self.num_attention_heads or heads
            self.hidden_size = self.hidden_size or width
        for key in ("num_layers", "num_attention_heads", "hidden_size"):
            if not getattr(self, key):
                raise RecipeError(f"model.{key} is not set: give it, or model.size")
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        self.ffn_hidden_size = self.ffn_hidden_size or self.hidden_size  # multiplier 1, as the paper
        return lr

    def check(self) -> None:
        """Raise RecipeError unless sizes divide as the layers need."""
        assert self.hidden_size and self.num_attention_heads and self.num_query_groups and self.ffn_hidden_size
        heads = self.num_attention_heads
        require_divides("model.hidden_size", self.hidden_size, "model.num_attention_heads", heads, "change either")
        require_divides(
            "model.num_attention_heads",
            heads,
            "model.num_query_groups",
            self.num_query_groups,
            "every query group needs as many heads",
        )
        require_divides(
            "model.ffn_hidden_size",
            self.ffn_hidden_size,
            "model.num_attention_heads",
            heads,
            "gate and up weights are interleaved in one block per head",
        )
        if (self.hidden_size // heads) % 2:
            raise RecipeError(
                f"model.hidden_size/num_attention_heads={self.hidden_size // heads}: "
                "rotary positions need an even head size"
            )

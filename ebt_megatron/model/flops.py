"""Floating-point operations of a training step, and weights, counted from the sizes (one multiply-add is two).

Unit of the design: C, one forward pass of the layers over the S tokens of a sample. A
linear layer's backward pass is 2 C (gradients of input and of weight). With n steps:

    Transformer++      3 C                    forward 1, backward 2
    dual stream        3 C + n (2 + 6) C      propose: forward 1, input gradients 1;
                                              learn: value and tangent, forward 2, backward 4
    reuse              3 C + n (2 + 4) C      learn takes the values' activations and the tangents'
                                              input gradients from propose
    learned_steps = k  3 C + m 2 C + k (2 + 4) C, where thinking ends with the last of the k drawn steps, the m-th:
                       n = 2, k = 1 with reuse: 9 C or 11 C, 10 C in the mean instead of 15 C
    public code        12 n C                 context and prediction concatenated: forward 2,
                                              backward to y 2, and twice that again backward through both
"""

from __future__ import annotations

from dataclasses import dataclass

from ebt_megatron.config import Recipe


@dataclass(frozen=True)
class Cost:
    """FLOPs per sample of each part.

    Attributes:
        layers: C, the linear layers and attention of one forward pass of S positions.
        vocabulary: U, one product of S x D with D x V (of latents: with the channels of a position).
        context: one forward pass of the context stream; None: as `layers`.
        distribution: whether predictions are logits over V, which are embedded and stepped by products with a table,
            and divided over tensor-parallel ranks; False: values that one linear map embeds.
        width: numbers that are stored of one position's prediction.
        parameters: weights of the whole model, in layers and tables; without biases and norms.
    """

    layers: float
    vocabulary: float
    context: float | None = None
    distribution: bool = True
    width: int = 0
    parameters: float = 0.0

    @property
    def _context(self) -> float:
        """Forward, and backward."""
        return 3 * (self.layers if self.context is None else self.context)

    def transformer(self) -> float:
        """One training step of Transformer++: the output projection forward and backward is 3 U."""
        return 3 * self.layers + 3 * self.vocabulary

    def dual_stream(self, steps: int, learned_steps: int, products: int, reuse: bool = False) -> float:
        """One training step of an EBT whose predictions are detached between steps.

        Args:
            steps, learned_steps: of thinking, and those of them that are learned from.
            products: over the vocabulary, in units of U (`ebt_megatron.objectives.flops.vocabulary_products`).
            reuse: as `thinking.reuse`.
        """
        layers = 2 * steps + (4 if reuse else 6) * learned_steps
        return self._context + layers * self.layers + products * self.vocabulary

    def inference(self, steps: int = 0, from_context: bool = False) -> float:
        """One pass over a sample without learning: Transformer++ with 0 steps, an EBT with n.

        In units of U: Transformer++'s output 1, and that of an EBT that starts at its context's prediction; each step
        embeds the prediction 1 and takes its gradient 1.
        """
        output = int(from_context or not steps)
        return (1 + 2 * steps) * self.layers + (2 * steps + output) * self.vocabulary

    def double_backward(self, steps: int) -> float:
        """The public code's way; through the vocabulary forward 1, to y 1, and back through both 4."""
        context = self.layers if self.context is None else self.context
        return 6 * steps * (self.layers + context + self.vocabulary)


def padded(vocab_size: int, multiple: int) -> int:
    """The vocabulary's size in the tables: the same for every tensor-parallel size that divides `multiple`."""
    return -(-vocab_size // multiple) * multiple


def _ends(recipe: Recipe, distribution: bool) -> int:
    """Tables or maps of what is predicted: that of the input, and another of predictions or of the output.

    An EBT embeds observed and predicted values with one map, and its output is an energy, and one on its context where
    thinking starts at what that says.
    """
    ebt = recipe.model.architecture == "ebt"
    return (2 if distribution or not ebt else 1) + (ebt and recipe.thinking.starts_at_context)


def cost(recipe: Recipe, vocab_size: int, block: int = 1, distribution: bool = True) -> Cost:
    """What the parts of a causal model cost for one sample.

    Args:
        recipe: a resolved recipe.
        vocab_size: numbers predicted at a position: V, or the channels of a latent.
        block: positions for each one of data.sequence_length; they see each other.
        distribution: as in `Cost`.
    """
    m, length = recipe.model, block * recipe.data.sequence_length
    assert m.hidden_size and m.num_layers
    visible = (length + block) / 2
    width = padded(vocab_size, m.vocab_multiple) if distribution else vocab_size
    return Cost(
        length * position_flops(recipe, visible),
        2 * length * m.hidden_size * vocab_size,
        distribution=distribution,
        width=width,
        parameters=m.num_layers * layer_weights(recipe) + _ends(recipe, distribution) * width * m.hidden_size,
    )


def layer_weights(recipe: Recipe) -> int:
    """Of a causal layer's linear maps: queries, keys, values, output, and a gated feed-forward network."""
    m = recipe.model
    assert m.hidden_size and m.num_attention_heads and m.num_query_groups and m.ffn_hidden_size
    head = m.hidden_size // m.num_attention_heads
    qkv = m.hidden_size * head * (m.num_attention_heads + 2 * m.num_query_groups)
    return qkv + m.hidden_size**2 + 3 * m.hidden_size * m.ffn_hidden_size


def position_flops(recipe: Recipe, visible: float) -> float:
    """FLOPs of one forward pass of the layers at one position that sees `visible` keys."""
    m = recipe.model
    assert m.hidden_size and m.num_layers
    attention = 2 * m.hidden_size * visible  # scores and their product with the values
    return 2 * m.num_layers * (layer_weights(recipe) + attention)


def joint_cost(recipe: Recipe, channels: int) -> Cost:
    """What the parts of a bidirectional model (`ebt_megatron.model.joint`) cost for one sample.

    Args:
        recipe: a resolved recipe.
        channels: of a patch.
    """
    m, length = recipe.model, recipe.data.sequence_length
    assert m.hidden_size and m.ffn_hidden_size and m.num_layers
    linear = 4 * m.hidden_size**2 + 2 * m.hidden_size * m.ffn_hidden_size
    attention = 2 * m.hidden_size * length
    modulations = 6 * m.hidden_size**2
    return Cost(
        2 * m.num_layers * length * (linear + attention),
        2 * length * m.hidden_size * channels,
        context=2 * m.num_layers * modulations,
        distribution=False,
        width=channels,
        parameters=m.num_layers * (linear + modulations) + _ends(recipe, False) * channels * m.hidden_size,
    )

# %% [markdown]
# # A trained model in Python
#
# Cells of a notebook (editors open this file as one), and a script: `python -m examples.api runs/quickstart/context`.
# %% A run, a folder of `ebt-convert export`, or USER/MODEL on the Hub
"""The library's API on a model of text, cell by cell."""

import sys

import ebt_megatron as ebt

model = ebt.load(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/context")
print(model)

# %% Continue a text, thinking longer than it was trained to
found = model.generate("Return the", steps=8, max_tokens=20, temperature=0)
print(repr(found.text), found.finish)

# %% Several at once; the same seed gives the same text
for found in model.generate(["Return the", "Raise an"], max_tokens=10, seed=1, top_p=0.95):
    print(repr(found.text))

# %% Token by token, with each prediction's energy and the steps it took
for piece in model.stream("Return the", max_tokens=8, temperature=0, energy_tolerance=0.01, steps=16):
    print(f"{piece.text!r:<14} log p {piece.log_p:.2f}  energy {piece.energy:.3f}  {piece.steps} steps")

# %% How likely a text is, and which token the model finds hard
scored = model.score("Return the value of the item.")
print(f"{scored.total:.2f} nats;", max(zip(scored.energies, scored.pieces, strict=True)))

# %% What the model makes of the next token, from the start on
for thought in model.think("Return the value", steps=4, top=3):
    print(thought.step, f"energy {thought.energy:.3f}", [(token, round(p, 3)) for token, p in thought.top])

# %% Continuations weighed by the energy itself
for continuation in (" value", " of"):
    energies = model.energy("Return the", continuation)
    print(repr(continuation), f"{sum(energies) / len(energies):.3f}")

# %% What a model cannot do is one line
try:
    model.generate("Return the", candidates=4)
except ebt.RecipeError as error:
    print(error)

"""The report of the puzzles quickstart: curves of what a suite says, and a puzzle that fills in."""

import io

from PIL import Image

from examples import puzzles


def suite(steps):
    rows = [{"steps": n, "solved": n / 10, "flops": 1e6 * n} for n in steps]
    return {split: {"steps": rows} for split in puzzles.SPLITS}


def test_curves_have_every_model():
    figure = puzzles.curves({"EBT": suite((1, 2, 4)), "feed-forward": suite((1,))})
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 3, 2]  # with the trained number of steps
    assert list(figure.axes[2].get_lines()[0].get_xdata()) == [1e6, 2e6, 4e6]


def test_a_puzzle_fills_in():
    cells = puzzles.SIDE**2
    clues = [1] + [0] * (cells - 1)
    wrong, right = [2] * cells, [3] * cells
    followed = {
        "clues": clues,
        "answer": right,
        "grids": [wrong, right],
        "probabilities": [[0.5] * cells, [1.0] * cells],
        "energies": [-1.0, -2.0],
    }
    question, first = puzzles.filling_in(followed, 0), puzzles.filling_in(followed, 1)
    assert len(question.axes[0].texts) == 1 and len(first.axes[0].texts) == cells
    assert {text.get_color() for text in first.axes[0].texts[1:]} == {"red"}
    assert Image.open(io.BytesIO(puzzles.moving(followed))).n_frames == 3

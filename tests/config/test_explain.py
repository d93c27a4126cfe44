"""Every key has a line that says what it means, and the reference page has them all."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebt_megatron.config import RecipeError, all_keys
from ebt_megatron.config.explain import comments_of, explain, explain_all, reference
from ebt_megatron.train import app


def test_no_key_lacks_a_line():
    every = list(explain_all())
    assert [e.key for e in every] == all_keys()
    assert not [e.key for e in every if len(e.meaning) < 5]


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "reference.md"
    assert page.read_text() == reference(), "python -m ebt_megatron.config.explain > docs/reference.md"


def test_comments_above_and_beside_are_a_fields_and_no_others():
    meant = comments_of(_Fields)
    assert meant == {"a": "above a, two lines beside a", "b": "", "c": "inside c"}


class _Fields:
    # above a,
    # two lines
    a: int = 1  # beside a
    b: int = 2
    c: str = str(
        3  # inside c
    )


def test_a_key_is_explained_by_the_command():
    done = CliRunner().invoke(app, ["--explain", "thinking.step_rule"])
    assert done.exit_code == 0, done.output
    assert "thinking.step_rule: str, default probability_descent" in done.output
    assert (
        "one of probability_descent, logit_descent" in done.output and "kernels/" not in done.output.split("read in")[0]
    )
    assert "prediction/logits_state.py" in done.output
    assert len(explain("optimizer").splitlines()) == sum(k.startswith("optimizer.") for k in all_keys())
    assert len(explain("all").splitlines()) == len(all_keys())


@pytest.mark.parametrize(
    ("given", "hint"), [("step_rule", "did you mean thinking.step_rule"), ("qqq", "--explain all")]
)
def test_an_unknown_key_gives_its_like(given, hint):
    with pytest.raises(RecipeError, match=hint):
        explain(given)
    done = CliRunner().invoke(app, ["--explain", given])
    assert done.exit_code == 2 and "there is no such key" in done.stderr

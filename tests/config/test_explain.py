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


def test_help_has_a_line_for_each_key_and_tab_completes_them():
    said = CliRunner().invoke(app, ["--help"]).output
    assert set(explain("all").splitlines()) <= {line.strip() for line in said.splitlines()}
    words = {
        "COMP_WORDS": "ebt-train text/s1_xxs thinking.st",
        "COMP_CWORD": "2",
        "_EBT_TRAIN_COMPLETE": "complete_bash",
    }
    keys = CliRunner().invoke(app, prog_name="ebt-train", env=words).output.split()
    assert keys == [f"{key}=" for key in all_keys() if key.startswith("thinking.st")]
    recipes = CliRunner().invoke(
        app, prog_name="ebt-train", env=words | {"COMP_CWORD": "1", "COMP_WORDS": "ebt-train text/s1"}
    )
    assert recipes.output.split() == ["text/s1_xl", "text/s1_xxs"]


@pytest.mark.parametrize(
    ("given", "hint"), [("step_rule", "did you mean thinking.step_rule"), ("qqq", "--explain all")]
)
def test_an_unknown_key_gives_its_like(given, hint):
    with pytest.raises(RecipeError, match=hint):
        explain(given)
    done = CliRunner().invoke(app, ["--explain", given])
    assert done.exit_code == 2 and "there is no such key" in done.stderr

"""How the quickstarts show what they run."""

from examples.steps import shown


def test_a_very_long_command_is_shown_by_both_ends():
    words = [f"w{i}" for i in range(200)]
    text = shown(words)
    assert text.startswith("w0 w1 ") and text.endswith(" w198 w199") and "[152 words more]" in text
    assert shown(words[:49]) == " ".join(words[:49])

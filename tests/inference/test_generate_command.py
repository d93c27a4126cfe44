"""`ebt-generate` on a run directory, and what it says to bad input before any work."""

import json
import os
import re
import shutil

import pytest
from typer.testing import CliRunner

from ebt_megatron import generate
from ebt_megatron.parallel import setup
from tests import builders
from tests.training.runs import DOCUMENTS, recipe_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An EBT and a Transformer++, each trained for a step."""
    from ebt_megatron.training.hooks import train_to_end
    from ebt_megatron.training.run import Run

    folder = tmp_path_factory.mktemp("runs")
    data = builders.text_shards(folder, DOCUMENTS, 10, 500)
    for architecture in ("ebt", "baseline"):
        setup.shutdown()
        overrides = f"model.architecture={architecture}", "training.steps=1", "training.async_save=false"
        train_to_end(Run(recipe_of(data, folder / architecture, *overrides)))
    setup.shutdown()
    return folder


def call(*arguments, stdin=None):
    return CliRunner().invoke(generate.app, [str(a) for a in arguments], input=stdin)


@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
def test_json_lines_of_prompts_from_a_file(architecture, runs, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.write_text('Document 3\n{"prompt": "says word5"}\n"word"\n')
    thinking = ("--steps", 4, "--candidates", 2, "--langevin-noise", 0.3) if architecture == "ebt" else ()
    done = call(runs / architecture, "--prompts", prompts, "--max-tokens", 5, "--output", "-", *thinking)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["Document 3", "says word5", "word"]
    for row in rows:
        assert len(row["tokens"]) == len(row["log_p"]) == len(row["energies"]) <= 5 and row["flops"] > 0
        steps, has_energy = (4, True) if architecture == "ebt" else (0, False)
        assert set(row["steps"]) == {steps} and all((e is not None) == has_energy for e in row["energies"])


def test_streaming_shows_tokens_energies_and_steps_and_the_window_once(runs):
    done = call(
        runs / "ebt",
        "--prompts",
        "-",
        "--max-tokens",
        4,
        "--stream",
        stdin="Document 4 says word 8 word 3\nword8 word3\n",
    )
    assert done.exit_code == 0, done.output
    assert done.stderr.count("the run was trained with 10: a token is predicted from the last 10 alone") == 1
    lines = [line for line in done.stderr.splitlines() if " energy " in line and line.endswith("  2 steps")]
    assert 2 < len(lines) <= 8
    assert len(done.stdout.splitlines()) >= 2 and done.stdout.startswith("Document 4 says word 8 word 3")
    alone = call(runs / "ebt", "--prompt", "Document 4 says word 8 word 3", "--max-tokens", 4).stdout
    assert done.stdout.startswith(alone)


def test_a_run_directory_is_all_it_takes(runs, tmp_path):
    shutil.copytree(runs / "ebt", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(re.sub(r"- .*/(train|validation)", rf"- {tmp_path}/gone/\1", recipe.read_text()))
    here, there = (call(run, "--prompt", "word", "--max-tokens", 4) for run in (runs / "ebt", tmp_path / "run"))
    assert there.exit_code == 0, there.output
    assert there.stdout == here.stdout

    shutil.rmtree(tmp_path / "run" / "data_description")  # as earlier versions left it: the shards are needed
    done = call(tmp_path / "run", "--prompt", "word")
    assert done.exit_code == 2 and "no shards at" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", -1], "error: steps=-1: must be at least 0"),
        (["--candidates", 0], "error: candidates=0: must be"),
        ([], "error: no prompt: give --prompt TEXT"),
        (["--prompts", "{folder}/comma"], "comma, line 2: it begins like JSON and is none (a comma at its end)"),
        (["--prompts", "{folder}/array"], "array, line 1: a JSON array: give a prompt a line"),
        (["--prompts", "{folder}/keys"], 'keys, line 1: a JSON object without a text "prompt"'),
        (["--prompts", "{folder}/array", "--output", "{folder}/array"], "would be written over --prompts"),
        (["--prompts", "{folder}/array", "--output", "{folder}/link"], "would be written over --prompts"),
        (["--prompts", "{folder}/x.partial", "--output", "{folder}/x"], "would be written over --prompts"),
        (["--prompt", "a", "--output", "{folder}"], "is a folder: name a file"),
        (["--prompts", "{folder}/none"], "none"),
        (["--prompt", "a", "--output", "{folder}/no/x"], "no is not a folder"),
        (["--prompt", "a", "--top-p", 0], "error: top_p=0.0: must be greater"),
        (["--prompt", "a", "--flops", 10, "--max-tokens", 2], "flops=10 does not pay for one step of a batch"),
        (["--prompt", "a", "--candidates", 2], "error: candidates=2: without noise every start of"),
        (["--prompt", "a", "parallel.tensor=2"], "number of ranks=1 is not divisible"),
    ],
)
def test_bad_input_is_one_line(arguments, line, runs, tmp_path):
    for name, content in (("comma", 'a\n{"prompt": "b"},'), ("array", '["a", "b"]'), ("keys", '{"text": "a"}')):
        (tmp_path / name).write_text(content)
    (tmp_path / "x.partial").write_text("word")
    (tmp_path / "link").symlink_to(tmp_path / "array")
    done = call(runs / "ebt", *(str(a).replace("{folder}", str(tmp_path)) for a in arguments))
    assert done.exit_code == 2 and line in done.stderr.strip() and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_prompts_are_lines_that_newlines_end(runs, tmp_path):
    """Not what else Python takes for an end of a line; and neither a byte-order mark nor other bytes stop anything."""
    file = tmp_path / "prompts"
    inside = "word3 \u2028 word4 \x85 word5 \x0c word6 \x1c word7"
    text = "\ufeffword1\r\n" + json.dumps({"prompt": inside}, ensure_ascii=False) + "\n" + inside + '\n"\\ud800"\n""\n'
    file.write_bytes(text.encode() + b"word\xff\n")
    done = call(runs / "baseline", "--prompts", file, "--max-tokens", 2, "--output", "-")
    assert done.exit_code == 0, done.output
    prompts = [json.loads(line)["prompt"] for line in done.stdout.splitlines()]
    assert prompts == ["word1", inside, inside, "\ufffd", "", "word\ufffd"]
    assert done.stderr.count("2 bytes or surrogates that are no UTF-8 were read as U+FFFD") == 1
    plain = call(runs / "baseline", "--prompts", "-", "--max-tokens", 2, stdin="word1\n")
    assert plain.stdout.startswith("word1") and plain.exit_code == 0


def test_a_terminal_is_asked_for_lines_and_each_is_continued_alone(runs, monkeypatch):
    from ebt_megatron.inference import prompt_loop

    lines = "Document 3\n\nsays word5\nDocument 3\n"
    done = call(runs / "ebt", "--chat", "--max-tokens", 4, "--temperature", 0, "--steps", 3, stdin=lines)
    assert done.exit_code == 0, done.output
    alone = call(runs / "ebt", "--prompts", "-", "--max-tokens", 4, "--temperature", 0, "--steps", 3, stdin=lines)
    assert done.stdout.replace("> ", "").strip() == alone.stdout.strip()
    assert done.stderr.count("4 tokens, ") == 3 and done.stderr.count("3 steps each, mean energy ") == 3

    real = prompt_loop.generate

    def ended(*given):
        monkeypatch.setattr(prompt_loop, "generate", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(prompt_loop, "generate", ended)
    done = call(runs / "ebt", "--chat", "--max-tokens", 4, "--temperature", 0, stdin="Document 3\nword3\n")
    assert done.exit_code == 0 and done.stderr.count("4 tokens, ") == 1, "Ctrl-C ends one text"
    done = call(runs / "ebt", "--chat", "--prompt", "a")
    assert done.exit_code == 2 and "--chat asks for prompts" in done.stderr


def test_what_is_written_is_gone_on_with_after_an_end_in_between(runs, tmp_path, monkeypatch):
    """Of seven prompts, two at a time, three rows and a half are there: the first two stay, byte by byte the same."""
    from ebt_megatron.inference import predictor

    out = tmp_path / os.fsdecode(b"caf\xe9.jsonl")  # a name that is no UTF-8
    prompts, whole = tmp_path / "prompts", tmp_path / "whole.jsonl"
    prompts.write_text("".join(f"word{i}\n" for i in range(7)))
    given = (runs / "ebt", "--prompts", prompts, "--max-tokens", 3, "--batch", 2, "--langevin-noise", 0.3)
    assert call(*given, "--output", whole).exit_code == 0
    rows = whole.read_bytes().splitlines(keepends=True)
    assert len(rows) == 7 and not whole.with_name("whole.jsonl.partial").exists()

    real, calls = predictor.EnergyPredictor.__call__, []

    def ending(self, *arguments):
        calls.append(1)
        if len(calls) > 7:  # of the third batch
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(predictor.EnergyPredictor, "__call__", ending)
    assert call(*given, "--output", out).exit_code == 130
    partial = out.with_name(f"{out.name}.partial")
    head, *there = partial.read_bytes().splitlines(keepends=True)
    assert not out.exists() and there == rows[: len(there)] and len(there) == 4
    partial.write_bytes(head + b"".join(rows[:3]) + rows[3][:20])
    calls[:] = [1] * -100
    monkeypatch.setattr(predictor.EnergyPredictor, "__call__", lambda *a: calls.append(1) or real(*a))
    resumed = call(*given, "--output", out)
    assert resumed.exit_code == 0 and "2 of 7 prompts are done in" in resumed.stderr
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()
    some = len(calls)
    assert call(*given, "--output", out).exit_code == 0 and len(calls) - some > some

    partial.write_bytes(head + b"".join(rows[:3]))
    other = call(*given, "--seed", 3, "--output", out)
    assert other.exit_code == 0 and "are done" not in other.stderr and out.read_bytes() != whole.read_bytes()


def test_runs_that_do_not_do(runs, tmp_path):
    done = call(tmp_path, "--prompt", "a")
    assert done.exit_code == 2 and "is not a run directory: recipe.yaml is missing" in done.stderr
    done = call(runs / "baseline", "--prompt", "a", "--steps", 3)
    assert done.exit_code == 2 and "is a baseline, which does not think: leave out steps" in done.stderr
    done = call(runs / "ebt", "data.modality=video", "--prompt", "a")
    assert done.exit_code == 2 and f"is a run of video: ebt-films {runs / 'ebt'} makes them" in done.stderr

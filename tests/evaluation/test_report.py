"""The report holds its plots, its tables, and nothing that must be fetched; and a browser shows all of it."""

import io
import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.evaluation.report import write_report
from ebt_megatron.evaluation.run_files import RunFiles
from ebt_megatron.report import app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLAIN = ("loss", "start", "thinking", "energy", "example")
STACKED = ("loss", "start", "energy", "example")  # on narrow pages, for they have several panels
JUDGED = ("compute", "starts", "risk", "shifts", "landscape-1")


def suite():
    """Numbers as `evaluation.suite` gives them."""
    doubt = {
        "rank correlation with loss": 0.5,
        "AUROC of an error": 0.7,
        "area under risk-coverage": 0.3,
        "curve": [0.1, 0.2, 0.5],
    }
    model = {
        "parameters": 1e6,
        "tokens": 1e6,
        "training flops": 1e12,
        "inference flops a token": 3e6,
        "loss": 4.0,
        "perplexity": 55.0,
        "accuracy": 0.2,
    }
    by = {"lowest energy": {"perplexity": 50.0, "accuracy": 0.2}, "even mixture": {"perplexity": 49.0}}
    step = {"steps": 1, "loss": 4.0, "perplexity": 55.0, "accuracy": 0.2, "changed": None}
    compute = [{"steps": s, "tolerance": 0.1 * s, "perplexity": 60.0 - s, "flops": 1e6 * s} for s in (1, 2)]
    token = {"text": " a<b", "loss": 1.0, "energy": 0.3, "steps": 2, "first": [["x", 0.5]], "last": [["</y>", 0.6]]}
    shift = {
        "shift": 2.0,
        "gain over the first step": 0.2,
        "perplexity": {"": 90.0, "T": 80.0},
        "energy": 1.0,
        "AUROC of being other text, by energy": 0.6,
    }
    return {
        "trained steps": 2,
        "models": [{"name": "e", "baseline": False, **model}, {"name": "T", "baseline": True, **model}],
        "thinking": [step],
        "starts": [{"starts": m, "by": by} for m in (1, 2)],
        "dynamic compute": {"fixed": compute, "adaptive": compute, "flops to reach the trained steps' perplexity": 0.7},
        "corruption": [{"kind": "random", "token energy": 0.7, "-log p": 0.9}],
        "shifts": {"far <1>": shift},
        "uncertainty": {n: {"error rate": 0.5, "calibration error": 0.1, "by": {"entropy": doubt}} for n in "eT"},
        "token_trace": {
            "tokens": [token, {**token, "text": "\n", "energy": 0.1}] * 30,
            "samples": {"prompt": "So <i>", "texts": ["it goes & goes"]},
            "landscapes": [
                {
                    "x": [0, 1, 2],
                    "y": [0, 1],
                    "energy": [[0, 1, 2], [1, 2, 3]],
                    "target": [1, 1],
                    "path": [[0, 0], [1, 0.5]],
                    "context": "a",
                    "token": "$b$",
                }
            ],
        },
    }


@pytest.fixture
def runs(tmp_path):
    return written_runs(tmp_path)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The report of an EBT with a suite, and a baseline."""
    folder = tmp_path_factory.mktemp("judged")
    runs = written_runs(folder)
    (runs["ebt"] / "suite.json").write_text(json.dumps(suite()))
    return write_report(list(runs.values()), folder / "report", "A title", "x" * 200)


def written_runs(root):
    folders = {}
    for name in ("ebt", "baseline"):
        folder = folders[name] = root / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text("model: {size: tiny}\n")
        rows = [
            {
                "step": s,
                "tokens": 100 * s,
                "loss": 5.0 - s / 10,
                "final_step_loss": 5.0 - s / 10,
                "step_losses": [5.1 - s / 10, 5.0 - s / 10][: 1 + s % 2],
                "alpha": 10.0,
                "tokens_per_second": 10.0,
                "step_seconds": 2.0,
                "peak_memory_bytes": 5e8,
                "model_flops_per_second": 1e9,
                "data_wait_seconds": 0.002,
                **({"validation_loss": 5.5 - s / 10} if s % 5 == 0 else {}),
            }
            for s in range(1, 11)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        steps = range(1, 5) if name == "ebt" else range(1, 2)
        state = {"top": [{"token": " a<b", "probability": 0.5}, {"token": " of", "probability": 0.25}]}
        evaluation = {
            "name": name,
            "architecture": name,
            "trained_steps": 2 if name == "ebt" else 1,
            "unigram_entropy": 5.7,
            "thinking": [
                {
                    "steps": s,
                    "loss": 5.0 - s / 10,
                    "perplexity": 100.0 + s,
                    "accuracy": 0.25,
                    "changed": None if s == 1 else 0.125,
                }
                for s in steps
            ],
        }
        if name == "ebt":
            evaluation["example"] = {
                "context": "one <b> of",
                "target": " of",
                "mean_energies": [[1.0, 0.5], [0.4, 0.3]],
                "states": [{"steps": i, "energies": [1.0, 0.5] if i else None, **state} for i in range(3)],
            }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folders


def test_html_and_markdown(runs, tmp_path):
    labels = {"S1": runs["ebt"], "S2": runs["ebt"], "Transformer++": runs["baseline"]}
    paths = write_report(labels, tmp_path / "report", "A title", "do this next")
    html, markdown = paths["html"].read_text(), paths["markdown"].read_text()
    assert html.count("data:image/png;base64,") == 2 * (len(PLAIN) + len(STACKED))  # by day and by night
    assert html.count("(max-width: 40em)") == 2 * len(STACKED)
    assert "http" not in html
    assert "one &lt;b&gt; of" in html
    for text in (html, markdown):
        assert "do this next" in text and "A title" in text and "2 (trained)" in text
    for name in PLAIN:
        assert f"({name}.png)" in markdown and paths[name].stat().st_size > 1000
    assert "0.10 %" in markdown  # data wait: 2 ms of 2 s
    assert markdown.count("| 12.5 % |") == 6 and "Thinking longer: S2" in markdown


def test_a_suite_adds_its_parts(judged):
    html = judged["html"].read_text()
    assert set(JUDGED) <= judged.keys() and "Which token is wrong" in html
    assert " a&lt;b</span>" in html and "So &lt;i&gt;" in html and "it goes &amp; goes" in html
    assert "&#x27;&lt;/y&gt;&#x27; 60 %" in html, "hovering over a token shows what was predicted"


def test_a_run_that_was_not_evaluated_says_how_to(runs):
    (runs["ebt"] / "evaluation.json").unlink()
    with pytest.raises(RecipeError, match=r"ebt-evaluate"):
        RunFiles.read(runs["ebt"], "EBT")


def test_the_command_writes_it_or_says_what_is_missing(runs, tmp_path):
    command = [str(runs["ebt"]), str(runs["baseline"]), "--output", str(tmp_path / "page")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and (tmp_path / "page" / "report.html").exists(), done.output
    (runs["ebt"] / "evaluation.json").unlink()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "ebt-evaluate" in done.stderr and done.stderr.count("\n") == 1


PROBE = """<script>addEventListener("load", () => { const seen = [...document.images].map(i => {
const r = i.getBoundingClientRect(); return [i.alt, i.naturalWidth, Math.round(r.width), r.right <= innerWidth] });
const scrolled = [...document.querySelectorAll("*")].filter(e => e.scrollWidth > e.clientWidth + 1 &&
["auto", "scroll"].includes(getComputedStyle(e).overflowX)).map(e => e.innerText.slice(0, 60));
document.title = JSON.stringify({seen, scrolled, wide: document.documentElement.scrollWidth, window: innerWidth,
dark: matchMedia("(prefers-color-scheme: dark)").matches}) })</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "night"), [(400, True), (1280, False)])
def test_a_browser_shows_every_figure(width, night, judged, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(judged["html"].read_text().replace("<h1>", PROBE + "<h1>", 1))
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if night else []
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            f"--window-size={width},900",
            *dark,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])
    assert "CONSOLE" not in done.stderr, done.stderr
    assert {name for name, *_ in told["seen"]} == {*PLAIN, *JUDGED}
    for name, natural, shown, inside in told["seen"]:
        assert natural > 300 and shown > 250 and inside, name
    assert told["wide"] <= told["window"], "the page is as wide as the window"
    assert told["dark"] == night
    assert width < 1280 or not told["scrolled"], "nothing scrolls by itself in a laptop's window"
    stacked = {name for name, natural, *_ in told["seen"] if name in STACKED and natural < 600}
    several = {*STACKED} - {"energy"}  # of one EBT
    assert stacked == (several if width == 400 else set()), "panels are below each other on a narrow page"


def test_half_a_row_is_read_over_and_files_are_named(runs, capsys):
    metrics, evaluation = runs["ebt"] / "metrics.jsonl", runs["ebt"] / "evaluation.json"
    with metrics.open("a") as stream:
        stream.write('{"step": 11, "lo')
    assert len(RunFiles.read(runs["ebt"]).metrics) == 10
    assert f"{metrics}: 1 lines are no whole rows, and are read over" in capsys.readouterr().err
    evaluation.write_text(evaluation.read_text()[:50])
    with pytest.raises(DataError, match=re.escape(f"{evaluation} is no JSON")):
        RunFiles.read(runs["ebt"])
    metrics.write_text('{"step": ')
    with pytest.raises(RecipeError, match=re.escape(f"{metrics} has no row of a step: train it first")):
        RunFiles.read(runs["ebt"])


def test_runs_of_one_recipe_are_told_apart(runs, tmp_path):
    other = shutil.copytree(runs["ebt"], tmp_path / "other" / "second")
    third = shutil.copytree(runs["ebt"], tmp_path / "third" / "second")
    paths = [runs["ebt"], other, runs["baseline"]]
    labels = lambda *given: [run.label for run in RunFiles.read_all(*given)]  # noqa: E731
    assert labels(paths) == ["ebt (ebt)", "ebt (second)", "baseline"]
    assert labels([*paths, third]) == ["ebt (ebt)", str(other), "baseline", str(third)]
    assert labels(paths, ["a", "b", "c"]) == ["a", "b", "c"]
    for given, said in (
        ((paths, ["a"]), "1 labels for 3 runs"),
        ((paths, ["a", "b", "a"]), "a is given 2 times"),
        (([other, other],), "second is given 2 times"),
    ):
        with pytest.raises(RecipeError, match=said):
            RunFiles.read_all(*given)


@pytest.mark.parametrize("name", ["_mine", "a$x^2$b", "50$"])
def test_names_are_shown_as_they_are(name, runs):
    from ebt_megatron.evaluation import figures
    from ebt_megatron.evaluation.tables import Table

    figure = figures.losses([RunFiles.read(runs["ebt"], name)], [])
    figure.canvas.draw()
    (text,) = figure.axes[0].get_legend().get_texts()
    shown, mathematics = text._preprocess_math(text.get_text())
    assert shown.strip() == name and not mathematics
    table = Table("[x]", ["model"], [[f"[red]{name}|"]])
    assert f"| [red]{name}\\| |" in table.markdown()
    console = Console(file=io.StringIO(), width=80)
    console.print(table.rich())
    assert f"[red]{name}|" in console.file.getvalue() and "[x]" in console.file.getvalue()

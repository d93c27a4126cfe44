"""From an own text to a model that others use, as a new user would: installed, without a checkout, command by command.

`tests/serve/test_socket.py` has the cheap part: the same continuation by API, transformers and server.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import pytest

from tests.test_install import copied

pytestmark = pytest.mark.slow
PROMPT = "The price of"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
TRAIN = """model.num_layers=2 model.num_attention_heads=4 model.num_query_groups=2 model.hidden_size=64
model.vocab_multiple=16 data.sequence_length=32 optimizer.lr=0.01 optimizer.warmup_steps=10 training.steps=100
training.global_batch_size=8 training.micro_batch_size=8 training.validation_interval=50 training.validation_samples=16
training.output_dir=runs/own"""
BY_API = """
import sys, warnings
warnings.simplefilter("error")
import ebt_megatron as ebt
print(repr(ebt.load(sys.argv[1]).generate(sys.argv[2], max_tokens=12, temperature=0).text))
"""
BY_TRANSFORMERS = """
import sys, warnings
warnings.filterwarnings("error", module="megatron|ebt_megatron")
if sys.argv[3] == "ebt":
    import ebt_megatron.hf
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
(made,) = pipe(sys.argv[2], max_new_tokens=12, do_sample=False, return_full_text=False)
print(repr(made["generated_text"]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new environment: the wheel is installed, its dependencies are this environment's."""
    root = tmp_path_factory.mktemp("environment")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = copied(tmp_path_factory.mktemp("source"))
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", root, source]
    subprocess.run(list(map(str, build)), check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
    python = root / "venv" / "bin" / "python"
    found = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    packages = Path(found.stdout.strip())
    (wheel,) = root.glob("*.whl")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True, env=ENVIRONMENT)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


class Shell:
    """Commands of the new environment, in a folder that has nothing of a checkout."""

    def __init__(self, python: Path, folder: Path):
        self.bin, self.folder = python.parent, folder

    def __call__(self, command: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [str(self.bin / command), *map(str, arguments)],
            cwd=self.folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command} {arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def said(self, code: str, *arguments: str | Path) -> str:
        """The last line that some Python prints, in a new process."""
        return self("python", "-c", code, *arguments).strip().splitlines()[-1]


def served(shell: Shell, model: Path) -> str:
    """The continuation that `ebt-serve` gives over its socket."""
    with subprocess.Popen(
        [shell.bin / "ebt-serve", model, "--port", "0"],
        cwd=shell.folder,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            address = re.search(r"http://\S+?:\d+", server.stderr.readline())[0]
            body = json.dumps({"prompt": PROMPT, "max_tokens": 12, "temperature": 0}).encode()
            with urllib.request.urlopen(f"{address}/v1/completions", body, timeout=60) as answer:
                return repr(json.load(answer)["choices"][0]["text"])
        finally:
            server.kill()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
def test_an_own_text_becomes_a_model_that_is_the_same_from_everywhere(architecture, python, tmp_path):
    shell = Shell(python, tmp_path)
    things = ("bread", "milk", "a ticket", "the house", "salt")
    (tmp_path / "own").mkdir()
    for i in range(60):
        lines = [f"The price of {t} is {i % 7 + n} and the price of {things[n]} is more." for n, t in enumerate(things)]
        (tmp_path / "own" / f"{i}.txt").write_text("\n".join(lines * 2))
    made = "--train-bpe 400 --sequence-length 32 --validation-fraction 0.1 --output data --workers 1"
    shell("ebt-prepare", "text", "--input", "own", *made.split())
    data = "data.train=[data/train]", "data.validation=[data/validation]", f"model.architecture={architecture}"
    shell("ebt-train", "text/s1_xxs", *TRAIN.split(), *data)
    shell("ebt-evaluate", "runs/own")
    shell("ebt-convert", "export", "runs/own", "model")
    assert "](losses.png)" in (tmp_path / "model/README.md").read_text()
    moved = tmp_path / "elsewhere" / "a model"
    moved.parent.mkdir()
    (tmp_path / "model").rename(moved)
    for gone in ("data", "runs", "own"):
        (tmp_path / gone).rename(tmp_path / f"was {gone}")

    where = shell.said("import ebt_megatron; print(ebt_megatron.__file__)")
    assert Path(where).is_relative_to(python.parents[1]), "of the new environment"
    wanted = shell.said(BY_API, moved, PROMPT)
    assert len(wanted) > 10
    assert shell.said(BY_TRANSFORMERS, moved, PROMPT, architecture) == wanted
    assert served(shell, moved) == wanted
    line = shell("ebt-generate", moved, "--prompt", PROMPT, "--max-tokens", "12", "--temperature", "0", "--output", "-")
    assert repr(json.loads(line)["text"]) == wanted

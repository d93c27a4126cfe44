"""Errors at the command line: one line, once, as it is, whatever the number of ranks."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebt_megatron.core import cli
from ebt_megatron.core.errors import PeerError, RecipeError
from ebt_megatron.core.launch import Launch, detect_launch

ROOT = Path(__file__).parents[2]


def ended(work, capsys, **options):
    with pytest.raises(SystemExit) as end:
        cli.guarded(work, **options)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def work():
        raise error

    return work


def test_brackets_are_no_markup(capsys):
    message = "data.train=[bold]a[/bold] and [/nothing]: no"
    assert ended(raising(RecipeError(message)), capsys) == (2, f"error: {message}\n")
    cli.say("run [red]x[/red]", "yellow")
    assert capsys.readouterr().err == "run [red]x[/red]\n"


def test_what_a_terminal_cannot_show_does_not_end_a_command():
    script = (
        "from rich.console import Console; from ebt_megatron.core.cli import guarded\n"
        "guarded(lambda: (print('\\udcff \\u2603'), Console().print('caf\\u00e9')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "? ?\ncaf?\n"), done.stderr


def test_a_file_that_cannot_be_used_is_one_line(capsys, tmp_path):
    code, said = ended(lambda: (tmp_path / "none" / "x").write_text(""), capsys)
    wanted = f"error: {tmp_path}/none/x cannot be read or written (No such file or directory)\n"
    assert (code, said) == (2, wanted)


def test_a_full_disk_is_one_line(capsys):
    with open("/dev/full", "wb", buffering=0) as full:
        code, said = ended(lambda: full.write(b"x"), capsys)
    assert (code, said) == (2, "error: a file cannot be read or written (the disk is full)\n")


def test_ctrl_c_before_training_shows_no_traceback(capsys):
    assert ended(raising(KeyboardInterrupt()), capsys) == (130, "")


def test_a_rank_whose_peer_says_what_is_wrong_says_nothing(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert ended(raising(PeerError("rank 1: DataError: x")), capsys) == (2, "") and waited


def test_a_bug_of_a_process_alone_is_raised():
    with pytest.raises(ZeroDivisionError):
        cli.guarded(raising(ZeroDivisionError()))


def test_a_bug_of_a_rank_is_printed_with_its_place(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_launch", lambda: Launch("mpi", 1, 2, 1, "mpi"))
    monkeypatch.setattr(cli, "_place_in_line", lambda launch, mistake: (True, True))
    code, said = ended(raising(RuntimeError("a bug")), capsys)
    assert code == 1 and said.startswith("error (rank 1 on ") and "): RuntimeError: a bug\n" in said
    assert "Traceback" in said and "in work\n" in said


def test_a_log_on_a_full_disk_loses_lines_only(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    cli.say("a line")


def test_an_error_of_the_network_is_no_mistake():
    with pytest.raises(ConnectionResetError):
        cli.guarded(raising(ConnectionResetError(errno.ECONNRESET, "reset")))


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set, MASTER_ADDR and MASTER_PORT not: unset"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "does not fit: unset"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "does not fit: unset"),
    ],
)
def test_variables_left_over_from_another_program(environ, said):
    with pytest.raises(RecipeError, match=said):
        detect_launch(environ)


def test_a_port_in_use_is_one_line():
    import socket

    from ebt_megatron.config import ParallelConfig
    from ebt_megatron.parallel import setup

    setup.shutdown()
    with socket.socket() as taken, pytest.MonkeyPatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            patch.setenv(name, value)
        with pytest.raises(RecipeError, match=f"127.0.0.1:{port} is in use by another program: export another MASTER"):
            setup.initialize(ParallelConfig(timeout_seconds=5), 0)


FAILING = """
import sys, torch, torch.distributed as dist
from ebt_megatron.core.cli import guarded
from ebt_megatron.config import ParallelConfig, RecipeError
from ebt_megatron.parallel.setup import initialize
def work():
    if sys.argv[1] == "every rank":
        raise RecipeError("no such key [x]")
    state = initialize(ParallelConfig(), 0)
    if state.rank == 1:
        raise RecipeError("no disk here")
    dist.all_reduce(torch.zeros(1))
guarded(work)
"""


@pytest.mark.usefixtures("no_survivors")
@pytest.mark.parametrize(
    ("where", "said"),
    [pytest.param("every rank", "): no such key [x]\n", marks=pytest.mark.slow), ("one rank", "error (rank 1 on ")],
)
def test_the_first_error_of_several_ranks_is_printed_once_with_its_rank(where, said, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    restarts = ["--max-restarts=1"] if where == "every rank" else []  # a mistake that is made again is not said again
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *restarts,
            "--monitor-interval=0.1",
            str(script),
            where,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode != 0
    assert done.stderr.count("error (rank") == 1 and said in done.stderr, done.stderr
    assert "exitcode  : 2" in done.stderr

"""A disk that others filled: metrics fail, are said once and counted, and nothing is half written."""

import errno
import json
import resource

from ebt_megatron.training import metrics
from ebt_megatron.training.metrics import MetricsWriter, last_step


class Board:
    """TensorBoard whose writes fail while `full`; remembers what was written, and from which step boards go on."""

    full, rows, begun = False, [], []

    def __init__(self, folder, first_step):
        self.begun.append(first_step)

    def write(self, row):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.rows.append(row["step"])

    def close(self):
        pass


def test_metrics_fail_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(Board, "rows", [])
    monkeypatch.setattr(Board, "begun", [])
    monkeypatch.setattr(metrics, "PAUSE_SECONDS", 0)
    monkeypatch.setitem(metrics.WRITERS, "tensorboard", ("tensorboard/", Board))
    said = []
    writer = MetricsWriter(tmp_path, 0, said.append, ["jsonl", "tensorboard"])
    rows = writer.writers[0].writer

    class Full:
        """A file on a disk with room for ten more bytes."""

        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data):
            return self.stream.write(data[:10])

    for step in range(1, 7):
        if step == 3:
            rows.stream, Board.full = Full(rows.stream), True
        if step == 5:
            rows.stream, Board.full = rows.stream.stream, False
        writer.write({"step": step, "loss": 1.0})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 3 if 3 <= step < 5 else step + 1))
    writer.close()
    assert Board.rows == [1, 2, 5, 6], "what could not be kept is lost there"
    assert Board.begun == [0, 3, 4], "a new board hides nothing of before"
    assert len(said) == 4, said
    assert "metrics.jsonl not written" in said[0] and "No space left" in said[0]
    assert "tensorboard/ not written" in said[1]
    assert "metrics.jsonl: writing failed 2 times" in said[2] and "tensorboard/: writing failed 2 times" in said[3]


def test_the_real_tensorboard_says_once_that_it_has_no_room(tmp_path, capfd):
    said, limit = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = MetricsWriter(tmp_path, 0, said.append, ["jsonl", "tensorboard"])
    writer.write({"step": 1, "loss": 1.0})
    writer.writers[1].writer.close()
    writer.writers[1].writer = None
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limit[1]))  # bytes a file may have: as on a full disk
    try:
        for step in range(2, 9):
            writer.write({"step": step, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "one that has no room is not made anew for every row"
    assert capfd.readouterr().err == "" and len(said) == 4, said


def test_rows_of_another_history_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '5\n{"loss": 1}\n')
    with path.open("ab") as stream:
        stream.write(b'\0\0\xff\n{"step": 4, "lo')  # of a machine that stopped, and of a killed run
    assert last_step(tmp_path) == 3
    MetricsWriter(tmp_path, 1, print, ["jsonl"]).close()
    assert [json.loads(x) for x in path.read_text().splitlines()] == [{"step": 1}]
    assert (tmp_path / "metrics-replaced.jsonl").read_text() == '{"step": 2}\n{"step": 3}\n'

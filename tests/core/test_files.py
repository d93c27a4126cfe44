"""A file that is written anew is there whole: the old one or the new one."""

import errno
import os

import pytest

from ebt_megatron.core.files import replacing, write_whole


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "result.json"
    write_whole(path, "straße")
    with pytest.raises(OSError, match="No space"), replacing(path) as partial:
        partial.write_text("half of the n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_bytes() == "straße".encode() and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_bytes() == "straße".encode()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]

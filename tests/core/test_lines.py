r"""Lines end at \n; a byte-order mark is none of the text; a line that begins like JSON is JSON."""

import json

import pytest

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.lines import encodable, lines_of, text_of, value_of

ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]  # where str.splitlines ends a line


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("odd", ODD)
def test_a_line_ends_at_a_line_feed_alone(odd, end):
    text = f"a{odd}b{end}{end}c\rd{end}"
    assert lines_of(text) == [f"a{odd}b", "", "c\rd"] and lines_of(text.removesuffix(end)) == lines_of(text)
    line = json.dumps({"prompt": f"a{odd}b"}, ensure_ascii=False)
    assert odd < " " or value_of(line, "x") == {"prompt": f"a{odd}b"}


def test_a_byte_order_mark_is_none_of_the_text():
    assert text_of("\ufeffone\n\ufefftwo".encode(), "a.txt") == "one\n\ufefftwo"
    with pytest.raises(DataError, match=r"a.txt, line 3: not UTF-8"):
        text_of(b"1\n2\n\xff\n", "a.txt")


@pytest.mark.parametrize(
    ("line", "value"),
    [("plain, text", "plain, text"), ('{"a": 1}', {"a": 1}), ('["a"]', ["a"]), (' "a\\nb"', "a\nb"), ("12", "12")],
)
def test_a_line_says_itself_or_its_json(line, value):
    assert value_of(line, "x") == value


@pytest.mark.parametrize("line", ['{"prompt": "a"},', '"a",', '{"prompt": "a"', '["a", ', '"a" said she'])
def test_a_line_that_begins_like_json_and_is_none_is_named(line):
    with pytest.raises(DataError, match=r"p.jsonl, line 7: it begins like JSON and is none"):
        value_of(line, "p.jsonl, line 7")


def test_lone_surrogates_are_replaced_and_counted():
    assert encodable(json.loads('"a\\ud800b\\udcff, \\ud83d\\ude00"')) == ("a\ufffdb\ufffd, \U0001f600", 2)

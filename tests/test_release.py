"""A release has one number, everywhere that it is written."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def number_in(file: str, pattern: str) -> str:
    found = re.search(pattern, (ROOT / file).read_text(), re.M)
    assert found, f"{file} names no version"
    return found[1]


def test_the_version_is_the_same_everywhere():
    version = number_in("setup.py", r'version="([\d.]+)"')
    assert number_in("CITATION.cff", r"^version: ([\d.]+)$") == version
    assert number_in("CHANGELOG.md", r"^## ([\d.]+) \(") == version


def test_the_changelog_begins_with_what_is_unreleased():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings[1:])


def test_the_licence_is_the_one_that_is_declared():
    assert number_in("setup.py", r'license="([\w.-]+)"') == number_in("CITATION.cff", r"^license: ([\w.-]+)$")
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:100]

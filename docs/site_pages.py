"""Pages of the site that mkdocs.yml describes; `make docs` runs this through mkdocs-gen-files.

The documents keep their paths, so that links between them hold on the site as in the repository. Every module of the
package gets a page of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("*.md", "CITATION.cff", "LICENSE", "docs/*.md", "benchmarks/results/*")


def copy_documents() -> None:
    """Put documents, figures and results on the site under their own paths."""
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            with mkdocs_gen_files.open(path.relative_to(ROOT).as_posix(), "wb") as page:
                page.write(path.read_bytes())


def modules() -> Iterator[Path]:
    """The package's files, data_prep and tools among them, which are links in it."""
    for folder, _, names in os.walk(ROOT / "ebt_megatron", followlinks=True):
        yield from (Path(folder, name) for name in names if name.endswith(".py") and name != "__main__.py")


def write_module_pages() -> None:
    """Write a page for each module, and the navigation of all of them."""
    nav = mkdocs_gen_files.Nav()
    for path in sorted(modules()):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        parts = parts[:-1] if package else parts
        page = Path(*parts[1:], "index.md") if package else Path(*parts[1:]).with_suffix(".md")
        nav[parts] = page.as_posix()
        with mkdocs_gen_files.open(Path("api") / page, "w") as out:
            out.write(f"# {parts[-1]}\n\n::: {'.'.join(parts)}\n")
    with mkdocs_gen_files.open("api/SUMMARY.md", "w") as out:
        out.writelines(nav.build_literate_nav())


copy_documents()
write_module_pages()

"""A page of plots and tables: HTML with everything in it, by day and by night, and Markdown beside its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.pyplot import close

from ebt_megatron.core.files import write_whole
from ebt_megatron.core.machine import MACHINE, machine
from ebt_megatron.core.records import record_of
from ebt_megatron.evaluation.figures import colours, png_of
from ebt_megatron.evaluation.tables import Table

# Tables may be wider than text; below the width of a small laptop's window they scroll by themselves.
_STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;
padding:0 1em;color:#222;background:#fff}p,ol,h1{max-width:60em}img{max-width:100%;height:auto}figure{
margin:1em 1em 1em 0;display:inline-block;vertical-align:top;max-width:100%}figcaption{
font-size:.9em;opacity:.8;contain:inline-size}.wide{
overflow-x:auto}table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #8884;
text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#8882;padding:1em;white-space:pre-wrap;
overflow-wrap:anywhere}.text{font-family:ui-monospace,monospace;font-size:.85em;overflow-wrap:anywhere;white-space:
pre-wrap}@media (prefers-color-scheme:dark){body{color:#ddd;background:#181818}}"""


_NARROW = "40em"


def _source(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _media(night: bool, stacked: bool) -> str:
    parts = [f"(max-width: {_NARROW})"] * stacked + ["(prefers-color-scheme: dark)"] * night
    return " and ".join(parts)


def _place(made: Mapping[str, str]) -> str:
    return f"{made['machine']}, torch {made['torch']}"


def _panels(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


class Page:
    """A page in the making.

    Args:
        title: heading.
    """

    def __init__(self, title: str):
        self.markdown = [f"# {title}\n"]
        self.parts = [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        ]
        self.pictures: dict[str, bytes] = {}

    def figure(self, name: str, caption: str, draw: Callable[[], Figure]) -> None:
        """Add a plot, drawn by day and by night; one of several panels also for narrow pages, panels stacked."""
        drawn: dict[str, bytes] = {}
        for stacked in (False, True):
            for night in (False, True):
                with colours(night, stacked):
                    figure = draw()
                    if stacked and len(_panels(figure)) < 2:
                        close(figure)
                        break
                    drawn[_media(night, stacked)] = png_of(figure)
        self.picture(f"{name}.png", drawn.pop(""), caption, drawn)

    def picture(self, name: str, content: bytes, caption: str, instead: Mapping[str, bytes] | None = None) -> None:
        """Add the bytes of a picture; its name ends in .png or .gif.

        Args:
            name: of its file.
            content: the bytes.
            caption: under it.
            instead: what stands for it, by the media query under which it does.
        """
        self.pictures[name] = content
        stem, _, kind = name.rpartition(".")
        self.markdown.append(f"![{stem}]({name})\n\n{caption}\n")
        media = sorted((instead or {}).items(), key=lambda item: -len(item[0]))  # the first that holds is taken
        others = "".join(f'<source media="{query}" srcset="{_source(png, kind)}">' for query, png in media)
        self.parts.append(
            f'<figure id="{stem}"><picture>{others}<img alt="{stem}" src="{_source(content, kind)}"></picture>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def table(self, table: Table) -> None:
        """Add a table."""
        self.markdown.append(f"## {table.title}\n\n{table.markdown()}\n")
        self.parts.append(f"<h2>{html.escape(table.title)}</h2>{table.html()}")

    def text(self, heading: str, text: str) -> None:
        """Add text to be shown as it is, commands say."""
        self.markdown.append(f"## {heading}\n\n```\n{text}\n```\n")
        self.parts.append(f"<h2>{html.escape(heading)}</h2><pre>{html.escape(text)}</pre>")

    def origin(self, runs: Mapping[str, Path]) -> None:
        """Add when and by what the page was written, and of each run where it was trained and its recipe.

        Args:
            runs: run directories, by label.
        """
        made = machine()
        written = f"Written on {made['date']} by EBT-Megatron {made['ebt-megatron']} on {_place(made)}."
        told = []
        for run in runs.values():
            recorded = record_of(run / MACHINE) if (run / MACHINE).exists() else {}
            ranks = "" if recorded.get("ranks", "1") == "1" else f"{recorded['ranks']} ranks, "
            told.append(
                f"trained by {recorded['ebt-megatron']} on {ranks}{_place(recorded)}; begun on {recorded['date']}"
                if recorded
                else "where it was trained was not recorded"
            )
        self.markdown.append(f"## Where this comes from\n\n{written}\n")
        self.parts.append(f"<h2>Where this comes from</h2><p>{html.escape(written)}</p>")
        for (label, run), line in zip(runs.items(), told, strict=True):
            recipe = (run / "recipe.yaml").read_text("utf-8") if (run / "recipe.yaml").exists() else ""
            self.markdown.append(f"- {label}: {line}. Its recipe is `{run / 'recipe.yaml'}`.\n")
            self.parts.append(
                f"<p>{html.escape(label)}: {html.escape(line)}.</p><details><summary>Recipe of {html.escape(label)}"
                f"</summary><pre>{html.escape(recipe)}</pre></details>"
            )

    def html(self, part: str) -> None:
        """Add what only HTML can show."""
        self.parts.append(part)

    def write(self, output: Path) -> dict[str, Path]:
        """Write report.html, report.md and the pictures into `output`; returns their paths by name."""
        output.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, content in self.pictures.items():
            paths[name.rpartition(".")[0]] = output / name
            write_whole(output / name, content)
        paths["html"], paths["markdown"] = output / "report.html", output / "report.md"
        write_whole(paths["html"], "\n".join([*self.parts, "</html>"]))
        write_whole(paths["markdown"], "\n".join(self.markdown))
        return paths

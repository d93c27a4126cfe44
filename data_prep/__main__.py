"""Raw data to shards, by kind: `ebt-prepare text --help`, or `python -m ebt_megatron.data_prep text --help`."""

import typer

from ebt_megatron.data_prep import images, local_text, puzzles, text, video

app = typer.Typer(no_args_is_help=True, help="Turn text, video, images and puzzles into shards.")
for name, module in (
    ("text", text),
    ("video", video),
    ("images", images),
    ("puzzles", puzzles),
    ("local-text", local_text),
):
    app.command(name)(module.main)

if __name__ == "__main__":
    app()

"""`ebt-serve RUN`: a text model over HTTP, as OpenAI's completions, and a page to watch it think."""

from __future__ import annotations

import socket
from contextlib import suppress
from types import FrameType

import typer

from ebt_megatron.core.cli import guarded, quiet_libraries, say
from ebt_megatron.core.errors import RecipeError

app = typer.Typer()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        RecipeError: where the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise RecipeError(f"--host {host} --port {port} cannot be listened at ({error}): give others") from None


@app.command()
def main(
    model: str = typer.Argument(..., help="A run, an exported folder, or USER/MODEL on the Hub; of text."),
    host: str = typer.Option("127.0.0.1", help="Where to listen; 0.0.0.0: for other machines as well."),
    port: int = typer.Option(8000, min=0, max=65535, help="0: any that is free."),
    name: str | None = typer.Option(None, help="What /v1/models calls it; default: the recipe's name."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; default: the GPU, if there is one."),
    rows: int = typer.Option(16, min=1, help="Texts that grow at a time."),
    waiting: int = typer.Option(256, min=1, help="Texts that wait; more are refused (503)."),
    length: int = typer.Option(2048, min=2, help="Tokens of a text, its prompt included."),
    steps: int = typer.Option(256, min=1, help="The most thinking steps of a token."),
    seconds: float = typer.Option(120.0, help="Until a request is given up (504)."),
) -> None:
    """Serve a text model over HTTP, as OpenAI's completions, with a page at / to watch it think."""

    def work() -> None:
        quiet_libraries()
        try:
            import uvicorn

            from ebt_megatron.serve.server import Limits, server
        except ImportError as error:
            raise RecipeError(
                f"ebt-serve needs FastAPI and uvicorn ({error}): pip install 'ebt-megatron[serve]'"
            ) from None
        from ebt_megatron.api.loading import load
        from ebt_megatron.api.text import TextModel

        listening = listen(host, port)
        loaded = load(model, device)
        if not isinstance(loaded, TextModel):
            raise RecipeError(f"{model} is a model of {loaded.recipe.data.modality}: only text is served")
        application = server(loaded, name or loaded.name, Limits(rows, waiting, length, steps, seconds=seconds))
        say(f"{loaded!r}: http://{host}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                application.state.stop_soon()
                super().handle_exit(sig, frame)

        with suppress(KeyboardInterrupt):
            Server(uvicorn.Config(application, log_level="warning")).run([listening])
        say("stopped: no request is under way")

    guarded(work)


if __name__ == "__main__":
    app()

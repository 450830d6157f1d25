"""`python -m cllm.chat [RUN|MODEL]`: talk to a run or a bare model, on a web page with an
OpenAI-compatible API, or in the terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.data.message import Message
from cllm.messages import CommandLine, UserError, note, print_result, say, to_json

if TYPE_CHECKING:
    from cllm.assembly import Loaded
    from cllm.serve.engine import Engine


class Terminal:
    """A conversation in the shell: words go to the model, `/system /base /adapter /reset /save
    /quit` to this class.
    """

    def __init__(
        self, loaded: Loaded, engine: Engine, write: Callable[[str], object] = sys.stdout.write
    ) -> None:
        self.loaded, self.engine, self.write = loaded, engine, write
        self.name = next(iter(loaded.models))
        self.system = ""
        self.messages: list[Message] = []
        self.turns = self.tokens = 0

    def run(self, read: Callable[[str], str] = input) -> None:
        """Until /quit or the end of input. Ctrl-C ends an answer, and at the prompt the program."""
        self.write(say("chat.hello", model=self.shown) + "\n")
        while True:
            try:
                line = read("\n> ").strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.write(self.command(*line[1:].partition(" ")[::2]) + "\n")
                elif line:
                    self.say(line)
            except UserError as error:
                self.write(f"{error}\n")
            except (EOFError, KeyboardInterrupt):
                return

    @property
    def shown(self) -> str:
        return self.loaded.base_name if self.name == "base" else self.name

    def command(self, word: str, rest: str) -> str:
        """Obey `/word rest`; returns what to tell the user."""
        match word:
            case "system":
                self.system = rest.strip()
            case "reset":
                pass
            case "base" | "adapter":
                name = (
                    "base"
                    if word == "base"
                    else rest.strip() or next(iter(self.loaded.adapters), "")
                )
                if name not in self.loaded.models:
                    known = ", ".join(self.loaded.adapters) or "-"
                    raise UserError("chat.no_adapter", model=self.loaded.base_name, known=known)
                self.name = name
                return say("chat.now", model=self.shown)
            case "save":
                path = Path(rest.strip() or "conversation.jsonl")
                row = {"messages": [message.row() for message in self.context()]}
                with path.open("a", encoding="utf-8") as file:
                    file.write(to_json(row) + "\n")
                return say("chat.saved", path=path)
            case _:
                return say("chat.commands")
        self.messages = []
        return say("chat.fresh", system=self.system or "-")

    def context(self) -> list[Message]:
        return ([Message("system", self.system)] if self.system else []) + self.messages

    def say(self, words: str) -> None:
        """One turn, streamed; an interrupted answer stays as far as it came."""
        from cllm.serve.answer import Answer, ModelError, chat_sampling

        asked = Message("user", words)
        messages = [*self.context(), asked]
        adapter = self.loaded.models[self.name]
        answer = Answer(
            self.engine, self.loaded.tokenizer, messages, chat_sampling(), adapter, shorten=True
        )
        if answer.left_out:
            self.write(say("ui.left_out", rounds=answer.left_out) + "\n")
        try:
            for piece in answer:
                self.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            answer.cancel()
        except ModelError as error:
            self.write(f"{error}\n")
            return
        self.messages += [asked, Message("assistant", answer.text)]
        self.turns += 1
        self.tokens += answer.tokens
        self.write(f"\n{say('chat.cost', **answer.cost())}\n")


def serve(
    loaded: Loaded,
    engine: Engine,
    host: str,
    port: int,
    questions: Sequence[Sequence[Message]] | None = None,
) -> None:
    """The page, whose Compare asks `questions` or what the run has held out, and the API on one
    port until Ctrl-C. On a host that others reach, a key guards all but /health.
    """
    import uvicorn

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read where Gradio is imported
    from cllm.serve.api import build_app
    from cllm.serve.guard import ANY, LOOPBACK, Guard
    from cllm.serve.ui import mount_page

    key = os.environ.get("CLLM_KEY", "") or ("" if host in LOOPBACK else secrets.token_urlsafe(24))
    app = Guard(mount_page(build_app(loaded, engine), loaded, engine, questions), key)
    shown = "127.0.0.1" if host in ANY | LOOPBACK else host
    query = f"?key={key}" if key else ""
    url = f"http://{shown}:{port}/{query}"
    note("chat.serving", url=url, api=f"http://{shown}:{port}/v1")
    if host in ANY:
        note("chat.network", url=f"http://{_network_address()}:{port}/{query}")

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for connection in [*self.server_state.connections]:
                # an open page never hangs up by itself; answers that come are cut
                connection.transport.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False)
    with contextlib.suppress(KeyboardInterrupt):
        server = Server(config)
        server.run()
        if not server.started:
            raise SystemExit(3)  # as uvicorn does


def _network_address() -> str:
    """This machine's address in the local network: where a packet to another one would leave from;
    none is sent.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 80))  # an address of documentation (RFC 5737)
        except OSError:  # no network
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _check_port(host: str, port: int) -> None:
    """Raises UserError for an address that cannot be listened on, before a model is loaded."""
    if not 0 <= port < 2**16:  # some systems look at the last 16 bits only
        raise UserError("chat.port_number", port=port)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
            probe.bind(address)
    except OSError as error:
        other = (port + 1) % 2**16 or 7860
        raise UserError("chat.port", host=host, port=port, detail=error, other=other) from error


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandLine("chat")
    parser.take("models", nargs="*", metavar="RUN|MODEL")
    parser.take("--terminal", action="store_true")
    parser.take("--host", default="127.0.0.1", metavar="H")
    parser.take("--port", type=int, default=7860, metavar="P")
    parser.take("--questions", metavar="FILE")
    parser.take("--quantize", choices=("nf4", "none"))
    parser.take("--context", type=int, metavar="N")
    parser.take("--precision", choices=("bf16", "fp16", "fp32"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Open the model, then serve it or talk in the terminal; the latter ends with one JSON line."""
    arguments = _arguments(argv)
    from cllm.assembly import open_beside, open_model
    from cllm.data.sources import read_questions
    from cllm.runs import newest_run

    if arguments.context is not None and arguments.context < 1:
        raise UserError("chat.context", tokens=arguments.context)
    questions = read_questions(arguments.questions) if arguments.questions else None
    if not arguments.terminal:
        _check_port(arguments.host, arguments.port)
    name, *more = arguments.models or [newest_run()]
    note("chat.loading", model=name)
    loaded = open_model(
        name,
        precision=arguments.precision,
        quantize=arguments.quantize,
        context=arguments.context or 0,
        formats=() if arguments.quantize else ("none", "nf4"),
    )
    for other in more:
        note("chat.loading", model=other)
        open_beside(loaded, other)
    engine = loaded.engine()
    try:
        if not arguments.terminal:
            serve(loaded, engine, arguments.host, arguments.port, questions)
            return 0
        terminal = Terminal(loaded, engine)
        terminal.run()
        counts = {"turns": terminal.turns, "tokens": terminal.tokens}
        print()
        print_result({"model": str(name), **counts}, arguments.json)
    finally:
        engine.close()
    return 0


if __name__ == "__main__":
    from cllm.__main__ import run

    raise SystemExit(run("chat"))

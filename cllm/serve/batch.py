"""Many questions to several models at once: a file in, a table of all answers out."""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import tempfile
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path
from typing import Any

import gradio as gr

from cllm.assembly import Loaded
from cllm.data.message import Message
from cllm.data.sources import read_questions
from cllm.messages import UserError, to_json
from cllm.serve.answer import Answer, ModelError
from cllm.serve.engine import Engine
from cllm.serve.widgets import EACH, QUIET, Wanted, asked_of, texts_for

SHOWN = 100
"""Questions in the table; the file has all of them."""


class Batch:
    """A file of questions, the `models` that answer them, and the answers. `knobs`: the system
    prompt and the settings.
    """

    def __init__(self, t: Any, loaded: Loaded, engine: Engine, knobs: list[Any]) -> None:
        self.loaded, self.engine = loaded, engine
        self._files = tempfile.TemporaryDirectory(prefix="cllm-")  # until the program ends
        with gr.Accordion(t("batch"), open=False):
            names = list(loaded.models)
            self.models = gr.CheckboxGroup(names, value=names, show_label=False, container=False)
            with gr.Row():
                upload = gr.UploadButton(t("batch_file"), size="sm", min_width=120)
                stop = gr.Button(t("batch_stop"), size="sm", min_width=80)
                file = gr.DownloadButton(t("download"), size="sm", min_width=80, interactive=False)
            told = gr.Markdown(" ")
            table = gr.Dataframe(show_label=False, wrap=True, visible=False)
        inputs = [upload, self.models, *knobs]
        self._wanted = Wanted()
        upload.upload(self.answer, inputs, [told, table, file], **EACH)
        stop.click(self._wanted.drop, None, None, **QUIET)

    async def answer(
        self, request: gr.Request, path: str, names: list[str], *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """How many answers there are, and at last the table and the file; stopped, of the answers
        so far.
        """
        texts = texts_for(request)
        async with self._wanted.instead(request) as watch:
            try:
                tokenizer, first, sampling = asked_of(self.loaded, values)
                questions = read_questions(path)
                asked = [said if said[0].role == "system" else first + said for said in questions]
                answers = {
                    name: [
                        Answer(
                            self.engine,
                            tokenizer,
                            said,
                            sampling,
                            self.loaded.models[name],
                            shorten=True,
                        )
                        for said in asked
                    ]
                    for name in names or self.loaded.models
                }
                every = [*chain(*answers.values())]
                async for _ in watch(every):
                    done = sum(bool(answer.finish_reason) for answer in every)
                    told = texts["ui.batch_done"].format(done=done, total=len(every))
                    yield told, gr.skip(), gr.skip()
            except UserError as error:
                # not where the server keeps it
                told = str(error.args[0]).replace(path, Path(path).name)
                yield told, gr.skip(), gr.skip()
                return
            except ModelError as error:
                yield str(error.args[0]), gr.skip(), gr.skip()
        if not self._wanted.waits(request):  # another file took its place
            yield gr.skip(), *self._shown(asked, answers, texts, Path(path).stem)

    def _shown(
        self,
        asked: list[list[Message]],
        answers: dict[str, list[Answer]],
        texts: dict[str, str],
        name: str,
    ) -> tuple[Any, Any]:
        """The table, and the file; one that was stopped has said nothing."""
        told = [
            [answer.text if answer.finish_reason else "" for answer in answered]
            for answered in zip(*answers.values(), strict=True)
        ]
        lines = [
            to_json(
                {
                    "messages": [message.row() for message in said],
                    "answers": dict(zip(answers, row, strict=True)),
                }
            )
            for said, row in zip(asked, told, strict=True)
        ]
        # A folder of its own: other people's files may be called the same.
        out = Path(tempfile.mkdtemp(dir=self._files.name)) / f"{name}-answers.jsonl"
        out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        headers = [texts["ui.question"], *answers]
        cells = [[said[-1].content, *row] for said, row in zip(asked, told, strict=True)]
        shown = gr.Dataframe(
            {"headers": headers, "data": cells[:SHOWN]},
            visible=True,
            wrap=True,
            column_widths=[f"{100 / len(headers):.1f}%"] * len(headers),
        )
        return shown, gr.DownloadButton(value=str(out), interactive=True)

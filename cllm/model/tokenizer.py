"""The tokenizer of a model together with its template: what training, chat, evaluation and export
all encode with.

Text never yields special tokens; only a template's markup does. A directory written by
`Tokenizer.save` gives the same ids again.
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cllm.data.dialects import jinja
from cllm.data.encode import IGNORE_INDEX, Ids
from cllm.data.message import Message
from cllm.data.template import TEMPLATES, Chat, Segment, Template, render
from cllm.messages import UserError, note, read_json, to_json
from cllm.model import gguf
from cllm.model.chat_template import (
    call_tokens,
    choose_template,
    published_template,
    render_native,
    renders_like,
    restored_template,
)
from cllm.model.families import GGUF, family_of
from cllm.model.shards import write_json
from cllm.model.text_stream import TextStream
from cllm.model.vocabulary import Bpe, SentencePiece, Vocabulary, prefixed
from cllm.model.vocabulary_files import from_directory, from_gguf, to_gguf

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE_FILE = "template.json"
ITSELF = -1  # the label of ids that are their own labels
FILES = (
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt qwen.tiktoken"
)
_END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A vocabulary, a template, and the special tokens that both need. `source` is the directory or
    GGUF file it was read from, `config` its tokenizer_config.json (or the same made from the GGUF
    file's metadata).
    """

    vocabulary: Vocabulary
    template: Template
    bos_id: int | None
    eos_id: int
    pad_id: int
    source: Path
    config: Mapping[str, Any] = field(repr=False)
    # Of the model: its name in the table of families, or its native model_type.
    family: str = ""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; the model's embedding may have more rows."""
        return self.vocabulary.size

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids at which generation stops: the template's end token and further stops, and any
        end of text.
        """
        names = {self.template.end.strip(), *self.template.stop, *_END_OF_TEXT}
        return frozenset(
            {self.eos_id, *(id for name, id in self.vocabulary.control.items() if name in names)}
        )

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """The text's ids, without beginning or end. markup=True: names of control tokens in it
        become these tokens.
        """
        return self.encode_segments([Segment(text, False, markup)])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without control tokens."""
        return self.vocabulary.decode(list(ids))

    def piece(self, id: int) -> str:
        """One token for people to look at: a control token's name, else its text (U+FFFD for a part
        of a character).
        """
        hidden = id in self.vocabulary.hidden
        return self.vocabulary.name(id) if hidden else self.vocabulary.decode([id])

    def special_names(self) -> dict[str, str]:
        """bos_token, eos_token and pad_token, as other programs call them -> the token's name, ""
        where there is none.
        """
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {kind: "" if id is None else self.vocabulary.name(id) for kind, id in ids.items()}

    def stream(self, *, reply: bool = False, calls: bool = False) -> TextStream:
        """A decoder for ids that arrive one by one. reply=True: without the white space that opens
        an answer in ChatGLM's formats; calls=True: with the control tokens that calls are written
        with.
        """
        drop_blank = reply and bool(self.template.lead)
        named = call_tokens(self) if calls else {}
        return TextStream(self.decode, self.vocabulary.hidden, drop_blank=drop_blank, named=named)

    def segments(self, conversation: Chat, *, open_turn: bool = False) -> list[Segment]:
        """The conversation in this tokenizer's template (see `cllm.data.template.render`).

        Raises UserError if the tokenizer's own chat_template is used and refuses the conversation
        or cannot be trained on.
        """
        if self.template.jinja:
            return render_native(self, conversation, open_turn=open_turn)
        return render(conversation, self.template, open_turn=open_turn)

    def encode_chat(self, messages: Chat, open_turn: bool = True) -> list[int]:
        """The ids of a chat prompt, ending with the opening of the assistant's turn."""
        return self.encode_segments(self.segments(messages, open_turn=open_turn))[0]

    def encode_segments(self, segments: Iterable[Segment]) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of one conversation's segments, labels unshifted, IGNORE_INDEX where
        not supervised.

        Neighbouring texts are encoded as one string unless a control token, an empty segment or the
        edge of what is supervised stands between them.
        """
        ids, labels = self.encode_batch([segments])[0]
        return ids.tolist(), labels.tolist()

    def encode_batch(self, batch: Iterable[Iterable[Segment]]) -> list[Ids]:
        """`encode_segments` of many conversations: each different string is encoded once, on all
        cores.
        """
        plans = [self._plan(segments) for segments in batch]
        parts = (part for plan in plans for part, _ in plan)
        texts = list(dict.fromkeys(part for part in parts if isinstance(part, str)))
        known = dict(zip(texts, self.vocabulary.encode(texts), strict=True))
        examples = []
        for plan in plans:
            ids, labels = array("i"), array("i")
            for part, label in plan:
                new = known[part] if isinstance(part, str) else array("i", [part])
                ids += new
                labels += new if label == ITSELF else array("i", [label]) * len(new)
            examples.append((ids, labels))
        return examples

    def _pieces(self, segments: Iterable[Segment]) -> Iterator[tuple[str, int | None, int]]:
        """(text, id, label) of the parts of the segments: a control token has an id and no text, an
        empty segment neither; labels as in `_plan`.
        """
        control = self.vocabulary.control
        for text, supervised, markup, target in segments:
            label = ITSELF if supervised else IGNORE_INDEX
            for part in (self._split(text) if markup else (text,)) or ("",):
                if markup and part in control:
                    yield "", control[part], control[target] if supervised and target else label
                else:
                    yield part, None, label

    def _plan(self, segments: Iterable[Segment]) -> list[tuple[str | int, int]]:
        """Texts and control tokens, in order, with the label: IGNORE_INDEX where not supervised,
        ITSELF where the ids are their own labels.
        """
        plan: list[tuple[str | int, int]] = []
        runs = itertools.groupby(
            self._pieces(segments), key=lambda piece: (bool(piece[0]), piece[2])
        )
        for (of_text, label), run in runs:
            if not of_text:
                plan += [(id, label) for _, id, _ in run if id is not None]
                continue
            text = "".join([text for text, _, _ in run])
            if plan and isinstance(plan[-1][0], str) and self._strips:
                text = text.removeprefix(" ")  # the vocabulary puts one before every string
            plan.append((text, label))
        return plan

    @functools.cached_property
    def _strips(self) -> bool:
        """Whether a text behind a text loses its first blank."""
        return prefixed(self.vocabulary) and not self.template.apart

    @functools.cached_property
    def _split(self) -> Any:
        """Markup -> its control tokens and the texts between them, remembered."""
        names = sorted(self.vocabulary.control, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        return functools.lru_cache(maxsize=4096)(
            lambda text: tuple(part for part in pattern.split(text) if part)
        )

    def first_control(self, text: str) -> tuple[str, str]:
        """What stands in markup before its first control token, and that token; "" where there is
        none.
        """
        token = next((part for part in self._split(text) if part in self.vocabulary.control), "")
        return text[: text.index(token)] if token else text, token

    def with_stop(self) -> Tokenizer:
        """The same with the template's end token replaced by the tokenizer's own end of text.

        For base models that never trained the end token (see `end_token_untrained`). Raises
        UserError without another end of text.
        """
        old = self.template.end.strip()
        names = (self.vocabulary.name(self.eos_id), *_END_OF_TEXT)
        new = next(
            (name for name in names if name != old and name in self.vocabulary.control), None
        )
        if new is None:
            raise UserError("tokenizer.no_end", token=old, template=self.template.name)
        stop = (*self.template.stop, old)  # a model that was taught it elsewhere still ends there
        return replace(
            self,
            template=replace(self.template, end=self.template.end.replace(old, new), stop=stop),
        )

    @functools.cached_property
    def chat_template(self) -> str:
        """The template in Jinja: the tokenizer's own text if it renders the same (it may know
        tools), else `cllm.data.dialects.jinja`.

        "" if programs that encode the rendered text as one string would get other ids for a
        question: ChatGLM3 and Baichuan2 encode markup and words apart, which no chat_template can
        say.
        """
        text = published_template(self)
        if self.template.jinja or not text or not renders_like(self, text):
            text = jinja(self.template)
        if "enable_thinking" in self.template.jinja:
            thinking = str(self.template.thinking == "keep").lower()
            text = f"{{% set enable_thinking = {thinking} %}}{text}"
        question = [Message("user", "你好，今天 how are you?")]
        whole = "".join(segment.text for segment in self.segments(question, open_turn=True))
        return text if self.encode(whole, markup=True) == self.encode_chat(question) else ""

    def to_gguf(self, rows: int) -> dict[str, Any]:
        """The `tokenizer.` keys of a GGUF file for an embedding of `rows`: the end of a turn is its
        end of text, the template opens with the beginning. Raises UserError for a pre-tokenizer
        that llama.cpp has no name for.
        """
        vocabulary, original = self.vocabulary, self.source / "tokenizer.model"
        if (
            isinstance(vocabulary, Bpe)
            and original.is_file()
            and '"byte_fallback":true' in vocabulary.model.to_str()
        ):
            vocabulary = SentencePiece(original.read_bytes(), vocabulary.control)
        control = vocabulary.control
        ggml = to_gguf(vocabulary, rows) | {
            "add_bos_token": False,
            "bos_token_id": self.bos_id,
            "eos_token_id": control.get(self.template.end.strip(), self.eos_id),
            "padding_token_id": self.pad_id,
            "eot_token_id": next((control[n] for n in self.template.stop if n in control), None),
        }
        keys = {f"ggml.{key}": value for key, value in ggml.items() if value is not None}
        return keys | ({"chat_template": self.chat_template} if self.chat_template else {})

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files, `template.json` and, as far as Jinja can say it, the same
        template as chat_template.jinja.

        `load_tokenizer` of the directory gives the same ids. The base's own chat_template stays
        behind.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if self.source.is_dir():
            for name in FILES.split():
                if (self.source / name).is_file() and self.source.resolve() != directory.resolve():
                    shutil.copyfile(self.source / name, directory / name)
        else:
            self.vocabulary.save(directory)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        write_json(directory / "tokenizer_config.json", config)
        if self.chat_template:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        kept = ("tokenizer_class", "auto_map", "added_tokens_decoder")
        original = {key: value for key, value in config.items() if key in kept}
        if isinstance(self.vocabulary, SentencePiece):
            # tokenizer.model goes before a tokenizer.json made from it
            original.setdefault("auto_map", {})
        saved = {
            "family": self.family,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "template": asdict(self.template),
            "tokenizer": original,
        }
        write_json(directory / TEMPLATE_FILE, saved)


def portable(tokenizer: Tokenizer, directory: Path) -> None:
    """Make a saved tokenizer readable without this package: a tokenizer.json, under a class of
    Transformers' own.
    """
    config = dict(tokenizer.config)
    config.pop("chat_template", None)
    if (
        isinstance(tokenizer.vocabulary, SentencePiece)
        or "auto_map" in config
        or not (directory / "tokenizer.json").is_file()
    ):
        tokenizer.vocabulary.save_json(directory)
        for key in ("auto_map", "added_tokens_decoder", "backend"):
            config.pop(key, None)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config |= {kind: name for kind, name in tokenizer.special_names().items() if name}
    write_json(directory / "tokenizer_config.json", config)


# --- Loading
def load_tokenizer(
    path: Path | str, template: str = "auto", thinking: Literal["off", "keep"] = "off"
) -> Tokenizer:
    """The tokenizer in a model directory, a GGUF file or a directory written by `Tokenizer.save`.

    template: "auto" takes the saved template, else the family's, else the one of ours that renders
    like the tokenizer's chat_template, else that chat_template itself, else ChatML or plain;
    "native" insists on the chat_template; else a name in `TEMPLATES`. thinking: what formats with
    <think> blocks do with the reasoning (a saved template keeps its own setting). Raises UserError
    for a missing, damaged or unknown vocabulary and for an unknown template.
    """
    path = Path(path)
    saved: dict[str, Any] = {}
    if path.is_dir():
        config = _read_json(path / "special_tokens_map.json") | _read_json(
            path / "tokenizer_config.json"
        )
        if (jinja := path / "chat_template.jinja").is_file():
            config["chat_template"] = jinja.read_text(encoding="utf-8")
        model, saved = _read_json(path / "config.json"), _read_json(path / TEMPLATE_FILE)
        config |= saved.get("tokenizer", {})  # what an export told Transformers instead
        vocabulary: Vocabulary = from_directory(path, config)
        family = family_of(model)
    elif path.is_file():
        metadata = gguf.read_header(path).metadata
        vocabulary, config, model = from_gguf(metadata), _gguf_config(metadata), {}
        family = GGUF.get(metadata.get("general.architecture", ""))
    else:
        raise UserError("tokenizer.missing", path=path)
    bos_id, eos_id, pad_id = (
        saved.get(f"{kind}_id", _special(vocabulary, config, model, kind))
        for kind in ("bos", "eos", "pad")
    )
    ends = [vocabulary.control[name] for name in _END_OF_TEXT if name in vocabulary.control]
    if eos_id is None and not ends:
        raise UserError("tokenizer.no_end", token="eos_token", template=template)
    eos_id = ends[0] if eos_id is None else eos_id
    unset = Tokenizer(
        vocabulary=vocabulary,
        template=TEMPLATES["plain"],
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        source=path,
        config=config,
        family=saved.get("family") or (family.name if family else model.get("model_type", "")),
    )
    if template == "auto" and saved:
        try:
            return replace(unset, template=restored_template(saved["template"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError("tokenizer.damaged", path=path / TEMPLATE_FILE, detail=error) from error
    # A GGUF file's own chat_template says more than its architecture.
    published = path.is_file() and "chat_template" in config
    usual = family.template if family and not published else "auto"
    return replace(unset, template=choose_template(unset, template, usual, model, thinking))


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's keys from GGUF metadata."""
    llama = metadata.get("tokenizer.ggml.model") == "llama"
    config = {"add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", llama)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = metadata["tokenizer.ggml.tokens"][id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def _special(
    vocabulary: Vocabulary, config: Mapping[str, Any], model: Mapping[str, Any], kind: str
) -> int | None:
    """The id of the bos, eos or pad token: by name in tokenizer_config.json, else by id in
    config.json.
    """
    name = config.get(f"{kind}_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    id = vocabulary.id(name) if isinstance(name, str) else model.get(f"{kind}_token_id")
    id = id[0] if isinstance(id, list) and id else id
    return id if isinstance(id, int) and 0 <= id < vocabulary.size else None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# --- Preflight
def within(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer for an embedding of `rows`; a pad token that has none gives way to the end of
    text, because what it pads is masked.

    Raises UserError if a text or the template can yield other tokens that have none.
    """
    markup = to_json(asdict(tokenizer.template))
    control = tokenizer.vocabulary.control.items()
    unused = {id for name, id in control if name not in markup} - {tokenizer.eos_id}
    names = {id: tokenizer.vocabulary.name(id) for id in range(rows, tokenizer.vocab_size)}
    beyond = [f"{name} ({id})" for id, name in names.items() if name and id not in unused]
    if beyond:
        raise UserError(
            "tokenizer.beyond",
            path=tokenizer.source,
            rows=rows,
            count=len(beyond),
            tokens=", ".join(beyond[:8]),
        )
    return tokenizer if tokenizer.pad_id < rows else replace(tokenizer, pad_id=tokenizer.eos_id)


def with_trained_end(tokenizer: Tokenizer, model: Any) -> Tokenizer:
    """The tokenizer, `with_stop` (and a note) if `model` never trained the end token of its
    template: it could not learn to stop.
    """
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    # a tied head has the same rows, a 4-bit one none to look at
    rows = {id(m.weight): m.weight for m in modules if hasattr(m, "weight")}
    if not end_token_untrained(tokenizer, *rows.values()):
        return tokenizer
    changed = tokenizer.with_stop()
    note(
        "tokenizer.end_untrained",
        before=tokenizer.template.end.strip(),
        after=changed.template.end.strip(),
    )
    return changed


def end_token_untrained(tokenizer: Tokenizer, *matrices: Tensor) -> bool:
    """Whether the template's end token was never trained, by its rows in `matrices`: the embedding
    (V, D) and, if untied, the head.

    Rows that nothing was ever trained on (beyond the vocabulary, or named unused or reserved) stay
    close together. The token is untrained if in any of the matrices its row is as close to their
    mean as they are (1.5 times their median distance), and they lie closer to it (half the median
    distance) than tokens in general. False where there are fewer than 4 such rows.
    """
    end = tokenizer.vocabulary.control.get(tokenizer.template.end.strip(), tokenizer.eos_id)
    unused = re.compile(r"unused|reserved|extra_\d", re.IGNORECASE)
    named = {id for name, id in tokenizer.vocabulary.control.items() if unused.search(name)} - {end}
    for matrix in matrices:
        never = sorted(
            {*(id for id in named if id < len(matrix)), *range(tokenizer.vocab_size, len(matrix))}
        )
        if len(never) < 4:
            continue
        mean = matrix[never].float().mean(0)
        usual, near, distance = (
            float((rows.float() - mean).norm(dim=1).median())
            for rows in (matrix[: tokenizer.vocab_size : 97], matrix[never], matrix[[end]])
        )
        if near < 0.5 * usual and distance <= max(1.5 * near, 1e-3 * usual):
            return True
    return False

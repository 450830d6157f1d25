"""Text from token ids that arrive one by one."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping


class TextStream:
    """Text from ids one at a time: no piece holds half a character, and joined they are `decode` of
    all ids.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        hidden: Container[int],
        *,
        drop_blank: bool = False,
        named: Mapping[int, str] | None = None,
    ) -> None:
        self._decode, self._hidden = decode, hidden
        self._named = named or {}  # control tokens that are shown all the same
        self._blank = drop_blank  # still at the white space to be dropped
        self._ids: list[int] = []
        # ids before `_read` are out; those from `_start` on give the next ones their context
        self._start = self._read = 0

    def push(self, id: int) -> str:
        """The text that `id` completes; "" while a character is still incomplete."""
        if id in self._named:
            self._blank = False
            return self.end() + self._named[id]
        if id in self._hidden:
            return ""
        self._ids.append(id)
        text = self._decode(self._ids[self._start :])
        return "" if text.endswith("\ufffd") else self._emit(text)

    def end(self) -> str:
        """What was held back."""
        return self._emit(self._decode(self._ids[self._start :]))

    def _emit(self, text: str) -> str:
        new = text[len(self._decode(self._ids[self._start : self._read])) :]
        self._start, self._read = self._read, len(self._ids)
        if self._blank:
            new = new.lstrip()
            self._blank = not new
        return new

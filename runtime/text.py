"""From token ids to text that can be shown at once."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one sequence as it grows: whole characters only, cut before the first stop string.

    Text that may yet turn out to be the beginning of a stop string is held back until that is decided.

    Args:
        tokenizer: a Hugging Face tokenizer with a byte-level decoder.
        stop: the strings at which the text ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._undecoded: list[int] = []  # tokens that end within a character
        self._held = ""  # text that could begin a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain; sets `stopped` when a stop string is complete."""
        self._undecoded.append(token)
        decoded = self._decode()
        if decoded.endswith(_INCOMPLETE):
            return ""
        self._undecoded.clear()
        return self._emit(decoded)

    def finish(self) -> str:
        """What was held back, when no token follows. Bytes that make no character become U+FFFD."""
        if self.stopped:
            return ""
        shown = self._emit(self._decode())
        self._undecoded.clear()
        held, self._held = self._held, ""
        self.text += held
        return shown + held

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(
            self._undecoded, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _emit(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = text[: min(found)], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

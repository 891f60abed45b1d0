"""Texts as windows of tokens, and which texts were used for what.

Shape legend: n windows, S tokens of a window.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dejavu.predictors.files import Source

DOCUMENT_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Corpus:
    """``windows int64[n, S + 1]``: the token that begins prompts, then S tokens of the text."""

    windows: Tensor
    file: str
    sha256: str
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many tokens of the text the windows hold."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)

    def source(self, use: Literal["train", "calibrate"]) -> Source:
        """What a manifest keeps of it."""
        return Source(
            use=use,
            file=self.file,
            sha256=self.sha256,
            start=self.start,
            stop=self.stop,
            tokens=self.tokens,
        )

    def check_unused(self, sources: Sequence[Source], what: str) -> None:
        """Whether predictors have not seen this text before.

        Raises:
            ValueError: they were trained or calibrated on a part of it.
        """
        for source in sources:
            if source.sha256 == self.sha256 and source.start < self.stop and self.start < source.stop:
                raise ValueError(
                    f"{self.file}, characters {self.start} to {self.stop}: {what} has used characters "
                    f"{source.start} to {source.stop} of this text to {source.use}; "
                    "take another text or --part"
                )


def read_corpus(
    path: Path, tokenizer: Any, *, window: int, part: str = "1/1", max_tokens: int | None = None
) -> Corpus:
    """Reads a text and cuts it into windows; documents are separated by lines ``<|endoftext|>``.

    Args:
        path: UTF-8 text.
        tokenizer: puts its first token before every document and, here, before every window.
        window: S.
        part: ``i/n``, the i-th of n equal parts of the characters.
        max_tokens: use no more windows than hold so many, spread evenly over the text.

    Raises:
        ValueError: the file can't be read, is empty or too short for a window, or ``part`` is none.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ValueError(f"cannot read {path}: {reason}") from None
    start, stop = _bounds(part, len(text))
    if not text[start:stop].strip():
        raise ValueError(f"{path} is empty" if part == "1/1" else f"part {part} of {path} is empty")
    documents = re.split(rf"^{re.escape(DOCUMENT_END)}$", text[start:stop], flags=re.MULTILINE)
    ids: list[int] = []
    for document in filter(None, map(str.strip, documents)):
        ids += tokenizer(document, verbose=False).input_ids
    n = len(ids) // window
    if n == 0:
        raise ValueError(f"{path} is too short: {len(ids)} tokens, and a window has {window}")
    stream = torch.tensor(ids[: n * window]).view(n, window)
    if max_tokens is not None and max_tokens < n * window:
        if max_tokens < window:
            raise ValueError(f"tokens={max_tokens} is less than the {window} of a window")
        stream = stream[torch.arange(max_tokens // window) * n // (max_tokens // window)]
    first = torch.full((len(stream), 1), ids[0])
    digest = hashlib.sha256(data).hexdigest()
    return Corpus(torch.cat([first, stream], dim=1), path.name, digest, start, stop)


def _bounds(part: str, length: int) -> tuple[int, int]:
    i, _, n = part.partition("/")
    if not (i.isascii() and i.isdigit() and n.isascii() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise ValueError(f"part={part!r} is not of the form i/n, as 1/2 for the first half")
    return length * (int(i) - 1) // int(n), length * int(i) // int(n)

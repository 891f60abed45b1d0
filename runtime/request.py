"""One prompt on its way to its answer."""

from dataclasses import dataclass, field
from typing import Literal

from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.text import TextStream

FinishReason = Literal["stop", "length", "preempted"]


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one prompt. ``finish_reason``: ``stop`` (stop string or end of text), ``length``, or
    ``preempted`` (told to stop; the text is what there was by then)."""

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(slots=True)
class Request:
    """A prompt on its way to a `Result`."""

    index: int
    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def push(self, token: int, eos_token_id: int) -> str:
        """Takes the next token, decides whether it is the last, and returns the text that became certain."""
        self.token_ids.append(token)
        text = self.stream.push(token)
        if self.stream.stopped or (token == eos_token_id and not self.params.ignore_eos):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"
        return text

    def preempt(self) -> str:
        """Ends it where it is, if it has not ended; returns the text that was held back."""
        if self.finish_reason is not None:
            return ""
        text = self.stream.finish()
        self.finish_reason = "stop" if self.stream.stopped else "preempted"
        return text

    def result(self) -> Result:
        assert self.finish_reason is not None
        return Result(self.prompt, self.stream.text, self.token_ids, self.finish_reason)

"""The `dejavu` command in this process, and a text to run it on."""

import io
import json
import random
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from dejavu.launch import cli

WHO = ["The old man", "The captain", "A boy", "His sister", "The doctor", "Nobody in the village"]
DID = ["looked at", "had never seen", "thought of", "was afraid of", "went down to", "came back from"]
WHAT = ["the sea", "the dark house", "the long road", "her letters", "a ship in the harbour", "the hill"]
WHEN = ["in the morning", "when the night came", "after the war", "for a long time", "without a word"]


def dejavu(*arguments):
    """Runs the command in this process: (status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["dejavu", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
    return exit.value.code or 0, out.getvalue(), err.getvalue()


def last_object(out):
    return json.loads(out.splitlines()[-1])


def sentences(n, *parts):
    """``n`` lines of one word or phrase of each part, always the same."""
    draw = random.Random(1)
    return "\n".join(" ".join(draw.choice(part) for part in parts) + "." for _ in range(n))

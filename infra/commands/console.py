"""What a command says to a person, and how the person confirms: by typing a word, or by naming it in CONFIRM."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping


class Console:
    """Lines on standard output, answers from the terminal. There is no answer that fits all questions."""

    def __init__(self, environ: Mapping[str, str], *, dry_run: bool = False) -> None:
        self._given = {word for word in re.split(r"[,\s]+", environ.get("CONFIRM", "")) if word}
        self.dry_run = dry_run

    def say(self, text: str = "") -> None:
        """One line, at once: whoever waits wants to see that something happens."""
        print(text, flush=True)  # noqa: T201

    def confirms(self, word: str, question: str) -> bool:
        """Whether the person wants it. `question` says what will happen; nothing but the very word is a yes."""
        if self.dry_run:
            self.say(f"  (would ask: {question}; the word is {word})")
            return False
        if word in self._given:
            self.say(f"{question}: yes, CONFIRM says {word}")
            return True
        if not sys.stdin.isatty():
            self.say(f"{question}: not confirmed; run this in a terminal, or add the word to CONFIRM: {word}")
            return False
        try:
            answer = input(f"{question}.\nType {word} to do it, anything else to leave it: ").strip()
        except EOFError:
            answer = ""
        if answer != word:
            self.say("Left as it is.")
        return answer == word

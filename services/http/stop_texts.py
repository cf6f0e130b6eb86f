"""Texts that end an answer: none of it is told that may be the beginning of one."""

from collections.abc import Sequence


class StopTexts:
    def __init__(self, texts: Sequence[str]) -> None:
        self.was_met = False
        self._texts = tuple(texts)
        self._held = ""  # a beginning of one of them, maybe

    def passed(self, text: str) -> str:
        """What can be told, once `text` has come. After the first stop text that is nothing."""
        if self.was_met:
            return ""
        text = self._held + text
        found = [at for stop in self._texts if (at := text.find(stop)) >= 0]
        if found:
            self.was_met, self._held = True, ""
            return text[: min(found)]
        num_held = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def rest(self) -> str:
        """At the end: what was held back after all."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

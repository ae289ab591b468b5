"""The words of two prompts and their tokens, and which of them stand for each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...diffusion.pipeline import as_encoded, tokenizers_of


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, as spaces part them."""
    return prompt.split()


def places_of(words: Iterable[str], prompt: str) -> list[int]:
    """Where words occur in a prompt, whatever their case and punctuation.

    Args:
        words: Words, or several words in one text, of which each is looked up.
        prompt: Prompt.

    Returns:
        Numbers of the prompt's words, ascending; every place of a word that occurs repeatedly.

    Raises:
        ValueError: a word is not in the prompt; it names all that are not, and the prompt's.
    """
    present = words_of(prompt)
    plain = [_plain(word) for word in present]
    wanted = [word for text in words for word in words_of(text)]
    absent = [word for word in wanted if _plain(word) not in plain]
    if absent:
        raise ValueError(
            f"no {', '.join(map(repr, absent))} among the words of {prompt!r}; take some of these: "
            f"{', '.join(dict.fromkeys(present))}"
        )
    sought = {_plain(word) for word in wanted}
    return [place for place, word in enumerate(plain) if word in sought]


def check_word_counts(source: str, target: str) -> None:
    """Raise ValueError where two prompts cannot be mapped word to word."""
    counts = [len(words_of(text)) for text in (source, target)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{source!r} has {counts[0]} words and {target!r} has {counts[1]}; a word can be "
            "replaced only where there are equally many. Write as many, or map by alignment "
            "(mapping='refine')"
        )


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a text encoder sees it.

    Args:
        text: Text of the prompt.
        tokens: Tokens, begin and end marks included, without what was cut off or filled up.
        of_words: Positions of each word's tokens; none of a word that was cut off.
        length: Number L of tokens that it is filled up to.
    """

    text: str
    tokens: tuple[int, ...]
    of_words: tuple[tuple[int, ...], ...]
    length: int

    @property
    def first(self) -> int:
        """The position of the first word's first token."""
        return len(self.tokens) - 1 - sum(map(len, self.of_words))

    @property
    def end(self) -> int:
        """The position of the end mark."""
        return len(self.tokens) - 1

    def positions(self, places: Iterable[int]) -> list[int]:
        """The positions of the tokens of some words.

        Args:
            places: Numbers of the words, as `places_of` gives them.

        Raises:
            ValueError: a word was cut off because the prompt is too long.
        """
        words = words_of(self.text)
        chosen = list(places)
        lost = [words[place] for place in chosen if not self.of_words[place]]
        if lost:
            raise ValueError(
                f"{', '.join(map(repr, lost))} in {self.text!r} is cut off, because the text "
                f"encoder takes {self.length} tokens; write a shorter prompt"
            )
        return [position for place in chosen for position in self.of_words[place]]


def prompt_tokens(pipeline: Any, prompt: str) -> PromptTokens:
    """The tokens of a prompt as the pipeline's text encoder gets them.

    Both of Stable Diffusion XL's tokenizers are CLIP's and cut words alike.

    Raises:
        ValueError: the tokenizer joins words, so that no tokens belong to one word alone, or two
            tokenizers cut them differently.
    """
    found, *others = (_tokens_by(pipeline, each, prompt) for each in tokenizers_of(pipeline))
    if any(other.of_words != found.of_words for other in others):
        raise ValueError(
            f"the pipeline's two tokenizers cut {prompt!r} differently, so no tokens belong to one "
            "word alone; load a textual inversion into both tokenizers and text encoders, with as "
            "many vectors"
        )
    return found


def _tokens_by(pipeline: Any, tokenizer: Any, prompt: str) -> PromptTokens:
    length: int = tokenizer.model_max_length
    text = as_encoded(pipeline, prompt, tokenizer)
    whole: list[int] = tokenizer(text, truncation=False, verbose=False).input_ids
    words = [as_encoded(pipeline, word, tokenizer) for word in words_of(prompt)]
    by_word = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    joined = [token for word in by_word for token in word]
    first = len(whole) - 1 - len(joined)
    if first < 0 or whole[first:-1] != joined:
        raise ValueError(
            f"the tokenizer, a {type(tokenizer).__name__}, does not cut {prompt!r} word by word; "
            "take a method that needs no words, such as pnp"
        )
    end = min(len(whole), length) - 1
    places, start = [], first
    for word in by_word:
        stop = start + len(word)
        places.append(tuple(range(start, min(stop, end))))
        start = stop
    return PromptTokens(prompt, (*whole[:end], whole[-1]), tuple(places), length)


@dataclass(frozen=True)
class ColumnMap:
    """Columns of the source's text maps in the order of the target's tokens.

    Args:
        matrix: Weights [L, L] of each source token (row) for each target token (column).
        share: Share [L] of the source in each target token's column, 0 ... 1.
    """

    matrix: torch.Tensor
    share: torch.Tensor

    def __call__(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The source's maps as the target's, and the target's own where there are none.

        Args:
            source: Source's maps [..., L], float32.
            target: Target's maps [..., L], float32.

        Returns:
            [..., L]; rows are not renormalised.
        """
        return source @ self.matrix * self.share + target * (1 - self.share)

    def to(self, device: torch.device) -> ColumnMap:
        """The same map on a device."""
        return ColumnMap(self.matrix.to(device), self.share.to(device))


def refined_columns(source: PromptTokens, target: PromptTokens) -> ColumnMap:
    """Prompt-to-prompt's refinement: tokens that both prompts have map to each other.

    Target tokens without a counterpart keep their own column. After the end marks (which the
    released code maps by the number of tokens of the target) filling maps to filling.

    Source: arXiv 2208.01626; the alignment is Needleman's and Wunsch's.
    """
    matrix = torch.zeros(source.length, target.length)
    for column, row in enumerate(alignment(source.tokens, target.tokens)):
        if row is not None:
            matrix[row, column] = 1.0
    return _filled(matrix, source.end + 1, target.end + 1)


def replaced_columns(source: PromptTokens, target: PromptTokens) -> ColumnMap:
    """Prompt-to-prompt's word swap: the words map to each other one by one.

    Tokens of two words map in order where there are equally many, and each source token evenly to
    all of the target's otherwise.

    Raises:
        ValueError: the prompts have different numbers of words.

    Source: arXiv 2208.01626.
    """
    check_word_counts(source.text, target.text)
    matrix = torch.zeros(source.length, target.length)
    for row, column in zip(range(source.first), range(target.first), strict=True):
        matrix[row, column] = 1.0
    for rows, columns in zip(source.of_words, target.of_words, strict=True):
        if len(rows) == len(columns):
            matrix[rows, columns] = 1.0
        else:
            for row in rows:
                matrix[row, columns] = 1.0 / max(1, len(columns))
    return _filled(matrix, source.end, target.end)


def _filled(matrix: torch.Tensor, row: int, column: int) -> ColumnMap:
    """The map that goes on one to one from here to where either prompt's tokens are at an end."""
    length = matrix.shape[0]
    count = length - max(row, column)
    matrix[range(row, row + count), range(column, column + count)] = 1.0
    return ColumnMap(matrix, (matrix.sum(0) > 0).float())


def alignment(source: Sequence[Hashable], target: Sequence[Hashable]) -> list[int | None]:
    """The best alignment of two sequences: gap 0, match 1, mismatch -1.

    A mismatch is worse than two gaps, so only equal items are aligned. Where alignments are equally
    good, seen from the end, the target's item is left without a counterpart, else the source's.

    Args:
        source: Items.
        target: Items.

    Returns:
        Place in `source` of each item of `target`, None where it has no counterpart.

    Source: Needleman and Wunsch, J. Mol. Biol. 48 (1970).
    """
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for row, item in enumerate(source, 1):
        for column, other in enumerate(target, 1):
            step = 1 if item == other else -1
            best[row][column] = max(
                best[row][column - 1], best[row - 1][column], best[row - 1][column - 1] + step
            )
    found: list[int | None] = [None] * len(target)
    row, column = len(source), len(target)
    while row and column:
        if best[row][column] == best[row][column - 1]:
            column -= 1
        elif best[row][column] == best[row - 1][column]:
            row -= 1
        else:
            row, column = row - 1, column - 1
            found[column] = row
    return found


def _plain(word: str) -> str:
    """A word without case and punctuation; punctuation alone stays as it is."""
    folded = word.casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or folded

"""Two prompts' words and tokens: which stand for each other, and which are found where."""

from __future__ import annotations

import pytest
import torch
from pipelines import make_pipeline, tokens_of, with_textual_inversion

from stem.editing.maps.prompts import (
    alignment,
    places_of,
    prompt_tokens,
    refined_columns,
    replaced_columns,
)


def test_replaced_words_map_in_order_or_evenly() -> None:
    source, target = tokens_of("a cat ox"), tokens_of("a dog cow")
    columns = replaced_columns(source, target)
    expected = torch.zeros(12, 12)
    expected[range(5), range(5)] = 1.0  # begin, "a", "cat" -> "dog"
    expected[5:7, 5:8] = 1 / 3  # "ox" -> "cow"
    expected[range(7, 11), range(8, 12)] = 1.0  # end mark and filling
    assert torch.equal(columns.matrix, expected)
    assert torch.equal(columns.share, torch.ones(12))

    back = replaced_columns(target, source)
    assert torch.equal(back.matrix[5:8, 5:7], torch.full((3, 2), 0.5))
    assert back.share.tolist() == [1.0] * 11 + [0.0]  # no filling is left for the last column
    maps, own = torch.rand(2, 12), torch.rand(2, 12)
    assert torch.equal(back(maps, own)[:, 11], own[:, 11])
    torch.testing.assert_close(back(maps, own)[:, :11].sum(1), maps.sum(1))
    with pytest.raises(ValueError, match=r"has 2 words and 'a b c' has 3; .*mapping='refine'"):
        replaced_columns(tokens_of("a b"), tokens_of("a b c"))


def test_refined_words_keep_their_own_columns_where_they_are_new() -> None:
    source, target = tokens_of("a ox ran", 13), tokens_of("a big ox ran", 13)
    assert alignment("axy", "abxz") == [0, None, 1, None]
    assert alignment("ab", "ba") == [1, None]  # ties: from the end, the target's item is left
    columns = refined_columns(source, target)
    assert columns.share.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    placed = columns.matrix.argmax(0)
    assert placed[columns.share > 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert refined_columns(target, source).share.tolist() == [1.0] * 10 + [0.0] * 3
    maps = torch.rand(3, 13)
    torch.testing.assert_close(refined_columns(source, source)(maps, -maps), maps)


def test_words_are_found_whatever_their_case_and_punctuation() -> None:
    prompt = "A duck's pond, a Lake; and a pond."
    assert places_of(["POND", "lake!"], prompt) == [2, 4, 7]
    assert places_of(["duck's pond"], prompt) == [1, 2, 7]
    with pytest.raises(ValueError, match=r"no 'sea', 'cat' among the words .* A, duck's, pond,"):
        places_of(["sea", "cat", "lake"], prompt)


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_tokens_of_a_prompt_that_is_cut_off(shape: str) -> None:
    pipeline = make_pipeline(shape)
    found = prompt_tokens(pipeline, "A duck's T-shirt, big")
    assert found.first == 1
    assert [position for word in found.of_words for position in word] == list(range(1, found.end))
    assert all(found.of_words)
    long = prompt_tokens(pipeline, "duck " * 60 + "end")
    assert (long.end, len(long.tokens), long.length) == (76, 77, 77)
    kept = [position for word in long.of_words for position in word]
    assert kept == list(range(1, 76))
    with pytest.raises(ValueError, match=r"'end' in 'duck .* cut off, .* 77 tokens"):
        long.positions([60])
    assert refined_columns(found, long).matrix.shape == (77, 77)


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_a_word_of_several_vectors_has_as_many_tokens(shape: str) -> None:
    pipeline = with_textual_inversion(shape, vectors=3)
    found = prompt_tokens(pipeline, "a <cat>, red <cat>")
    # A letter is a token, the comma, too.
    assert found.of_words == ((1,), (2, 3, 4, 5), (6, 7, 8), (9, 10, 11))
    given = pipeline.maybe_convert_prompt("a <cat>, red <cat>", pipeline.tokenizer)
    assert list(found.tokens) == pipeline.tokenizer(given).input_ids
    assert found.positions(places_of(["red"], found.text)) == [6, 7, 8]
    # 72 letters and the first two vectors fit; the embeddings say so, too.
    long = prompt_tokens(pipeline, "abc " * 24 + "ab <cat> red")
    assert long.of_words[25:] == ((75,), ())
    with pytest.raises(ValueError, match=r"'red' in .* cut off"):
        long.positions([26])
    # Words map to words across prompts, as without textual inversion.
    columns = replaced_columns(prompt_tokens(pipeline, "a dog, red <cat>"), found)
    assert columns.matrix[5, 6] == 0
    assert columns.matrix[[6, 7, 8], [6, 7, 8]].tolist() == [1.0] * 3


def test_a_word_that_two_encoders_cut_differently_is_refused() -> None:
    pipeline = with_textual_inversion("sdxl", encoders=1)
    assert prompt_tokens(pipeline, "a dog").end == 5
    with pytest.raises(ValueError, match=r"two tokenizers cut 'a <cat>' differently.*into both"):
        prompt_tokens(pipeline, "a <cat>")

"""Scenes, captions and the oracle that reads pictures back."""

from __future__ import annotations

import numpy as np
import pytest

from demo.oracle import read, score
from demo.scenes import (
    COLOURS,
    KINDS,
    RELATIONS,
    SIZE,
    Kind,
    Placed,
    Prompt,
    describe,
    draw,
    random_prompts,
    random_scene,
    relation_between,
    split_of,
)
from demo.vocabulary import LENGTH, TOKENS, read_caption, split_words, tokenize

RED, BLUE = Kind("red", "circle"), Kind("blue", "square")


def scenes(count: int, split: str = "train", seed: int = 1) -> list[list[Placed]]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, split) for _ in range(count)]


def kinds(objects) -> list[Kind]:
    return sorted(placed.kind for placed in objects)


def test_the_oracle_reads_what_was_drawn():
    for scene in scenes(300):
        seen = read(draw(scene))
        assert kinds(seen) == kinds(scene)
        for placed in scene:
            (found,) = [other for other in seen if other.kind == placed.kind]
            assert max(abs(found.x - placed.x), abs(found.y - placed.y), abs(found.radius - placed.radius)) < 0.6


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", KINDS)
def test_the_oracle_knows_every_shape_in_every_colour_at_every_size(colour, shape):
    for radius in (7.5, 8.3, 9.5):
        for x, y in ((10.5, 53.2), (32.0, 32.0)):
            (found,) = read(draw([Placed(Kind(colour, shape), x, y, radius)]))
            assert found.kind == Kind(colour, shape)


def test_the_oracle_reads_noisy_pictures():
    rng = np.random.default_rng(3)
    right = 0
    for scene in scenes(200, seed=2):
        noisy = np.clip(draw(scene) + rng.normal(0, 15, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
        right += kinds(read(noisy)) == kinds(scene)
    assert right >= 198


def test_the_oracle_sees_no_shape_where_there_is_none():
    blank = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    assert read(blank) == []
    bar, speck = blank.copy(), blank.copy()
    bar[30:34, 4:60] = COLOURS["red"]
    speck[20:23, 20:24] = COLOURS["blue"]
    assert read(bar) == [] and read(speck) == []


def test_captions_are_true():
    rng = np.random.default_rng(5)
    related = 0
    for scene in scenes(300):
        prompt = describe(scene, rng)
        assert sorted(prompt.objects) == kinds(scene)
        if prompt.relation:
            first, words, second = prompt.relation
            one, other = (next(p for p in scene if p.kind == kind) for kind in (first, second))
            assert relation_between(one.x - other.x, one.y - other.y) == words
            related += 1
        result = score(prompt, read(draw(scene)))
        assert result.complete and result.f1 == 1 and result.relation in (None, True)
    assert related > 90


def test_a_caption_can_be_read():
    for prompt in random_prompts(300, "train", seed=1):
        assert read_caption(prompt.text) == prompt


def test_exactly_one_relation_holds_for_a_clear_pair():
    assert [relation_between(dx, dy) for dx, dy in ((-9, 2), (9, 2), (2, -9), (2, 9))] == list(RELATIONS)
    assert relation_between(5, 5) is None and relation_between(9, 2, clear=8) is None


def test_held_out_objects_are_never_trained_on():
    """Whatever their order: the split is of sets of objects."""
    sets = {split: {frozenset(p.objects) for p in random_prompts(300, split, seed=0)} for split in ("tune", "report")}
    assert not sets["tune"] & sets["report"]
    for split, objects in sets.items():
        assert all(split_of(list(some)) == split == split_of(sorted(some, reverse=True)) for some in objects)
    trained = {frozenset(p.kind for p in scene) for scene in scenes(2000)}
    assert not trained & (sets["tune"] | sets["report"])


def test_prompts_are_seeded_and_differ():
    texts = [prompt.text for prompt in random_prompts(200, "report", seed=4)]
    assert texts == [prompt.text for prompt in random_prompts(200, "report", seed=4)]
    assert len(set(texts)) == 200
    assert texts != [prompt.text for prompt in random_prompts(200, "report", seed=5)]


@pytest.mark.parametrize(
    ("seen", "recall", "f1", "relation"),
    [
        ([Placed(RED, 10, 30, 8), Placed(BLUE, 50, 30, 8)], 1.0, 1.0, True),
        ([Placed(RED, 50, 30, 8), Placed(BLUE, 10, 30, 8)], 1.0, 1.0, False),
        ([Placed(RED, 10, 30, 8)], 0.5, 2 / 3, None),
        ([Placed(RED, 10, 30, 8), Placed(RED, 30, 30, 8), Placed(BLUE, 50, 30, 8)], 1.0, 0.8, True),
        ([Placed(Kind("blue", "circle"), 10, 30, 8), Placed(Kind("red", "square"), 50, 30, 8)], 0.0, 0.0, None),
        ([], 0.0, 0.0, None),
    ],
)
def test_scores(seen, recall, f1, relation):
    result = score(Prompt("a red circle left of a blue square", (RED, BLUE), (RED, "left of", BLUE)), seen)
    assert (result.recall, result.f1, result.relation) == (recall, pytest.approx(f1), relation)


def test_every_caption_fits_and_tokens_are_padded_with_the_end():
    for prompt in random_prompts(300, "train", seed=2):
        tokens = tokenize(prompt.text)
        assert len(tokens) == LENGTH and tokens[0] == TOKENS["<start>"] and tokens[-1] == TOKENS["<end>"]
    assert tokenize("")[1:] == [TOKENS["<end>"]] * (LENGTH - 1)


def test_an_unknown_word_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'elephant'.*above, an, and, .*yellow"):
        split_words("a red elephant")


def test_a_caption_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match=f"at most {LENGTH - 2}"):
        tokenize("a red circle and " * 8)

"""CutMix: pictures and their label maps are mixed by the same boxes, whose sizes and places are those of the published ones."""

import torch

from threestage.augment.draws import Draws, generator
from threestage.augment.mixing import draw_mixing

SIZE = (40, 60)


def test_picture_and_labels_move_together() -> None:
    labels = torch.arange(4, dtype=torch.uint8)[:, None, None].expand(4, *SIZE).contiguous()
    mixing = draw_mixing(4, SIZE, 1.0, Draws(generator(0)), torch.device("cpu"))
    mixed = mixing(labels)
    picture = mixing(labels[:, None].expand(4, 3, *SIZE).float())
    assert torch.equal(picture, mixed[:, None].expand(4, 3, *SIZE).float())
    for number in range(4):
        inside, outside = mixed[number][mixing.inside[number]], mixed[number][~mixing.inside[number]]
        assert set(inside.tolist()) == {(number + 1) % 4} and set(outside.tolist()) == {number}


def test_boxes_are_rectangles_of_the_published_sizes() -> None:
    inside = draw_mixing(500, SIZE, 1.0, Draws(generator(1)), torch.device("cpu")).inside
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    assert torch.equal(inside.sum((1, 2)), rows * columns), "a box has no hole"
    area, aspect = rows * columns / (SIZE[0] * SIZE[1]), rows / columns
    assert 0.01 < area.min() < 0.03 and 0.37 < area.max() < 0.42
    assert 0.25 < aspect.min() < 0.35 and 2.5 < aspect.max() < 3.6
    anywhere = inside.float().mean(0)
    assert anywhere.min() > 0, "also in the corners"


def test_the_chance_is_kept() -> None:
    mixed = draw_mixing(1000, SIZE, 0.3, Draws(generator(2)), torch.device("cpu")).inside.any((1, 2))
    assert 0.25 < mixed.float().mean() < 0.35

"""The whole of stage 2's loss on fixed tensors against an independent reference of a few lines, written from method.md."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threestage.augment import geometry
from threestage.augment.draws import Draws, generator
from threestage.augment.views import Extent, View, network_input
from threestage.config import ConsistencySettings
from threestage.data.batches import Batch
from threestage.prediction.pseudo_masks import PseudoMaskSettings
from threestage.training.losses import total_loss, valid_pixels
from threestage.training.step import StepInputs, piece_sums
from threestage.training.step_inputs import StudentView, only_last, pseudo_mask_targets, teacher_targets, warp_targets

N_L, N_U, C, SIDE = 2, 3, 4, 6
WEIGHTS = {"supervised_loss": 0.5, "consistency_loss": 0.25, "pseudo_mask_loss": 0.25}


class Linear1x1(nn.Module):
    """A network whose two heads are 1×1 convolutions: what the reference can compute in one line."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.main, self.auxiliary = (torch.randn(C, 3, 1, 1, generator=random) for _ in range(2))

    def forward(self, image: Tensor, with_auxiliary: bool = False) -> tuple[Tensor, Tensor | None]:
        return F.conv2d(image, self.main), F.conv2d(image, self.auxiliary) if with_auxiliary else None


def view(image: Tensor, valid: Tensor, flip: bool) -> View:
    """A view that is the whole image or its mirror image."""
    theta = geometry.horizontal_flip(torch.tensor([flip] * len(image)))
    index, _ = geometry.nearest_index(theta, (SIDE, SIDE), (SIDE, SIDE))
    return View(image, valid, theta, geometry.Move(range(len(image)), index))


def reference(
    student: Linear1x1, teacher: Linear1x1, x_l: Tensor, x_u: Tensor, y_l: Tensor, pm_l: Tensor, pm_u: Tensor
) -> Tensor:
    """method.md, stage 2, where A mirrors the image; the last column of the second unlabelled image is padding."""
    x_l, x_u = x_l / 255, x_u / 255
    a_u = x_u.flip(-1)
    t_l, t_u = F.conv2d(x_l, teacher.main).argmax(1), F.conv2d(x_u, teacher.main).argmax(1)
    t_u[1, :, -1] = 255
    pm_u = pm_u.clone()
    pm_u[1, :, -1] = 255
    both, targets = torch.cat([x_l, a_u]), torch.cat([t_l, t_u.flip(-1)])
    sup = F.cross_entropy(F.conv2d(x_l, student.main), y_l, ignore_index=255)
    con = F.cross_entropy(F.conv2d(both, student.main), targets, ignore_index=255)
    pm = F.cross_entropy(F.conv2d(both, student.auxiliary), torch.cat([pm_l, pm_u.flip(-1)]), ignore_index=255)
    return 0.5 * sup + 0.25 * con + 0.25 * pm


def test_stage_two_equals_the_reference() -> None:
    random = torch.Generator().manual_seed(1)
    x_l, x_u = (torch.randint(256, (n, 3, SIDE, SIDE), generator=random).byte() for n in (N_L, N_U))
    y_l, pm_l, pm_u = (torch.randint(0, C, (n, SIDE, SIDE), generator=random) for n in (N_L, N_L, N_U))
    y_l[0, 0] = 255
    student, teacher = Linear1x1(2), Linear1x1(3)
    valid_l, valid_u = torch.ones(N_L, SIDE, SIDE, dtype=torch.bool), torch.ones(N_U, SIDE, SIDE, dtype=torch.bool)
    valid_u[1, :, -1] = False
    weak_l, weak_u = view(x_l, valid_l, flip=False), view(x_u, valid_u, flip=False)
    strong_u = view(x_u.flip(-1), valid_u.flip(-1), flip=True)

    def batch(image: Tensor, pseudo_mask: Tensor) -> Batch:
        maps = {
            "pseudo_mask": pseudo_mask.to(torch.uint8),
            "confidence": torch.zeros_like(pseudo_mask, dtype=torch.uint8),
        }
        return Batch(
            image, Extent.whole(torch.tensor([[SIDE, SIDE]] * len(image)), Draws(generator())), maps, ("",) * len(image)
        )

    views = [StudentView(strong_u.image, strong_u.warp)]
    said = teacher_targets(teacher, weak_l, weak_u, ConsistencySettings())
    pseudo = pseudo_mask_targets(batch(x_l, pm_l), batch(x_u, pm_u), weak_l, weak_u, PseudoMaskSettings())
    targets = {
        "supervised_loss": y_l,
        "consistency_loss": warp_targets(said, views).class_ids,
        "pseudo_mask_loss": warp_targets(pseudo, views).class_ids,
    }
    inputs = StepInputs(network_input(torch.cat([weak_l.image, strong_u.image])), targets, WEIGHTS, ())
    counts = {name: valid_pixels(target) for name, target in targets.items()}
    loss = total_loss(piece_sums(student, inputs, slice(None)), counts, WEIGHTS, 1).float()
    torch.testing.assert_close(loss, reference(student, teacher, x_l, x_u, y_l, pm_l, pm_u))


def test_what_all_pixels_divide_is_counted_before_the_threshold() -> None:
    """Of four pixels of one unlabelled image one is padding, two are below the threshold."""
    image = torch.tensor([250, 130, 130, 250], dtype=torch.uint8).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    valid = torch.tensor([[[True, True, True, False]]])
    labelled, unlabelled = (View(image, ok, torch.eye(2, 3)[None]) for ok in (torch.ones_like(valid), valid))

    class Sure(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            return torch.stack([(1 - image[:, 0]).log(), image[:, 0].log()], 1), None

    settings = ConsistencySettings(confidence_threshold=0.9, normaliser="all", labelled=False)
    target = warp_targets(
        teacher_targets(Sure(), labelled, unlabelled, settings), [StudentView(image, lambda labels: labels)], 1
    )
    assert target.class_ids.tolist() == [[[255] * 4], [[255] * 4], [[1, 255, 255, 255]]]
    assert target.of is not None and valid_pixels(target.of) == 3
    last = only_last(target, 1)
    assert torch.equal(last.class_ids, target.class_ids) and last.of is not None and valid_pixels(last.of) == 3

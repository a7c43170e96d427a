"Several sets in one training: what a slice does not show is unknown there, and nobody is on two sides."

import numpy as np
import pytest
import torch

from rsna_seg.ct.organs import ALL_ORGANS, CLASSES, ORGAN
from rsna_seg.data import StepSampler
from rsna_seg.model import SegLoss, marginal_logits

pytestmark = pytest.mark.usefixtures("one_thread")

ORGAN_SETS = [("liver",), ("left_kidney", "right_kidney"), ALL_ORGANS, ()]


def known_of(*sets):
    return torch.tensor([[c.key in ("background", *keys) for c in CLASSES] for keys in sets])


def mixed_batch(sets=ORGAN_SETS, size=12):
    "Logits, and masks that show what each slice knows."
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(sets), 6, size, size, generator=generator) * 3
    masks = torch.randint(0, 6, (len(sets), size, size), generator=generator)
    known = known_of(*sets)
    return logits, masks * known.gather(1, masks.flatten(1)).view_as(masks), known


def value_and_gradient(loss, logits, *rest):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *rest)
    value.backward()
    return value.detach(), logits.grad


# The loss

@pytest.mark.parametrize("over", ["batch", "image"])
@pytest.mark.parametrize("labelled", [ALL_ORGANS, ["liver", "left_kidney", "right_kidney"], ["bowel"]])
def test_slices_that_know_the_same_have_the_loss_of_one_set(labelled, over):
    logits, masks, known = mixed_batch([labelled] * 3)
    one_set = value_and_gradient(SegLoss(0.4, 0.6, labelled, over), logits, masks)
    by_slice = value_and_gradient(SegLoss(0.4, 0.6, ALL_ORGANS, over), logits, masks, known)
    torch.testing.assert_close(by_slice[0], one_set[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(by_slice[1], one_set[1], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(marginal_logits(logits, known), marginal_logits(logits, labelled))


@pytest.mark.parametrize("loss", [SegLoss(0, 1), SegLoss(1, 0, dice_over="image")])
def test_what_is_a_mean_over_slices_is_that_of_each_slice_alone(loss):
    "So batches add up, whatever set their slices are from."
    logits, masks, known = mixed_batch()
    alone = [SegLoss(loss.dice, loss.focal, list(keys))(logits[i : i + 1], masks[i : i + 1]) for i, keys in enumerate(ORGAN_SETS)]
    torch.testing.assert_close(loss(logits, masks, known), torch.stack(alone).mean())


def test_dice_over_a_mixed_batch_by_hand():
    "Areas are added up over the slices that know a class; what no slice knows is in no mean."
    sets = [("liver",), ("liver", "bowel"), ("bowel",)]
    logits, masks, known = mixed_batch(sets)
    shares, scores = marginal_logits(logits, known).softmax(1), []
    for c in (0, ORGAN["liver"].id, ORGAN["bowel"].id):
        knowing = known[:, c]
        truth, found = (masks[knowing] == c).float(), shares[knowing][:, c]
        scores.append(2 * (truth * found).sum() / (truth.sum() + found.sum()))
    torch.testing.assert_close(SegLoss(1, 0)(logits, masks, known), 1 - torch.stack(scores).mean())


@pytest.mark.parametrize("over", ["batch", "image"])
def test_the_loss_does_not_see_how_background_and_unknown_organs_share(over):
    "Exchanging their logits in a slice changes nothing; along that direction the gradient is zero."
    logits, masks, known = mixed_batch()
    loss, spleen = SegLoss(dice_over=over), ORGAN["spleen"].id
    value, gradient = value_and_gradient(loss, logits, masks, known)
    swapped = logits.clone()
    swapped[0, [0, spleen]] = logits[0, [spleen, 0]]  # the first slice knows the liver alone
    torch.testing.assert_close(loss(swapped, masks, known), value)
    swapped[2, [0, spleen]] = logits[2, [spleen, 0]]  # the third knows all
    assert abs(loss(swapped, masks, known) - value) > 1e-3
    shares = logits[0, [0, spleen]].softmax(0)  # moves that keep the sum of both probabilities
    along = gradient[0, 0] * shares[1] - gradient[0, spleen] * shares[0]
    assert along.abs().max() < 1e-7 < gradient[0].abs().max()


def test_an_organ_that_no_slice_knows_has_no_term():
    "Nor does one that only other slices know: its logits get what its share of the background gets."
    sets = [("liver",), ("liver", "spleen")]
    logits, masks, known = mixed_batch(sets)
    louder = logits.clone()
    kidney = ORGAN["left_kidney"].id
    louder[:, kidney] += 2
    louder[:, 0] = (logits[:, [0, kidney]].logsumexp(1).exp() - louder[:, kidney].exp()).clamp_min(1e-30).log()
    fits = (logits[:, [0, kidney]].logsumexp(1).exp() > louder[:, kidney].exp()).all(0, keepdim=True).expand(2, -1, -1)
    louder = torch.where(fits.unsqueeze(1), louder, logits)
    assert fits.any()
    torch.testing.assert_close(SegLoss()(louder, masks, known), SegLoss()(logits, masks, known))
    _, gradient = value_and_gradient(SegLoss(1, 0), logits, masks, known_of((), ()))
    assert gradient.abs().max() < 1e-6  # all is background: its Dice is 1 whatever is said


# The order

def test_one_set_is_drawn_as_ever():
    sampler = StepSampler(23, 4, 2, shuffle=True, seed=5)
    sampler.epoch = 3
    assert sampler.order().tolist() == np.random.default_rng([5, 3]).permutation(23).tolist()


def test_weights_by_size_are_one_folder():
    sets = np.repeat([0, 1, 2], [3, 11, 9])
    orders = [StepSampler(23, shuffle=True, sets=s, weights=w).order().tolist() for s, w in ((None, ()), (sets, (3, 11, 9)))]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("weights", [(), (1, 1, 2), (5, 0.01, 1)])
def test_an_epoch_is_as_long_as_there_are_slices(weights):
    "Processes share it, a slice that comes again has a number of its own, and the draw hangs on seed and epoch alone."
    sets = np.repeat([0, 1, 2], [40, 2, 9])
    order = dict(batch_size=4, accumulation=3, shuffle=True, seed=1, sets=sets, weights=weights)
    alone, again = StepSampler(51, **order), StepSampler(51, **order)
    for epoch in (2, 0, 1):
        alone.epoch = again.epoch = epoch
        keys = sum(alone, [])
        assert len(keys) == len(set(keys)) == 51 and keys == sum(again, [])
        both = [StepSampler(51, process=p, processes=2, **order) for p in range(2)]
        for sampler in both:
            sampler.epoch = epoch
        shared = [key for sampler in both for step in sampler.steps() for batch, share in step if share for key in batch]
        assert sorted(shared) == sorted(keys)
        counts = np.bincount(sets[np.array(keys) % 51])
        wanted = np.sqrt([40, 2, 9]) if not weights else np.array(weights)
        assert counts.sum() == 51 and np.abs(counts - 51 * wanted / wanted.sum()).max() <= 1


def test_which_organs_a_batch_shows():
    classes = known_of(("liver",), ("bowel",)).numpy()
    sampler = StepSampler(5, 5, shuffle=True, sets=[0, 0, 0, 0, 1], weights=(1, 4), classes=classes)
    [[(keys, _)]] = sampler.steps()
    assert torch.equal(sampler.known(keys), torch.from_numpy(classes[[int(key % 5 == 4) for key in keys]]))
    assert StepSampler(5).known([1, 2]) is None

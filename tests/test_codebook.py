"""Codebook health: counts, perplexity in its closed forms, and dead codes that come back to life."""

import pytest
import torch

from ldbfr.models.vqgan import Codebook
from ldbfr.training.codebook import CodebookHealth, draw_features
from tests import tiny

K, C = 12, 4


def alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over one worker."""
    return values


def observed(*indices: int) -> CodebookHealth:
    health = CodebookHealth(K)
    health.observe(torch.tensor(indices).view(1, 1, -1))
    health.settle(alone)
    return health


def test_perplexity_is_the_number_of_codes_when_all_are_chosen_equally_often() -> None:
    assert observed(*range(K), *range(K)).perplexity().item() == pytest.approx(K)


def test_perplexity_is_one_when_a_single_code_is_chosen() -> None:
    assert observed(3, 3, 3).perplexity().item() == pytest.approx(1)


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    shares = torch.tensor([0.5, 0.25, 0.25])
    entropy = -(shares * shares.log()).sum()
    assert observed(0, 0, 5, 7).perplexity().item() == pytest.approx(entropy.exp().item(), rel=1e-6)


def test_counts_add_up_over_batches() -> None:
    health = observed(1, 1, 2)
    health.observe(torch.tensor([[[2, 11]], [[2, 0]]]))
    health.settle(alone)
    expected = torch.zeros(K, dtype=torch.float64)
    expected[[0, 1, 2, 11]] = torch.tensor([1, 2, 3, 1], dtype=torch.float64)
    assert torch.equal(health.counts, expected)
    assert torch.equal(health.dead(), expected == 0)


def revived(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Codes before and after, the features, and how many codes were moved; codes 0, 5 and 7 are alive."""
    with tiny.seeded():
        codebook = Codebook(K, C)
    before, features = codebook.codes.detach().clone(), tiny.normal(2, C, 3, 3)
    health = observed(0, 0, 5, 7)
    drawn = draw_features([(features, torch.arange(2))], int(health.dead().sum()), 2, seed, alone)
    moved = health.revive(codebook, drawn)
    assert health.counts.sum() == 0
    return before, codebook.codes.detach().clone(), features, moved


def test_exactly_the_dead_codes_move_and_onto_features_of_the_batch() -> None:
    before, after, features, moved = revived()
    changed = [code for code in range(K) if not torch.equal(before[code], after[code])]
    assert changed == [code for code in range(K) if code not in (0, 5, 7)]
    assert moved == len(changed)
    positions = features.movedim(1, -1).flatten(0, 2)
    for code in changed:
        assert (positions == after[code]).all(dim=1).any()


def test_revival_is_a_function_of_its_seed() -> None:
    assert torch.equal(revived(3)[1], revived(3)[1])
    assert not torch.equal(revived(3)[1], revived(4)[1])


def test_a_codebook_in_full_use_stays_as_it_is() -> None:
    with tiny.seeded():
        codebook = Codebook(K, C)
    before = codebook.codes.detach().clone()
    drawn = draw_features([(tiny.normal(1, C, 2, 2), torch.arange(1))], 0, 1, 0, alone)
    assert observed(*range(K)).revive(codebook, drawn) == 0
    assert torch.equal(codebook.codes, before)


def test_the_counts_are_part_of_the_state_so_that_a_resumed_run_revives_the_same_codes() -> None:
    health, other = observed(1, 2, 2), CodebookHealth(K)
    other.load_state_dict(health.state_dict())
    assert torch.equal(other.counts, health.counts)


def test_counts_of_several_workers_are_summed_once() -> None:
    one, other = CodebookHealth(K), CodebookHealth(K)
    one.observe(torch.tensor([[[1, 1]]]))
    other.observe(torch.tensor([[[1, 4]]]))
    together = one.pending + other.pending
    for health in (one, other):
        health.settle(lambda _: together)
        health.settle(lambda pending: pending)  # nothing is pending any more
        assert health.counts[[1, 4]].tolist() == [3, 1]


@pytest.mark.parametrize("cuts", [(2,), (1, 4), (1, 2, 3, 4)])
def test_features_drawn_from_a_divided_batch_are_those_of_the_whole(cuts: tuple[int, ...]) -> None:
    features, places = tiny.normal(5, C, 2, 3), torch.arange(5)
    whole = draw_features([(features, places)], 20, 5, 7, alone)
    halves = list(zip(features.tensor_split(cuts), places.tensor_split(cuts), strict=True))
    assert torch.equal(draw_features(halves, 20, 5, 7, alone), whole)
    workers = [draw_features([half], 20, 5, 7, alone) for half in halves]
    assert torch.equal(torch.stack(workers).sum(dim=0), whole)

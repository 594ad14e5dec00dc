"""Covariances and choices over all ranks: two ranks give what one rank with all tokens gives."""

import threading

import torch

from entrocraft_trl.baselines.covariance import highest_of_all_ranks, share_as_count, token_covariances


class Ranks:
    """Accelerators of ranks that run as threads and wait for each other, as processes do in a collective."""

    def __init__(self, count: int):
        self.num_processes, self.barrier, self.given = count, threading.Barrier(count), {}

    def run(self, work) -> list:
        results = [None] * self.num_processes

        def one(rank):
            results[rank] = work(rank, _Accelerator(self, rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.num_processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)  # seconds; a rank that takes another branch leaves the others waiting
        return results


class _Accelerator:
    def __init__(self, ranks: Ranks, rank: int):
        self.ranks, self.process_index, self.num_processes = ranks, rank, ranks.num_processes

    def _all(self, tensor) -> list:
        self.ranks.given[self.process_index] = tensor
        self.ranks.barrier.wait(timeout=10)
        everyones = [self.ranks.given[rank] for rank in range(self.num_processes)]
        self.ranks.barrier.wait(timeout=10)  # before the next collective overwrites them
        return everyones

    def reduce(self, tensor, reduction):
        return sum(self._all(tensor))

    def gather(self, tensor):
        return torch.cat(self._all(tensor))

    def pad_across_processes(self, tensor, dim, pad_index):
        longest = max(len(other) for other in self._all(tensor))
        return torch.cat([tensor, torch.full((longest - len(tensor),), pad_index)])


# Two ranks of 2 and 3 rollouts and of different lengths, as TRL pads each rank to its own longest completion.
SHAPES = [(2, 3), (3, 4)]
LOGPS = [-torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(SHAPES)]
ADVANTAGES = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(SHAPES)]
MASKS = [torch.ones(shape, dtype=torch.long) for shape in SHAPES]
MASKS[0][1, 1:] = 0


def test_covariances_are_about_the_means_of_all_ranks():
    found = Ranks(2).run(lambda r, accelerator: token_covariances(LOGPS[r], ADVANTAGES[r], MASKS[r], accelerator))
    logps, advantages = (
        torch.cat([values[mask.bool()] for values, mask in zip(tensors, MASKS, strict=True)])
        for tensors in (LOGPS, ADVANTAGES)
    )
    expected = (logps - logps.mean()) * (advantages - advantages.mean())
    covariances = torch.cat([found[r][0][MASKS[r].bool()] for r in range(2)])
    torch.testing.assert_close(covariances, expected)
    assert [tokens for _, tokens in found] == [16, 16]
    assert (found[0][0][1, 1:] == -torch.inf).all()


def test_the_highest_of_all_ranks_are_chosen():
    scores = [torch.tensor([[1.0, 9.0, 3.0], [-torch.inf, 2.0, 4.0]]), torch.tensor([[8.0, 0.5]])]
    for count, expected in ((3, {9.0, 8.0, 4.0}), (0, set()), (100, {1.0, 9.0, 3.0, 2.0, 4.0, 8.0, 0.5})):
        chosen = Ranks(2).run(lambda r, accelerator, count=count: highest_of_all_ranks(scores[r], count, accelerator))
        assert {value for r in range(2) for value in scores[r][chosen[r]].tolist()} == expected


def test_equal_scores_do_not_change_how_many_are_chosen():
    scores = torch.zeros(2, 3)
    chosen = Ranks(2).run(lambda r, accelerator: highest_of_all_ranks(scores, 7, accelerator))
    assert sum(mask.sum() for mask in chosen) == 7


def test_a_share_is_rounded_down_but_not_to_nothing():
    assert [share_as_count(share, 1000) for share in (0.0, 1e-6, 0.0019, 1.0)] == [0, 1, 1, 1000]

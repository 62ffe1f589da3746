"""The hash behind every mask: same bits everywhere, unique keys, uniform, independent of the batch."""

import pytest
import torch

from mrmae.kernels import ids

SAMPLES = torch.tensor([0, 1, -1, 2**62, -(2**63)])
GOLDEN_KEEP = [[2, 10, 12, 13], [4, 5, 7, 10], [4, 5, 8, 12], [6, 7, 12, 14], [1, 5, 9, 14]]


def test_the_mixer_equals_splitmix64() -> None:
    # First outputs of splitmix64 from state 0: the published test vector.
    golden = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    state = torch.tensor([ids.signed(golden * i) for i in (1, 2, 3)])
    assert ids.mix(state).tolist() == [ids.signed(x) for x in expected]
    assert [ids.mix_int((golden * i) & ids.WORD) for i in (1, 2, 3)] == expected


def test_the_masks_of_version_one_never_change() -> None:
    keep, _ = ids.random_ids(SAMPLES, 16, 4, seed=0, epoch=3)
    assert keep.tolist() == GOLDEN_KEEP


def test_kept_and_hidden_partition_the_grid_in_ascending_order() -> None:
    keep, hidden = ids.random_ids(SAMPLES, 196, 49, seed=1, epoch=2)
    assert keep.shape == (5, 49) and hidden.shape == (5, 147)
    for part in (keep, hidden):
        assert (part.diff(dim=1) > 0).all()
    assert torch.equal(torch.cat([keep, hidden], 1).sort(1).values, torch.arange(196).expand(5, 196))


def test_a_mask_depends_on_its_sample_and_epoch_and_seed_only() -> None:
    whole, _ = ids.random_ids(SAMPLES, 196, 49, seed=1, epoch=2)
    alone, _ = ids.random_ids(SAMPLES[3:4], 196, 49, seed=1, epoch=2)
    assert torch.equal(whole[3:4], alone)
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 1}):
        assert not torch.equal(whole, ids.random_ids(SAMPLES, 196, 49, **other)[0])
    assert len({tuple(row) for row in whole.tolist()}) == len(SAMPLES)


@pytest.mark.parametrize("l", [1, 2, 16, 196, 256])
def test_keys_are_unique(l: int) -> None:
    noise = ids.patch_noise(torch.arange(64), l, seed=0, epoch=0)
    assert all(len(set(row)) == l for row in noise.tolist())


def test_every_patch_is_kept_equally_often_and_pairs_are_independent() -> None:
    n, l, k = 20_000, 16, 4
    keep, _ = ids.random_ids(torch.arange(n), l, k, seed=0, epoch=0)
    kept = torch.zeros(n, l).scatter_(1, keep, 1.0)
    # Six standard deviations of a binomial share.
    assert (kept.mean(0) - k / l).abs().max() < 6 * (k / l * (1 - k / l) / n) ** 0.5
    both = (kept.T @ kept / n)[~torch.eye(l, dtype=torch.bool)]
    share = k / l * (k - 1) / (l - 1)
    assert (both - share).abs().max() < 6 * (share * (1 - share) / n) ** 0.5


def test_gumbel_noise_is_standard_and_a_stream_of_its_own() -> None:
    noise = ids.gumbel_noise(torch.arange(2000), 196, seed=0, epoch=0)
    assert noise.dtype == torch.float64 and noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - torch.pi**2 / 6) < 0.02
    order = ids.patch_noise(torch.arange(2000), 196, seed=0, epoch=0).double()
    assert torch.corrcoef(torch.stack([order.flatten(), noise.flatten()]))[0, 1].abs() < 0.01


def test_the_uniform_under_gumbel_noise_stays_inside_zero_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "hash_patches", lambda samples, l, **_: torch.tensor([[0, -1]]))
    assert ids.gumbel_noise(torch.zeros(1, dtype=torch.int64), 2, seed=0, epoch=0).isfinite().all()


@pytest.mark.parametrize("n_keep", [0, 17, -1])
def test_an_empty_or_overfull_mask_is_refused(n_keep: int) -> None:
    with pytest.raises(ValueError, match=rf"n_keep = {n_keep} of l = 16.*1 <= n_keep <= 16"):
        ids.random_ids(SAMPLES, 16, n_keep, seed=0, epoch=0)


def test_samples_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="samples is torch.int32.*int64"):
        ids.patch_noise(SAMPLES.int(), 16, seed=0, epoch=0)


@pytest.mark.gpu
def test_cpu_and_gpu_agree_bit_by_bit() -> None:
    for l in (16, 196, 256):
        cpu = ids.patch_noise(SAMPLES, l, seed=5, epoch=7)
        assert torch.equal(cpu, ids.patch_noise(SAMPLES.cuda(), l, seed=5, epoch=7).cpu())
        keep, hidden = ids.random_ids(SAMPLES.cuda(), l, l // 4, seed=5, epoch=7)
        expected = ids.random_ids(SAMPLES, l, l // 4, seed=5, epoch=7)
        assert torch.equal(keep.cpu(), expected[0]) and torch.equal(hidden.cpu(), expected[1])

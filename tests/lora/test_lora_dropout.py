"""Keyed dropout: a sequence's mask depends on seed, step, id and layer, and on nothing else."""

import functools
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from masks import keep_mask
from torch import Tensor, nn

from dlora import AdaLoraConfig, LoraConfig, attach
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import DropoutStream, SampleKeys

P, FEATURES = 0.3, 16
CONFIGS = {
    "lora": functools.partial(LoraConfig, r=2),
    "dora": functools.partial(LoraConfig, r=2, use_dora=True),
    "adalora": functools.partial(AdaLoraConfig, init_r=3, target_r=2, total_step=10),
}
ALONE = SampleKeys(seed=5, step=7, ids=(42,), lengths=(6,))


def mask(keys: SampleKeys | None, tokens: int, layer: str = "q_proj", p: float = P) -> Tensor:
    """keep_mask [rows, tokens, FEATURES] of a padded batch."""
    stream, rows = DropoutStream(), len(keys.ids) if keys else 1
    x = torch.zeros(rows, tokens, FEATURES)
    if keys is None:
        return keep_mask(stream, x, p, layer)
    with stream.keyed(keys):
        return keep_mask(stream, x, p, layer)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_sequence_has_its_mask_in_any_batch(row: int) -> None:
    """Alone, or padded beside a longer and a shorter one, first or last."""
    ids, lengths = [7, 8], [9, 2]
    batch = replace(
        ALONE, ids=(*ids[:row], 42, *ids[row:]), lengths=(*lengths[:row], 6, *lengths[row:])
    )
    assert torch.equal(mask(batch, tokens=9)[row, :6], mask(ALONE, tokens=6)[0])
    assert torch.equal(mask(batch, tokens=12)[row, :6], mask(ALONE, tokens=6)[0])


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("flat", [False, True])
def test_a_sequence_has_its_mask_in_a_shared_row(row: int, flat: bool) -> None:
    ids, lengths = [7, 8], [9, 2]
    ids.insert(row, 42)
    lengths.insert(row, 6)
    start, stream = sum(lengths[:row]), DropoutStream()
    keys = SampleKeys(seed=5, step=7, ids=ids, lengths=lengths, row=24)
    x = torch.zeros(24, FEATURES) if flat else torch.zeros(1, 24, FEATURES)
    with stream.keyed(keys):
        found = keep_mask(stream, x, P, "q_proj").view(24, FEATURES)
        places = torch.tensor([[0, start + 3], [0, start + 1]])
        with stream.at(places):  # as a head is called, with the places of targets
            some = keep_mask(stream, x.view(24, FEATURES)[:2], P, "q_proj")
    alone = mask(ALONE, tokens=6)[0]
    assert torch.equal(found[start : start + 6], alone)
    assert torch.equal(some, alone[[3, 1]])


def test_other_random_numbers_leave_the_mask_alone() -> None:
    torch.manual_seed(1)
    first = mask(ALONE, tokens=6)
    torch.manual_seed(2)
    assert torch.equal(first, mask(ALONE, tokens=6))


@pytest.mark.parametrize(
    "other", [{"seed": 6}, {"step": 8}, {"ids": (43,)}], ids=lambda change: next(iter(change))
)
def test_each_part_of_the_key_changes_the_mask(other: dict) -> None:
    first, second = mask(ALONE, tokens=6), mask(replace(ALONE, **other), tokens=6)
    # Independent masks agree on (1 − p)² + p² = 0.58 of the elements.
    assert 0.3 < (first == second).float().mean() < 0.8


def test_each_layer_has_its_own_mask() -> None:
    first, second = mask(ALONE, tokens=6), mask(ALONE, tokens=6, layer="v_proj")
    assert 0.3 < (first == second).float().mean() < 0.8


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("keys", [replace(ALONE, lengths=(4000,)), None], ids=["keyed", "unkeyed"])
def test_the_rate_is_p(keys: SampleKeys | None, p: float) -> None:
    dropped = (~mask(keys, tokens=4000, p=p)).float().mean(dim=(0, 1))
    assert float(dropped.mean()) == pytest.approx(p, abs=0.005)  # 64,000 draws: σ ≤ 0.002
    assert float((dropped - p).abs().max()) < 0.04  # in every feature


def test_tokens_of_a_flattened_batch_keep_their_masks() -> None:
    keys = replace(ALONE, ids=(42, 43), lengths=(6, 6))
    stream = DropoutStream()
    with stream.keyed(keys):
        flat = keep_mask(stream, torch.zeros(12, FEATURES), P, "q_proj")
    assert torch.equal(flat.view(2, 6, FEATURES), mask(keys, tokens=6))


def test_picked_tokens_have_the_masks_of_their_places() -> None:
    """The output head sees only tokens with a target."""
    keys = replace(ALONE, ids=(42, 43), lengths=(6, 4))
    positions = torch.tensor([[0, 1], [0, 5], [1, 0], [1, 3]])
    stream = DropoutStream()
    with stream.keyed(keys), stream.at(positions):
        picked = keep_mask(stream, torch.zeros(4, FEATURES), P, "q_proj")
    assert torch.equal(picked, mask(keys, tokens=6)[positions[:, 0], positions[:, 1]])


def test_a_batch_without_sequences_is_not_dropped() -> None:
    """What a rank that runs short passes through the model has weight zero."""
    stream = DropoutStream()
    with stream.keyed(SampleKeys(seed=0, step=0, ids=(), lengths=())):
        assert keep_mask(stream, torch.zeros(1, 2, FEATURES), P, "q_proj").all()


def test_an_input_that_is_not_laid_out_by_sequence_is_announced_once() -> None:
    stream, said = DropoutStream(), []
    stream.announce = said.append
    with stream.keyed(SampleKeys(0, 1, (8, 9), (4, 6))):
        keep_mask(stream, torch.zeros(2, 6, 4), 0.5, "0")
        keep_mask(stream, torch.zeros(12, 4), 0.5, "0")
        assert not said
        for _ in range(2):  # tokens routed to an expert
            keep_mask(stream, torch.zeros(7, 4), 0.5, "0")
    assert len(said) == 1 and "[7, 4]" in said[0] and "share a micro-batch" in said[0]


def test_without_keys_masks_come_from_the_global_generator() -> None:
    torch.manual_seed(3)
    first, second = mask(None, tokens=6), mask(None, tokens=6)
    torch.manual_seed(3)
    assert torch.equal(mask(None, tokens=6), first)
    assert not torch.equal(first, second)


def test_keys_end_with_their_context() -> None:
    stream, x = DropoutStream(), torch.zeros(1, 6, FEATURES)
    with stream.keyed(ALONE):
        pass
    torch.manual_seed(3)
    after = keep_mask(stream, x, P, "q_proj")
    torch.manual_seed(3)
    assert torch.equal(after, mask(None, tokens=6))


def test_the_layers_of_a_model_share_keys_and_differ_in_masks() -> None:
    """Two equal layers on one input: dropout alone tells them apart, and eval switches it off."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(FEATURES, 3, bias=False) for _ in range(2)])
    attach(model, LoraConfig(r=2, lora_dropout=0.5))
    model[1].load_state_dict(model[0].state_dict())
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()
            layer.adapter.lora_A.fill_(1)
            layer.adapter.lora_B.fill_(1)
    x = torch.ones(1, 6, FEATURES)
    with attachment_of(model).stream.keyed(ALONE):
        first, second = model[0](x), model[1](x)
        assert torch.equal(first, model[0](x))
    assert not torch.equal(first, second)
    # s·r·Σ kept/(1 − p): each output counts the kept features of its token, scaled up by 2.
    kept = mask(ALONE, tokens=6, layer="0", p=0.5).sum(dim=-1)
    torch.testing.assert_close(first[..., 0], 16 * 2 * 2.0 * kept)
    model.eval()
    assert torch.equal(model[0](x), model[1](x))


def test_masks_of_neighbours_are_independent() -> None:
    """Tokens, columns, layers and steps one apart agree as often as coins do, as do their pairs."""
    tokens, n, p = 512, 512, 0.5
    keys = replace(ALONE, lengths=(tokens,))
    stream, x = DropoutStream(), torch.zeros(1, tokens, n)
    found = []
    for key in (keys, replace(keys, step=8), replace(keys, ids=(43,))):
        with stream.keyed(key):
            found += [keep_mask(stream, x, p, layer)[0] for layer in ("a", "b")]
    first = found[0]
    others = [*found[1:], first.roll(1, 0), first.roll(1, 1), first.roll((1, 1), (0, 1)), first.t()]
    for other in others:  # n² coins: σ = 1/(2·512)
        assert abs(float((first == other).float().mean()) - 0.5) < 5 / (2 * 512)
    # Every pair of columns, over all tokens: Pearson's χ² of each is that of one degree of freedom.
    signs = first.double() * 2 - 1
    for grid in (signs, signs.t()):
        correlated = (grid.t() @ grid).square() / tokens
        correlated.fill_diagonal_(0)
        assert float(correlated.sum() / (n * (n - 1))) == pytest.approx(1, abs=0.02)
        assert float(correlated.max()) < 40  # of 131,000: P(χ² > 40) = 3e-10


def test_each_value_of_eight_columns_is_as_frequent() -> None:
    keys = replace(ALONE, lengths=(1 << 16,))
    bits = mask(keys, tokens=1 << 16, p=0.5)[0, :, :8].long()
    counts = torch.bincount((bits << torch.arange(8)).sum(1), minlength=256).double()
    assert float((counts - 256).square().sum() / 256) < 350  # 255 degrees: mean 255, σ 22.6


def test_nothing_of_the_mask_is_saved_for_backward() -> None:
    """Of linear layers and a convolution, LoRA, DoRA and AdaLoRA: as much as without dropout."""
    saved: dict[tuple[str, float], int] = {}
    for name, config in CONFIGS.items():
        for p in (0.0, 0.4):
            model = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(20, 4, 3))
            attach(model, config(lora_dropout=p, target_modules=["0", "1"]))
            kept: dict[int, int] = {}

            def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                kept[tensor.data_ptr()] = tensor.nbytes if tensor.dtype == torch.bool else 0
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(torch.randn(2, 20, 64)).sum().backward()
            saved[name, p] = sum(kept.values())
    assert set(saved.values()) == {0}


GAMMA, FIRST, SECOND = (np.uint32(c) for c in (0x9E3779B1, 0x7FEB352D, 0x846CA68B))
HALF = np.uint32(2**31)


def shifted(x: np.ndarray, bits: int) -> np.ndarray:
    """x ⊕ (x >> bits), with a shift that copies the highest bit."""
    return x ^ (x.view(np.int32) >> bits).view(np.uint32)


def folded(x: np.ndarray) -> np.ndarray:
    return shifted(x * FIRST, 15) * SECOND


def mixed(x: np.ndarray) -> np.ndarray:
    return shifted(folded(shifted(x, 16)), 16)


def key(*parts: object) -> np.uint32:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint32((int.from_bytes(digest, "little") // 2 + 2**31) % 2**32)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_bits_are_those_of_the_formula(p: float) -> None:
    """On uint32, of which torch has no arithmetic: other bits would be other masks at a resume."""
    tokens, columns = np.arange(6, dtype=np.uint32), np.arange(FEATURES, dtype=np.uint32)
    t = mixed(key(5, 7, 42) + tokens * GAMMA)
    c = mixed(columns * GAMMA)
    hashed = folded(mixed(t ^ key("q_proj"))[:, None] ^ c)
    wanted = (hashed ^ HALF) >= np.uint32(round(p * 2**32))
    assert np.array_equal(mask(ALONE, tokens=6, p=p)[0].numpy(), wanted)

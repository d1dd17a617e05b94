import math

import pytest
import torch

from networks.token_choice import Choice, Constraints, SpecialTokens, close

SPECIAL = SpecialTokens(eos=10, pad=11, mask=12)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def frequencies(choice: Choice, probability: torch.Tensor, number: int = 40_000) -> torch.Tensor:
    logits = probability.log().expand(number, -1)
    return choice(logits, uniform(number)).bincount(minlength=len(probability)) / number


P = torch.tensor([0.1, 0.4, 0.2, 0.3])


def test_tokens_are_drawn_from_the_distribution():
    found = frequencies(Choice(1.0, 1.0, 0), P)
    assert (found - P).abs().max() < 4 * math.sqrt(0.25 / 40_000)


def test_temperature_sharpens():
    expected = P**2 / (P**2).sum()
    found = frequencies(Choice(0.5, 1.0, 0), P)
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / 40_000)


def test_top_k_and_top_p_leave_the_likeliest():
    found = frequencies(Choice(1.0, 1.0, 2), P)
    assert found[0] == found[2] == 0 and abs(found[1] - 4 / 7) < 0.01
    # 0.4 + 0.3 reaches 0.7; the set is the smallest one that does.
    found = frequencies(Choice(1.0, 0.69, 0), P)
    assert found[0] == found[2] == 0
    found = frequencies(Choice(1.0, 0.71, 0), P)
    assert found[0] == 0 and abs(found[2] - 2 / 9) < 0.01
    both = frequencies(Choice(1.0, 0.5, 3), P)  # top-p among the three: 4/9 of it falls short of a half
    assert both[0] == both[2] == 0 and abs(both[1] - 4 / 7) < 0.01


@pytest.mark.parametrize(
    "choice", [Choice(0.0, 0.9, 0), Choice(0.0, 0.0, 0), Choice(1.0, 1.0, 1), Choice(1.0, 1e-9, 0)]
)
def test_greedy_takes_the_likeliest(choice):
    logits = torch.randn(50, 9)
    assert torch.equal(choice(logits, uniform(50)), logits.argmax(-1))


@pytest.mark.parametrize("choice", [Choice(1.0, 1.0, 0), Choice(0.65, 0.9, 0), Choice(2.0, 1.0, 3)])
def test_a_forbidden_token_is_never_drawn(choice):
    logits = torch.randn(20_000, 6)
    logits[:, [1, 4, 5]] = -math.inf
    extreme = uniform(20_000)
    extreme[:10], extreme[-10:] = 1 - 2.0**-53, 2.0**-53  # become 1 and 0 in single precision
    assert not set(choice(logits, extreme).tolist()) & {1, 4, 5}


def test_wrong_choices_are_refused():
    for arguments, key in (((-1.0, 0.9, 0), "temperature"), ((1.0, 1.1, 0), "top_p"), ((1.0, 0.9, -1), "top_k")):
        with pytest.raises(ValueError, match=f"{key}="):
            Choice(*arguments)


def test_the_table_of_tokens():
    table = Constraints(max_layers=3, min_layers=2).table(13, 6, SPECIAL)
    assert table[:3, :10].all() and not table[3:, :10].any()
    assert table[:, SPECIAL.eos].tolist() == [False, False, True, True, False, False]
    assert table[:, SPECIAL.pad].tolist() == [False, False, False, False, True, True]
    assert not table[:, SPECIAL.mask].any()
    assert Constraints().table(13, 6, SPECIAL)[5].nonzero().flatten().tolist() == [SPECIAL.eos]


def test_wrong_constraints_are_refused():
    with pytest.raises(ValueError, match="max_layers=0"):
        Constraints(max_layers=0)
    with pytest.raises(ValueError, match="min_layers=3"):
        Constraints(max_layers=2, min_layers=3)
    with pytest.raises(ValueError, match="hold 5 layers at most"):
        Constraints(max_layers=6).table(13, 6, SPECIAL)
    with pytest.raises(ValueError, match="no layer token"):
        allowed = torch.zeros(13, dtype=torch.bool)
        allowed[SPECIAL.eos] = True
        Constraints(allowed).table(13, 6, SPECIAL)
    with pytest.raises(ValueError, match="13 tokens"):
        Constraints(torch.ones(5, dtype=torch.bool)).table(13, 6, SPECIAL)


def test_pad_follows_the_first_eos():
    tokens = torch.tensor([[1, 10, 3, 10], [10, 1, 2, 3], [1, 2, 3, 4]])
    assert close(tokens, SPECIAL).tolist() == [[1, 10, 11, 11], [10, 11, 11, 11], [1, 2, 3, 4]]

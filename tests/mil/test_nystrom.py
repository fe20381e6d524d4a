import torch

from eosin.mil._nystrom import TokenBags, pseudo_inverse


def test_the_pseudo_inverse_inverts_and_knows_no_other_bag():
    torch.manual_seed(0)
    matrices = torch.randn(2, 3, 6, 6, dtype=torch.float64).mul(3).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(matrices, 30) @ matrices, torch.eye(6).double().expand(2, 3, 6, 6))
    torch.testing.assert_close(pseudo_inverse(matrices, 3)[1:], pseudo_inverse(matrices[1:], 3), rtol=0, atol=0)


def test_equal_rows_and_columns_are_inverted_once():
    torch.manual_seed(0)
    counts = torch.tensor([[3, 1, 1, 0], [1, 1, 1, 1]])
    matrix = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    found = pseudo_inverse(matrix, 6, counts.double())
    for bag, count in enumerate(counts):
        places = torch.repeat_interleave(torch.arange(4), count)
        larger = pseudo_inverse(matrix[bag : bag + 1, :, places][..., places], 6)
        torch.testing.assert_close(found[bag : bag + 1, :, places][..., places], larger)
    assert (found[0, :, 3] == 0).all()


def test_a_small_bag_has_few_landmarks():
    bags = TokenBags.of_lengths((10, 1), 64, torch.device("cpu"))
    assert bags.counts.tolist() == [[54] + [1] * 10, [63, 1] + [0] * 9]
    assert bags.members.view(2, -1).sum(1).tolist() == [10, 1]
    assert bags.first.tolist() == [0, 10]
    assert TokenBags.of_lengths((325,), 64, torch.device("cpu")).counts.shape == (1, 56)  # 59 of 64 × 6 rows are zeros

import torch

from eosin.mil._resume import STATE, State, read_state, write_state


def test_every_damaged_byte_of_a_state_is_noticed_or_harmless(tmp_path, caplog):
    state = State({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}, {"fingerprint": "f", "epoch": 3})
    write_state(tmp_path, state)
    data = (tmp_path / STATE).read_bytes()
    found = read_state(tmp_path, "f")
    assert found.facts == state.facts
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        (tmp_path / STATE).write_bytes(damaged)
        found = read_state(tmp_path, "f")
        assert found is None or (found.facts == state.facts and torch.equal(found.tensors["a"], state.tensors["a"]))
    assert "training starts from the beginning" in caplog.text

import pytest

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.ilra import Ilra


def theirs(state, options):
    """The authors' weights under our names."""
    ours = {"seed": state["pooling.S"][0], "classifier.weight": state["classifier.weight"]}
    ours["classifier.bias"] = state["classifier.bias"]
    blocks = {"pool": "pooling.mha"}
    for layer in range(2):
        ours[f"blocks.{layer}.tokens"] = state[f"gab_blocks.{layer}.latent"][0]
        blocks |= {f"blocks.{layer}.gather": f"gab_blocks.{layer}.project_forward"}
        blocks |= {f"blocks.{layer}.spread": f"gab_blocks.{layer}.project_backward"}
    for new, old in blocks.items():
        names = {"query": "fc_q", "key": "fc_k", "value": "fc_v", "ff": "fc_o", "inner_out": "multihead_attn.out_proj"}
        names |= {"gate": "gate.0"} if new != "pool" else {}
        names |= {"norm_attn": "ln0", "norm_ff": "ln1"} if options["layer_norm"] else {}
        for part in ("weight", "bias"):
            ours |= {f"{new}.{name}.{part}": state[f"{old}.{his}.{part}"] for name, his in names.items()}
            thirds = state[f"{old}.multihead_attn.in_proj_{part}"].chunk(3)
            inner = zip(("inner_query", "inner_key", "inner_value"), thirds, strict=True)
            ours |= {f"{new}.{name}.{part}": third for name, third in inner}
    return ours


@pytest.mark.parametrize(("name", "norm"), [("ilra", True), ("ilra_no_norm", False)])
def test_outputs_and_gradients_are_the_authors(authors, same, name, norm):
    wanted = authors(name)
    options = {"width": 8, "heads": 2, "tokens": 2, "layer_norm": norm}
    model = Ilra(7, 3, **options).double().eval()
    state = {key.removeprefix("state/"): value for key, value in wanted.items() if key.startswith("state/")}
    model.load_state_dict(theirs(state, options))
    x = wanted["x"].requires_grad_()
    logits = model(PackedBags.pack([x])).logits
    logits.square().sum().backward()
    same({"logits": logits, "grad_x": x.grad}, wanted)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="3 heads do not divide the width 8"):
        Ilra(5, 2, width=8, heads=3)

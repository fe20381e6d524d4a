"""What MHIM-MIL ranks instances by: attention in version 1, the probability of a class in version 2.

Equations 1 and 5 of `mhim`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.kernels import segment_softmax
from eosin.mil.bags import PackedBags
from eosin.mil.methods.clam import ClassAttentionOutput, instance_width
from eosin.mil.methods.dsmil import DsmilOutput
from eosin.mil.methods.transmil import TransMil, TransMilOutput
from eosin.mil.nystrom import NystromLayer
from eosin.mil.slots import Aggregator, AttentionOutput


def rankings(output: AttentionOutput) -> Tensor:
    """Return what instances are ranked by, (N, H): attention, for DSMIL the largest instance logit; equation 1.

    The attention of TransMIL may be negative, and is then ranked as it is.
    """
    if isinstance(output, DsmilOutput):
        return output.instance_logits.amax(1, keepdim=True)
    return output.weights if isinstance(output, TransMilOutput) else output.scores


def instance_probability(model: Aggregator, output: AttentionOutput, bags: PackedBags, *, bias: bool = False) -> Tensor:
    """Return the largest class probability of each weighted instance, (N, 1), equation 5.

    A model with one output has two classes. Several attention rows: those of CLAM-MB weigh for their class, those of
    TransMIL for their part of the values, those that the classifier reads beside each other for their part of its
    weights, others are averaged. For DSMIL it is as in version 1.
    """
    if isinstance(output, DsmilOutput):
        return rankings(output)
    classifier = require_linear_classifier(model)
    if isinstance(model, TransMil) and isinstance(output, TransMilOutput):
        logits = functional.linear(_weighted_values(model.layer1, output), classifier.weight)
    else:
        weights = segment_softmax(output.scores, bags.cu_seqlens)  # (N, H)
        logits = _weighted_logits(classifier.weight, weights, output)
    if bias and classifier.bias is not None:
        logits = logits + classifier.bias
    if logits.shape[1] == 1:
        logits = functional.pad(logits, (1, 0))
    return logits.softmax(1).amax(1, keepdim=True)


def _weighted_values(layer: NystromLayer, output: TransMilOutput) -> Tensor:
    """Return what each instance adds to the class token in the first layer, with the layer's dropout: (N, E)."""
    values = functional.linear(layer.norm(output.instances), layer.to_qkv.weight.chunk(3)[2])
    by_head = torch.unflatten(values, 1, (layer.heads, -1)) * output.weights[..., None]  # (N, H, d)
    out = layer.to_out(by_head.flatten(1).to(values.dtype))
    return functional.dropout(out, layer.dropout, layer.training)


def _weighted_logits(weight: Tensor, attention: Tensor, output: AttentionOutput) -> Tensor:
    instances = output.instances.to(weight.dtype)
    if isinstance(output, ClassAttentionOutput):
        return instances @ weight.T * attention
    width = instances.shape[1]
    if weight.shape[1] == width:
        return instances @ weight.T * attention.mean(1, keepdim=True)
    by_row = torch.unflatten(weight, 1, (-1, width))  # (K, H, E)
    products = functional.linear(instances, by_row.flatten(0, 1))  # (N, K * H)
    return (torch.unflatten(products, 1, by_row.shape[:2]) * attention[:, None]).sum(2)


def require_linear_classifier(model: Aggregator) -> nn.Linear:
    """Return the layer that reads the bag embedding; `ConfigError` if it cannot read single instances."""
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Linear) or classifier.in_features % instance_width(model):
        raise ConfigError(
            f"mhim_v2 ranks instances with the classifier of the bag; that of {type(model).__name__} reads something "
            "else; choose another aggregator, or mhim"
        )
    return classifier

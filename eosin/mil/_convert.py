"""Trained aggregators of other tools become model folders.

A foreign file is read with ``weights_only=True``, without fallback: nothing in it runs, whatever it holds besides
tensors. Which network it is follows from the names and shapes of its tensors; a tensor that nothing here explains is
an error, never left out in silence, and so is a layer that is missing unless the caller wants it filled. What neither
names nor shapes say (an activation, the meaning of the outputs) is stated by the caller; it is asked for, not guessed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from eosin.errors import CheckpointError, ConfigError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import ModelCard, build_model, save_model
from eosin.mil._recipe import Recipe, Training
from eosin.mil.layouts import LAYOUTS, Found, Layout, Taker, Tensors
from eosin.mil.slots import AGGREGATORS, Aggregator
from eosin.mil.task import Task
from eosin.mil.tasks._classification import Binary, Classification
from eosin.mil.tasks._cox import Cox
from eosin.mil.tasks._multilabel import MultiLabel

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the state dictionary, and prefixes of all names in it."""

PARALLEL = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")
"""What data parallelism and compilation leave in names, at any depth."""

COUNTER = ".num_batches_tracked"
"""A buffer of batch norms that no computation reads."""

DROPOUTS = ("dropout", "gate_dropout", "embed_dropout", "value_dropout")
"""Rates that act in training alone and stand in no checkpoint: 0, unless the caller states them."""

MEANINGS = {"classification": "softmax", "binary": "sigmoid", "multilabel": "sigmoid", "cox": "risk"}
"""The meaning of the outputs in each task that a checkpoint can be of."""


def convert_checkpoint(
    path: Path | str,
    out: Path | str,
    *,
    features: FeatureSpec,
    classes: Sequence[str] = (),
    task: str | None = None,
    outputs: str | None = None,
    options: Mapping[str, str] | None = None,
    partial: bool = False,
) -> ModelCard:
    """Turn a checkpoint of another tool into a model folder; `LAYOUTS` are the networks that are known.

    Parameters
    ----------
    path : Path
        ``.pt``, ``.pth`` or ``.safetensors`` with a plain state dictionary, or with one under a key of `WRAPPERS`.
    out : Path
        The model folder.
    features : FeatureSpec
        What the model was trained on, which no such file says; its width must be the checkpoint's.
    classes : sequence of str
        Names of the classes; two for a model with one output, whose logit belongs to the second.
    task : str, optional
        One of `MEANINGS`; says what the outputs mean.
    outputs : str, optional
        The same in other words: ``softmax`` for classes that exclude each other, ``sigmoid`` for a yes or no each,
        ``risk`` or ``risk:INDEX`` for the output that is the logarithm of a hazard.
    options : mapping of str to str, optional
        Options of the aggregator that the file does not show, by name: ``{"embed_activation": "gelu"}``.
    partial : bool
        Give layers that the file lacks fresh weights, the same every time; the model card names them. For networks that
        are published without their last layer (Feather) or as a start for training (DSMIL).

    Returns
    -------
    ModelCard
        The card of the written model.

    Raises
    ------
    CheckpointError
        If the file cannot be read safely, is damaged, is of no known network, does not fit `features` or `classes`, or
        leaves open what only the caller can say; the message names the choices.
    """
    path, out = Path(path), Path(out)
    found, questions = recognise(read_tensors(path), path, options)
    said = _meaning(found, classes, task, outputs, path)
    if said is None:
        questions.append(_outputs_question(found.n_outputs))
    if questions:
        raise CheckpointError(path, f"is {found.tool}, but the file does not say everything; {'; '.join(questions)}")
    assert said is not None
    if found.dim != features.dim:
        raise CheckpointError(
            path, f"was trained on features of width {found.dim}, not {features.dim}; name its encoder"
        )
    meaning, index = said
    posed = _task(found.n_outputs, meaning, classes, path)
    recipe = Recipe(aggregator=found.aggregator, training=Training(standardize=False))
    model, untrained = _filled(recipe, posed, found, index, path, partial=partial)
    facts = {"converted_from": found.tool, "file": path.name}
    if untrained:
        facts["untrained"] = ", ".join(untrained)
    card = ModelCard(recipe=recipe, task=posed.model_dump(mode="json"), features=features, training=facts)
    return save_model(out, model.eval(), card)


def _filled(
    recipe: Recipe, task: Task, found: Found, index: int | None, path: Path, *, partial: bool
) -> tuple[Aggregator, list[str]]:
    """Return the model with the tensors in it, and the layers that the file lacks.

    Shapes are compared before anything is allocated: a damaged file may ask for any size.
    """
    try:
        with torch.device("meta"):
            shapes = build_model(recipe, task, found.dim).state_dict()
    except ConfigError as error:
        raise CheckpointError(path, f"does not fit {found.tool}: {error}") from None
    tensors = found.tensors if index is None else _only_output(found, index, shapes, path)
    surplus = [name for name in tensors if name not in shapes]
    layers = sorted({name.rpartition(".")[0] or name for name in shapes if name not in tensors})
    if surplus or (layers and not partial):
        fault = f"has {', '.join(surplus)} besides" if surplus else f"lacks the layers {', '.join(layers)}"
        raise CheckpointError(path, f"{fault}; pass --partial where fresh, untrained layers are wanted")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name].shape:
            expected, given = list(shapes[name].shape), list(tensor.shape)
            raise CheckpointError(path, f"does not fit {found.tool}: {name} is {given}, where {expected} belongs")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build_model(recipe, task, found.dim)
    model.load_state_dict(tensors, strict=False)
    return model, layers


def _only_output(found: Found, index: int, shapes: Tensors, path: Path) -> Tensors:
    """Return the tensors of a model with output `index` alone, which the others must not take part in."""
    kept = {}
    for name, tensor in found.tensors.items():
        wanted = shapes[name].shape if name in shapes else tensor.shape
        parts = [part for part in range(tensor.ndim) if tensor.shape[part] != wanted[part : part + 1].numel()]
        if len(parts) > 1 or any(tensor.shape[part] != found.n_outputs for part in parts):
            raise CheckpointError(path, f"cannot give output {index} alone: in {found.tool} it reads all outputs")
        kept[name] = tensor.narrow(parts[0], index, 1).clone() if parts else tensor
    return kept


def _meaning(
    found: Found, classes: Sequence[str], task: str | None, outputs: str | None, path: Path
) -> tuple[str, int | None] | None:
    """Return what the outputs mean and, of a risk among several outputs, which one; None where nobody says."""
    if task is not None and task not in MEANINGS:
        raise CheckpointError(path, f"cannot become a model of task {task}; choose {', '.join(MEANINGS)}")
    meaning, colon, number = (outputs or MEANINGS.get(task or "", "")).partition(":")
    if meaning not in ("", "softmax", "sigmoid", "risk") or (colon and (meaning != "risk" or not number.isdecimal())):
        raise CheckpointError(path, f"--outputs {outputs} is not softmax, sigmoid, risk or risk:INDEX")
    if task is not None and meaning != MEANINGS[task]:
        raise CheckpointError(path, f"--outputs {outputs} contradicts --task {task}, which takes {MEANINGS[task]}")
    n_outputs = found.n_outputs
    if not meaning and classes:
        meaning = "softmax" if n_outputs is None else "sigmoid" if n_outputs == 1 else found.outputs or ""
    if meaning == "softmax" and n_outputs == 1 == len(classes) - 1 and found.outputs == "softmax":
        meaning = "sigmoid"  # one logit that is the difference of the two
    if meaning == "risk" and n_outputs is not None and n_outputs > 1:
        if not colon or int(number) >= n_outputs:
            known = ", ".join(f"risk:{place}" for place in range(n_outputs))
            raise CheckpointError(path, f"has {n_outputs} outputs; say which is the risk: --outputs {known}")
        return meaning, int(number)
    return (meaning, None) if meaning else None


def _outputs_question(n_outputs: int | None) -> str:
    if n_outputs == 1:
        return "say what its output means: --classes NEGATIVE,POSITIVE, or --outputs risk"
    if n_outputs is None:
        return "it has no last layer: name the --classes of the new one, and pass --partial"
    return (
        f"say what its {n_outputs} outputs mean: --outputs softmax (classes that exclude each other), sigmoid (a yes "
        "or no each), both with --classes, or risk:INDEX (the hazard of a Cox model)"
    )


def _task(n_outputs: int | None, meaning: str, classes: Sequence[str], path: Path) -> Task:
    if meaning == "risk":
        if classes:
            raise CheckpointError(path, f"a risk has no classes; remove --classes {','.join(classes)}")
        return Cox()
    if meaning == "softmax" and n_outputs == 1:
        raise CheckpointError(path, "has one output, of which no softmax is taken; pass --outputs sigmoid or risk")
    expected = len(classes) if n_outputs is None else max(n_outputs, 2)
    if len(classes) != expected or expected < 2:
        outputs = "no last layer" if n_outputs is None else f"{n_outputs} output{'s' * (n_outputs > 1)}"
        raise CheckpointError(path, f"has {outputs}; name {max(expected, 2)} classes, not {len(classes)}")
    if meaning == "softmax":
        return Classification.parse({"classes": tuple(classes)})
    if n_outputs == 1 or (n_outputs is None and expected == 2):
        return Binary.parse({"classes": tuple(classes)})
    flags = {"positives": ("1",) * expected, "negatives": ("0",) * expected}
    return MultiLabel.parse({"targets": tuple(classes), **flags})


def read_tensors(path: Path) -> Tensors:
    """Read the tensors of a foreign checkpoint, without what wrappers leave in their names.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or holds anything but tensors and plain values, or no tensors.
    """
    if not path.is_file():
        raise CheckpointError(path, "is not a file" if path.exists() else "no such file")
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else _load_inert(path)
    except UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise CheckpointError(path, "is damaged or is not a checkpoint of torch; copy it again") from None
        raise CheckpointError(
            path, "holds more than tensors, which is never loaded; save its state_dict alone"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (torch's reader says of nothing what it raises for a damaged file)
        raise CheckpointError(path, f"cannot be read ({' '.join(str(error).split())[:200]}); copy it again") from None
    return _unwrapped(loaded, path)


class _Inert(dict[Any, Any]):
    """Stands for an object of a class that is not torch's: it takes whatever the file gives it, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return dict.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Drop what the object was made of."""


def _load_inert(path: Path) -> object:
    """Read a file of torch whose settings may be objects of other packages (STAMP, Lightning, argparse).

    None of these packages is imported: to torch's reader for tensors each name means an empty object. It refuses names
    with which a file could do harm (``os.system``) all the same.
    """
    # the older format has no list of names; such files hold tensors and plain values, or are refused
    names = get_unsafe_globals_in_checkpoint(path) if is_zipfile(path) else []
    with safe_globals([(type("_Inert", (_Inert,), {}), name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(loaded: object, path: Path) -> Tensors:
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(path, "is not a dictionary of tensors; save the model's state_dict")
    tensors = {PARALLEL.sub("", str(name)): tensor for name, tensor in loaded.items()}
    while len(first := {name.partition(".")[0] for name in tensors}) == 1 and first < {*WRAPPERS}:
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    if len(tensors) < len(loaded):
        raise CheckpointError(path, "holds tensors whose names differ only in module., model. or net.; save one model")
    return tensors


def recognise(
    tensors: Mapping[str, Tensor], path: Path, stated: Mapping[str, str] | None = None
) -> tuple[Found, list[str]]:
    """Return which network the tensors are of, under our names, and what has to be asked about it.

    Parameters
    ----------
    tensors : mapping of str to Tensor
    path : Path
        For messages.
    stated : mapping of str to str, optional
        Options of the aggregator that tensors do not show.

    Raises
    ------
    CheckpointError
        If no known network has such tensors, there are others besides, or one of them holds no usable numbers.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    for name, tensor in tensors.items():
        _require_finite(name, tensor, path)
    fitting = [
        (layout, kept) for layout in map(LAYOUTS.__getitem__, LAYOUTS) if (kept := layout.of(dict(tensors))) is not None
    ]
    if not fitting:
        some = ", ".join(sorted(tensors)[:5])
        raise CheckpointError(path, f"does not match any network that eosin converts; it holds {some}")
    layout, kept = max(fitting, key=lambda pair: len(pair[0].marks))
    return _explained(layout, {name: _numbers(name, value, path) for name, value in kept.items()}, path, stated or {})


def _numbers(name: str, tensor: Tensor, path: Path) -> Tensor:
    """Return a tensor in float32, the type of all models; refuse anything that cannot be a weight."""
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise CheckpointError(path, f"holds {name} in {str(tensor.dtype).removeprefix('torch.')}, not as weights")
    return tensor.to(torch.float32)


def _require_finite(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse a tensor that a training has spoilt, or that is larger than the file that it stands in."""
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        return
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointError(path, f"is damaged: {name} has more numbers than the file holds")
    if not torch.isfinite(tensor.to(torch.float32)).all():
        raise CheckpointError(path, f"holds NaN or infinite numbers in {name}; take another checkpoint of the training")


def _explained(layout: Layout, tensors: Tensors, path: Path, stated: Mapping[str, str]) -> tuple[Found, list[str]]:
    taker = Taker(tensors, path, stated)
    found = layout.read(taker)
    if tensors:
        raise CheckpointError(path, f"looks like {found.tool}, but nothing explains {', '.join(sorted(tensors)[:5])}")
    options = found.aggregator.options
    for name, said in taker.stated.items():
        if str(options.get(name, said)).lower() != said.lower():
            raise CheckpointError(path, f"has {name} {options[name]}, which --option {name}={said} contradicts")
    try:
        known = AGGREGATORS.resolve(found.aggregator.name, options | taker.stated)
    except ConfigError as error:
        raise CheckpointError(path, f"does not fit {found.tool}: {error}") from None
    options = {name: 0.0 for name in known if name in DROPOUTS} | options | taker.stated
    aggregator = found.aggregator.model_copy(update={"options": options})
    questions = [
        f"state {name}: {' or '.join(choices)} (--option {name}={choices[0]})"
        for name, choices in taker.questions.items()
    ]
    return Found(**vars(found) | {"aggregator": aggregator}), questions

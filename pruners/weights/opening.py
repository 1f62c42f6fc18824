"""Models whose weights stay in the files of their checkpoint, to be read part by part.

    model = opening.open_folder("llama-65b", device="cuda")
    pruners.prune(model, pruners.Wanda(0.5), windows)        # as any other model; what changes lies in `work`
    pruners.checkpoint.save(model, tokenizer, "wanda-50")

transformers builds the model, renames, joins and ties its weights as always, but of tensors without values; which
tensors of the files became which parameter is told by their storage.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedModel

from pruners.interface import checks, described
from pruners.interface.checks import AnyPath, Folder
from pruners.modeling_pruned import check_complete, check_shards, indexed
from pruners.run import inputs
from pruners.weights import homes, joined, sources
from pruners.weights.joined import Join
from pruners.weights.shards import Shards, Tensors

JOINS = {torch.ops.aten.stack.default: True, torch.ops.aten.cat.default: False}  # whether it adds a dimension


@checks.arguments
def open_folder(
    folder: AnyPath, *, dtype: Any = "auto", device: Any = None, work: Folder | None = None, mark: str = ""
) -> PreTrainedModel:
    """The model of a folder with its weights at home on the disk, in evaluation mode, to be run on `device` (the CPU).

    What is changed about it goes to `work`, a folder of its own (None: a temporary one), with `mark`, by which another
    process knows finished parts of the same work.  `dtype` is a torch dtype, or `auto` for the one it was saved in.
    Raises ValueError where tensors and configuration disagree, for damaged files, and for a checkpoint of whose tensors
    parameters are made otherwise than by joining them (as experts are); FileNotFoundError for files that are not there.
    """
    folder = Path(folder).expanduser()
    model, info = opened(folder, dtype=dtype, device=device, work=work, mark=mark)
    check_complete(folder, info)
    return model


def opened(
    folder: Path,
    *,
    dtype: Any = "auto",
    device: Any = None,
    work: Path | None = None,
    mark: str = "",
    shards: Tensors | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The same with what transformers tells of missing, unexpected and mismatched weights, which nobody has checked.

    `shards` are the weights where they are not those in the folder's own files.
    """
    described.check(folder)
    place = inputs.usable_device(device) or torch.device("cpu")
    if shards is None:
        check_shards(folder)
        shards = Shards(_files(folder))
    model, info, names = _described(folder, shards, dtype, place)
    _put(model, lambda _, old: homes.placeholder(old, place))
    if info["missing_keys"] or info["mismatched_keys"]:
        return model, info  # nobody may use it
    homes.settle(model, sources.Disk(shards, names, work, mark), place)
    return model.eval(), info


def brought(folder: Path, shards: Tensors, *, dtype: Any = "auto", device: Any = None) -> tuple[Any, dict[str, Any]]:
    """The model that the folder describes, of these weights, each brought to `device` (the CPU) before the next is
    read; with what transformers tells, as of `opened`."""
    described.check(folder)
    place = inputs.usable_device(device) or torch.device("cpu")
    model, info, names = _described(folder, shards, dtype, place)
    if not info["missing_keys"] and not info["mismatched_keys"]:
        _put(model, lambda name, old: joined.read(shards, names[name], place).to(place, old.dtype))
    return model.eval(), info


def _described(
    folder: Path, shards: Tensors, dtype: Any, place: torch.device
) -> tuple[Any, dict[str, Any], dict[str, str | Join]]:
    """As `_built`, with its buffers filled and its generation settings."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model, info, names = _built(config, shards, dtype, folder)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _fill_buffers(model, shards, names, place)
    return model, info, names


def _files(folder: Path) -> list[Path]:
    named = [folder / name for name in indexed(folder)]
    if named and all(path.is_file() for path in named):
        return named
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise FileNotFoundError(f"{folder} has no weights as model.safetensors or as the files of an index of them.")


def _built(config: Any, shards: Tensors, dtype: Any, folder: Path) -> tuple[Any, dict[str, Any], dict[str, str | Join]]:
    """The model on the meta device, and by parameter and buffer what of the files it is."""
    state = {name: shards.empty(name) for name in shards}
    kind = config.dtype if dtype == "auto" else dtype
    kind = kind or next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    state = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    whose = {_storage(tensor): name for name, tensor in state.items()}

    def known(tensor: Tensor) -> str | None:
        name = whose.get(_storage(tensor))
        return name if name and state[name].shape == tensor.shape and tensor.is_contiguous() else None

    load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]  # subclasses' need a folder
    with described.convertible(folder), _Watch(known) as watch:
        model, info = load(
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)],
            None,
            config=config,
            state_dict=state,
            dtype=kind,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told apart by the caller
        )
    names: dict[str, str | Join] = {}
    made = []
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if (source := watch.of(tensor)) or (name in shards and shards.empty(name).shape == tensor.shape):
            names[name] = source or name
        elif isinstance(tensor, nn.Parameter) and name not in absent:
            made.append(name)
    if made:
        raise ValueError(
            f"{made[0]} of {folder} is computed from the file's tensors during loading, not just joined of them, so it "
            "cannot be read block by block; keep this model's weights on the device or in CPU memory."
        )
    return model, info, names


class _Watch(TorchDispatchMode):
    """Within, it is noted which tensors are joined of others; `known` names those that are of the files."""

    def __init__(self, known: Callable[[Tensor], str | None]) -> None:
        super().__init__()
        self._known = known
        self._joined: dict[int, tuple[Join, Tensor]] = {}  # by storage, which is another's once the tensor is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in JOINS:
            self._note(made, *args, adds=JOINS[func], **(kwargs or {}))
        return made

    def _note(self, made: Tensor, tensors: list[Tensor], dim: int = 0, *, adds: bool) -> None:
        parts = [self.of(tensor) for tensor in tensors]
        if all(part is not None for part in parts):
            dim %= made.ndim
            sizes = None if adds else tuple(tensor.shape[dim] for tensor in tensors)
            join = Join(tuple(filter(None, parts)), dim, sizes, made.shape, made.dtype)
            self._joined[_storage(made)] = join, made

    def of(self, tensor: Tensor) -> str | Join | None:
        """What of the files a tensor is, or is joined of; None for any other, and for a piece of one."""
        if (name := self._known(tensor)) is not None:
            return name
        join, made = self._joined.get(_storage(tensor), (None, tensor))
        return join if (made.shape, made.stride()) == (tensor.shape, tensor.stride()) else None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fill_buffers(model: Any, shards: Tensors, names: dict[str, str | Join], place: torch.device) -> None:
    """Buffers of the files from there; the others as the model computes them."""
    for path, module in model.named_modules():
        computed = []
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            source = names.get(f"{path}.{name}" if path else name)
            if source is None:
                module._buffers[name] = torch.empty_like(buffer, device=place)
                computed.append(name)
            else:
                module._buffers[name] = joined.read(shards, source).to(place, buffer.dtype)
        if computed:
            model._init_weights(module)


def _put(model: nn.Module, value: Callable[[str, nn.Parameter], Tensor]) -> None:
    """In the place of every weight on the meta device what `value` gives for it, the same for those that are tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                if old not in made:
                    new = value(f"{path}.{name}" if path else name, old)
                    made[old] = nn.Parameter(new, requires_grad=old.requires_grad)
                module._parameters[name] = made[old]

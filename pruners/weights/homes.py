"""Where a model's weights are kept while not in use (their home): on the device, in CPU memory, or on disk.

A model away from home has a placeholder for every weight: the right shape, type and device, one NaN in memory.  Its
parts (each decoder block, each other layer that holds weights) come to the device when they run and go again; `held`
keeps one there for as long as something is done with it.  A thread fetches the part that comes next meanwhile.

    homes.settle(model, sources.Memory(model), "cuda")        # from CPU memory
    model = opening.open_folder(folder, device="cuda")        # from the checkpoint's own files
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from pruners import anatomy
from pruners.lazy import Tensor, nn, torch
from pruners.weights import memory, structure
from pruners.weights.sources import Disk, Memory, Source

ATTRIBUTE = "_weights_home"  # of the model and of the module of every part


class Values(Mapping[str, Tensor]):
    """The tensors of a model at home by name, tied ones under every name, of the types that the model has them in."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._parameters = dict(home.model.named_parameters(remove_duplicate=False))

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if parameter in self._home.staying:
            return parameter.data
        return self._home.source.read(self._home.first_name(parameter, name)).to(parameter.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@dataclass
class Part:
    """A decoder block, or another module that holds weights of its own."""

    name: str
    module: nn.Module
    recurse: bool
    uses: int = 0
    changed: bool = False
    loads: int = 0
    taken: list[nn.Parameter] = field(default_factory=list)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the model."""
        return dict(self.module.named_parameters(self.name, recurse=self.recurse))


class Home:
    """Brings the parts of one model to `device` and back; made by `settle`."""

    def __init__(self, model: nn.Module, source: Source, device: torch.device) -> None:
        self.model, self.source, self.device = model, source, device
        self.backwards = False  # which part comes next
        self.staying: set[nn.Parameter] = set()  # on the device all the time
        self.rounded: dict[nn.Parameter, torch.dtype] = {}  # to these on their way to wider dtypes
        self._all = _parts(model)
        self._names = {p: name for name, p in model.named_parameters()}  # tied ones have their first name
        self._uses: Counter[nn.Parameter] = Counter()
        self._ahead: tuple[Part, Future[dict[nn.Parameter, Tensor]]] | None = None
        if isinstance(source, Disk):  # where memory is short
            memory.give_back()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        # one for all parts: torch's allocator gives what a tensor leaves only to the stream that it was made on
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers = _move_buffers(model, device)
        self._forwards = [vars(part.module).get("forward") for part in self._all]
        for part in self._all:
            part.module.forward = self._holding(part, part.module.forward)
            for parameter in part.parameters().values():
                parameter.data = placeholder(parameter, device)
            setattr(part.module, ATTRIBUTE, self)
        setattr(model, ATTRIBUTE, self)
        vars(model)["save_pretrained"] = _refuse_saving
        # to what the files' weights fit; one in memory stays as it is cut
        self.uncut = structure.uncut(model) if isinstance(source, Disk) else None

    @property
    def parts(self) -> list[Part]:
        """Those that the model still has."""
        there = set(map(id, self.model.modules()))
        return [part for part in self._all if id(part.module) in there]

    def __deepcopy__(self, memo: Any) -> Home:
        raise TypeError("A model with offloaded weights cannot be copied; open its folder again.")

    @property
    def sweeps(self) -> int:
        """How often the blocks came from home, on average."""
        loads = [part.loads for part in self.parts if part.recurse]
        return round(sum(loads) / len(loads)) if loads else 0

    @contextmanager
    def hold(self, part: Part, changes: bool) -> Iterator[None]:
        """The part's weights are on the device meanwhile; with `changes` they go home as they are at the end.

        After an error they do not.
        """
        if not part.uses:
            self._bring(part)
        part.uses += 1
        try:
            yield
            part.changed |= changes
        finally:
            part.uses -= 1
            if not part.uses:
                self._send(part)

    def stay(self, parameters: Iterable[nn.Parameter]) -> None:
        """From now on these are in place all the time, whatever names they get meanwhile."""
        self._names |= {p: self.first_name(p, name) for name, p in self.model.named_parameters()}
        wanted = set(parameters)
        for part in self.parts:
            if wanted.intersection(self._moving(part).values()):
                with self.hold(part, changes=False):
                    self.staying |= wanted.intersection(part.parameters().values())

    def go(self, parameters: Iterable[nn.Parameter]) -> None:
        """They come and go with their parts again; those of parts that are held stay until that ends."""
        going = self.staying.intersection(parameters)
        self.staying -= going
        for part in (part for part in self.parts if part.uses):
            here = going.intersection(part.parameters().values())
            part.taken += here
            self._uses.update(here)
        for parameter in going:
            if not self._uses[parameter]:
                parameter.data = placeholder(parameter, self.device)

    def first_name(self, parameter: nn.Parameter, name: str) -> str:
        """Of a parameter that is tied, where it is named first; of one that has got another name since, its first."""
        return self._names.get(parameter, name)

    def part_of(self, module: nn.Module) -> Part:
        return next(part for part in self.parts if module is part.module)

    def leave(self) -> None:
        """Put every weight and buffer back in place, in the memory where it is kept."""
        self._thread.shutdown()
        for part, own in zip(self._all, self._forwards, strict=True):
            del part.module.forward
            if own is not None:
                part.module.forward = own
            for name, parameter in part.parameters().items():
                parameter.data = self.source.read(self.first_name(parameter, name))
            delattr(part.module, ATTRIBUTE)
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        delattr(self.model, ATTRIBUTE)
        del vars(self.model)["save_pretrained"]

    def _holding(self, part: Part, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def held_forward(*args: Any, **kwargs: Any) -> Any:
            with self.hold(part, changes=False):
                return forward(*args, **kwargs)

        return held_forward

    def _bring(self, part: Part) -> None:
        there = self._moving(part)
        if any(not self._uses[p] for p in there.values()):
            tensors = self._fetched(part)
            part.loads += 1
            with torch.inference_mode(False), torch.no_grad():
                for parameter in there.values():
                    if not self._uses[parameter]:
                        parameter.data = tensors[parameter]
        part.taken = list(there.values())
        self._uses.update(part.taken)
        self._fetch_next(part)

    def _send(self, part: Part) -> None:
        now = self._moving(part)
        if part.changed:
            self.source.write(part.name, {self.first_name(p, name): p.data for name, p in now.items()})
        part.changed = False
        self._uses = +(self._uses - Counter(part.taken))
        with torch.inference_mode(False), torch.no_grad():
            for parameter in (*part.taken, *now.values()):
                if not self._uses[parameter] and parameter not in self.staying:
                    parameter.data = placeholder(parameter, self.device)

    def _moving(self, part: Part) -> dict[str, nn.Parameter]:
        """The part's parameters that come and go."""
        return {name: p for name, p in part.parameters().items() if p not in self.staying}

    def _fetched(self, part: Part) -> dict[nn.Parameter, Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] is part:
            return ahead[1].result()
        if ahead and not ahead[1].cancel():  # of a part that did not come next
            ahead[1].exception()  # it is read to its end, lest two parts more than are needed be in memory
        del ahead
        return self._fetch(part)

    def forget_ahead(self) -> None:
        """What was fetched for later is not what it will be then."""
        if self._ahead:
            self._ahead[1].cancel()
        self._ahead = None

    def _fetch_next(self, part: Part) -> None:
        parts = self.parts
        at = parts.index(part) + (-1 if self.backwards else 1)
        if 0 <= at < len(parts) and not parts[at].uses and self._ahead is None:
            self._ahead = parts[at], self._thread.submit(self._fetch, parts[at])

    def _fetch(self, part: Part) -> dict[nn.Parameter, Tensor]:
        """The part's tensors on the device, of the types that the model has them in."""
        with torch.inference_mode(False), torch.no_grad():
            return {p: self._placed(name, p) for name, p in self._moving(part).items()}

    def _placed(self, name: str, parameter: nn.Parameter) -> Tensor:
        if self._stream is None:
            return self._read(name, parameter)
        with torch.cuda.stream(self._stream):
            moved = self._read(name, parameter)
        self._stream.synchronize()
        moved.record_stream(torch.cuda.default_stream(self.device))
        return moved

    def _read(self, name: str, parameter: nn.Parameter) -> Tensor:
        tensor = self.source.read(self.first_name(parameter, name), self.device)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} where its weights are kept and {list(parameter.shape)} in the model; "
                "the files changed during the run. Run again."
            )
        tensor = tensor.to(self.rounded.get(parameter, tensor.dtype))
        if self._stream is not None and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True).to(parameter.dtype)


def placeholder(parameter: Tensor, device: torch.device) -> Tensor:
    """One NaN in the shape of a weight: what reads it by mistake is noticed, and writing to it is an error."""
    return torch.full((), torch.nan, dtype=parameter.dtype, device=device).expand(parameter.shape)


def settle(model: nn.Module, source: Source, device: Any) -> Home:
    """From now on the model's weights are at `source` and work on `device`; buffers stay there."""
    return Home(model, source, torch.device(device))


def of(model: nn.Module) -> Home | None:
    """The model's home; None where its weights are in place."""
    home: Home | None = vars(model).get(ATTRIBUTE)
    return home


def on_disk(model: nn.Module) -> Disk | None:
    """Where the weights of a model are whose home is the disk."""
    home = of(model)
    return home.source if home is not None and isinstance(home.source, Disk) else None


def stay(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """These parameters of a model, or of a part of one, are in place all the time, until `go`."""
    if (home := of(model)) is not None:
        home.stay(parameters)


def add(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """The same for parameters that the model has got just now, and that are in place."""
    if (home := of(model)) is not None:
        home.staying.update(parameters)


def go(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """They go home again with their parts, which are held with `changes` meanwhile."""
    if (home := of(model)) is not None:
        home.go(parameters)


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """What is done to weights away from home within, adapters included, is undone afterwards."""
    home = of(model)
    if home is None:
        yield
        return
    with home.source.undone():
        try:
            yield
        finally:
            home.forget_ahead()
            home.go(set(home.staying))


@contextmanager
def held(*modules: nn.Module, changes: bool = False) -> Iterator[None]:
    """The weights of these parts of a model (a block's module, its embeddings, its head) are in place meanwhile.

    With `changes` what is done to them stays.  Nothing happens where weights are in place anyhow.
    """
    with ExitStack() as stack:
        for module in modules:
            if (home := of(module)) is not None:
                stack.enter_context(home.hold(home.part_of(module), changes))
        yield


def around_the_blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are no decoder blocks: embeddings, norms and projections outside of them, the head."""
    home = of(model)
    return [] if home is None else [part.module for part in home.parts if not part.recurse]


@contextmanager
def lent(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The parts of a model in memory come to `device` when they run, for a while; None: it works where it is."""
    if device is None or of(model) is not None or same(device, next(model.parameters()).device):
        yield
        return
    home = settle(model, Memory(model), device)
    try:
        yield
    finally:
        home.leave()


@contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """After an error within, a model at home on the disk is as whole as it was opened, whatever was pruned before."""
    home, disk = of(model), on_disk(model)
    try:
        yield
    except BaseException:
        if home is not None and home.uncut is not None and disk is not None:
            disk.forget()
            home.forget_ahead()
            home.uncut()
        raise


def each(model: nn.Module) -> Iterator[Mapping[str, nn.Parameter]]:
    """The parameters of the model's parts by name, one part after the other in place; tied ones come once."""
    home = of(model)
    if home is None:
        yield dict(model.named_parameters())
        return
    seen: set[nn.Parameter] = set()
    for part in home.parts:
        with home.hold(part, changes=False):
            yield {name: p for name, p in part.parameters().items() if p not in seen}
            seen.update(part.parameters().values())


def same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; a kind without a number is its first."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError(
        "This model's weights are offloaded, and transformers would save placeholders; use "
        "pruners.checkpoint.save(model, tokenizer, folder)."
    )


def _move_buffers(model: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, Tensor]]:
    """Those that were elsewhere, as they were."""
    moved = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                moved.append((module, name, buffer))
                module._buffers[name] = buffer.to(device)
    return moved


def _parts(model: nn.Module) -> list[Part]:
    """What lies before the blocks, the blocks, what lies behind them, as the model names them."""
    where = anatomy.family(model).blocks
    blocks = {f"{where}.{index}" for index in range(len(anatomy.modules(model)))}
    inside = tuple(f"{name}." for name in blocks)
    found: list[Part] = []
    for name, module in model.named_modules():
        if name in blocks:
            found.append(Part(name, module, recurse=True))
        elif not name.startswith(inside) and any(True for _ in module.parameters(recurse=False)):
            found.append(Part(name, module, recurse=False))
    return found

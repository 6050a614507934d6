"""What every sharded layer shares: where each row of the unsharded tensors is stored.

A layer fuses, reorders and slices weights as it likes, and says so once, in `sources`: for every tensor of the ordinary
layer that it replaces, which piece of it lies where in its own parameters. Slicing an ordinary layer, reading
safetensors, `state_dict`, gathering a checkpoint and summing gradients all follow from that one statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Groups, ProcessGroup
from seqpar.partition import Layout, Piece, Range, layout_names

__all__ = ["ShardedModule", "Source", "gather_state_dict", "iter_sources", "name_modules", "sync_gradients"]


WHOLE = "pass `.full_tensor()`, which is sliced here"
UNSHARD = (
    "FSDP shards it between calls: load and save weights before `fully_shard`, or gather them by `layer.unshard()` and "
    "`gather_state_dict`"
)

Found = TypeVar("Found")
Part = TypeVar("Part", bound=nn.Module)


class Source(NamedTuple):
    """How one tensor of the unsharded layer is stored on a rank.

    Attributes:
        shape: the unsharded shape.
        param: name of the stored parameter, which may hold pieces of several tensors.
        pieces: which ranges of the tensor lie where in the parameter, all along one dim.
    """

    shape: tuple[int, ...]
    param: str
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...], param: str) -> Source:
        """The source of a replicated parameter."""
        return cls(shape, param, (Piece(0, Range(0, shape[0]), Range(0, shape[0])),))

    @property
    def dim(self) -> int:
        return self.pieces[0].dim

    @property
    def windows(self) -> tuple[Range, ...]:
        """The ranges along `dim` of the unsharded tensor that hold the pieces and no more; one where they touch."""
        runs: list[Range] = []
        for full in sorted(piece.full for piece in self.pieces if piece.full.size):
            if runs and runs[-1].stop >= full.start:
                runs[-1] = Range(runs[-1].start, max(runs[-1].stop, full.stop))
            else:
                runs.append(full)
        return tuple(runs) or (self.pieces[0].full,)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's pieces laid side by side, as `state_dict` shows them."""
        return _with(self.shape, self.dim, sum(p.full.size for p in self.pieces))


class ShardedModule(nn.Module):
    """A layer whose parameters are slices of an ordinary layer's.

    `state_dict()` holds this rank's slices under the ordinary names, without communication, and `load_state_dict`
    takes either such slices or whole tensors, which it slices. `gather_state_dict` puts slices back together.

    Subclasses define `sources` and `shard_group`; `label` names the layer's collectives in `comm.record()`.
    """

    label: str = ""
    unnamed: ClassVar[tuple[str, ...]] = ()

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        """Each tensor of the unsharded layer and where rank `rank` of `shard_group` (default: this one) stores it."""
        raise NotImplementedError

    @property
    def shard_group(self) -> ProcessGroup | None:
        """The ranks that the parameters are sharded over; None where they are replicated."""
        return None

    def weights(self, layout: Layout) -> list[Tensor]:
        """Views of the parameters as a step under `layout` uses them; all of them unless a layer says otherwise."""
        return [param for param in self._parameters.values() if param is not None]

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        """Groups over which the gradient of `param` is partial after `backward`; see `sync_gradients`."""
        return (groups.sp,)

    def sync_gradients(self, groups: Groups) -> None:
        """Sum this module's own partial gradients; see the function `sync_gradients`."""
        for name, param in self._parameters.items():
            if param is not None and param.requires_grad:
                param.grad = _summed(param, self.gradient_groups(name, groups), self.label)

    def load_source(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Fill the stored parameter with its pieces of one unsharded tensor.

        A parameter on the meta device is first made real on the tensor's device, in its own dtype.

        Args:
            name: a key of `sources()`.
            tensor: the unsharded tensor, or one of its `windows`, whose pieces alone are filled then.
            offset: where that window begins.
        """
        source = self.sources()[name]
        param = self._materialise(source.param, tensor.device)
        with torch.no_grad():
            for piece in source.pieces:
                if offset <= piece.full.start and piece.full.stop <= offset + tensor.shape[piece.dim]:
                    taken = tensor.narrow(piece.dim, piece.full.start - offset, piece.full.size)
                    param.narrow(piece.dim, piece.local.start, piece.local.size).copy_(taken)

    def load_unsharded(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Slice whole tensors into this layer; a meta tensor leaves its parameter on the meta device.

        Raises:
            ValueError: a tensor has another shape than this layer was built for.
            TypeError: one is a DTensor.
        """
        for name, source in self.sources().items():
            tensor = tensors[name]
            assert tensor is not None, name
            comm.refuse_dtensor(tensor, name, WHOLE)
            if tuple(tensor.shape) != source.shape:
                raise ValueError(f"`{name}` must have shape {list(source.shape)}, got {list(tensor.shape)}")
            if not tensor.is_meta:
                self.load_source(name, tensor)

    def aliases(self) -> dict[str, ShardedModule]:
        """Tensors of the unsharded layer that another module stores under its own name `weight` (tied weights)."""
        return {}

    def gather_source(self, name: str) -> Tensor:
        """The unsharded tensor `name`, on every rank of `shard_group` (one all-gather of this rank's pieces)."""
        comm.refuse_dtensor(self._parameter(self.sources()[name].param), name, UNSHARD)
        source, group = self.sources()[name], self.shard_group
        size = 1 if group is None else group.size()
        per_rank = [source] if group is None else [self.sources(rank)[name] for rank in range(size)]
        own = self._local(source, self._parameter(source.param).detach())
        full = own.new_empty(source.shape)
        sizes = [_numel(entry.local_shape) for entry in per_rank]
        flat = own.reshape(-1)
        if group is not None:
            flat = comm.all_gather(flat, group=group, sizes=sizes, label=f"{self.label}.gather")
        for entry, part in zip(per_rank, flat.split(sizes), strict=True):
            local, at = part.view(entry.local_shape), 0
            for piece in entry.pieces:
                taken = local.narrow(piece.dim, at, piece.full.size)
                full.narrow(piece.dim, piece.full.start, piece.full.size).copy_(taken)
                at += piece.full.size
        return full

    def _parameter(self, name: str) -> nn.Parameter:
        param = self._parameters[name]
        assert param is not None, name
        return param

    def _materialise(self, name: str, device: torch.device) -> nn.Parameter:
        param = self._parameter(name)
        if param.is_meta:
            fresh = torch.empty(param.shape, dtype=param.dtype, device=device)
            param = nn.Parameter(fresh, requires_grad=param.requires_grad)
            setattr(self, name, param)
        return param

    @staticmethod
    def _local(source: Source, param: Tensor) -> Tensor:
        """This rank's pieces of one unsharded tensor, side by side: a view where there is one piece."""
        parts = [param.narrow(p.dim, p.local.start, p.local.size) for p in source.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, source.dim)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, source in self.sources().items():
            param = self._parameter(source.param)
            comm.refuse_dtensor(param, prefix + name, UNSHARD)
            whole = len(source.pieces) == 1 and source.local_shape == tuple(param.shape)
            value = param if keep_vars else param.detach()
            destination[prefix + name] = value if whole else self._local(source, value)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if local_metadata.get("assign_to_params_buffers", False):
            error_msgs.append("`assign` must be False: slices of several tensors share one parameter")
            return
        sources = self.sources()
        absent = {source.param for name, source in sources.items() if prefix + name not in state_dict}
        for name, source in sources.items():
            key = prefix + name
            if key not in state_dict:
                missing_keys.append(key)
            elif source.param not in absent or not self._parameter(source.param).is_meta:
                self._load_one(source, name, key, state_dict[key], error_msgs)
        if strict:
            own = {prefix + name for name in (*sources, *self.aliases())}
            children = tuple(f"{prefix}{child}." for child in self._modules)
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in own and not key.startswith(children)
            ]

    def _load_one(self, source: Source, name: str, key: str, tensor: Tensor, error_msgs: list[str]) -> None:
        """Copy a whole tensor's pieces, or this rank's slice; note an error where it is neither."""
        comm.refuse_dtensor(tensor, key, WHOLE)
        comm.refuse_dtensor(self._parameter(source.param), key, UNSHARD)
        if tuple(tensor.shape) == source.shape:
            self.load_source(name, tensor)
        elif tuple(tensor.shape) == source.local_shape:
            self._load_local(source, tensor)
        else:
            error_msgs.append(
                f"`{key}` must have shape {source.shape} (whole) or {source.local_shape} (this rank's slice), "
                f"got {tuple(tensor.shape)}"
            )

    def _load_local(self, source: Source, tensor: Tensor) -> None:
        param, at = self._materialise(source.param, tensor.device), 0
        with torch.no_grad():
            for piece in source.pieces:
                taken = tensor.narrow(piece.dim, at, piece.local.size)
                param.narrow(piece.dim, piece.local.start, piece.local.size).copy_(taken)
                at += piece.local.size


def drop_child_names(module: nn.Module, unnamed: tuple[str, ...]) -> None:
    """Leave the names of some children out of `module.state_dict()`, so that it reads like the unsharded module's.

    The children named in `unnamed` must have keys that do not clash with each other's.
    """

    def save(owner: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            for child in unnamed:
                if key.startswith(f"{prefix}{child}."):
                    state[prefix + key.removeprefix(f"{prefix}{child}.")] = state.pop(key)

    def load(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for child in unnamed:
            names = owner.get_submodule(child).state_dict(keep_vars=True)
            for name in names:
                if prefix + name in state:
                    state[f"{prefix}{child}.{name}"] = state.pop(prefix + name)

    module.register_state_dict_post_hook(save)
    module.register_load_state_dict_pre_hook(load)


def iter_sources(root: nn.Module) -> Iterator[tuple[str, ShardedModule, str, Source]]:
    """Every unsharded tensor that `root` and its children store.

    Yields:
        The unsharded tensor's full name, the module, the name within the module, and its `Source`.
    """
    for prefix, module in _sharded_modules(root, ""):
        for name, source in module.sources().items():
            yield prefix + name, module, name, source


def _sharded_modules(root: nn.Module, prefix: str) -> Iterator[tuple[str, ShardedModule]]:
    """Every sharded module with the prefix of its tensors' unsharded names."""
    if isinstance(root, ShardedModule):
        yield prefix, root
    unnamed = getattr(root, "unnamed", ())
    for name, child in root.named_children():
        yield from _sharded_modules(child, prefix if name in unnamed else f"{prefix}{name}.")


def gather_state_dict(root: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict of `root`, on every rank; tied tensors are one tensor under two names.

    Comm:  one all-gather per sharded tensor, over the layer's own group, in module order; call it on every rank.
    """
    found: dict[str, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for full, module, name, _ in iter_sources(root):
        found[full] = module.gather_source(name)
        if name == "weight":
            weights[id(module)] = found[full]
    for prefix, module in _sharded_modules(root, ""):
        for name, owner in module.aliases().items():
            found[prefix + name] = weights[id(owner)] if id(owner) in weights else owner.gather_source("weight")
    return found


def check_new(dtype: torch.dtype | None, **sizes: int) -> None:
    """Check what a layer is to be made with.

    Raises:
        ValueError: a size below 1, or a dtype that has no gradients.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating one, got {dtype}")


def check_view(stored: Layout, rank: int, layout: Layout, group: ProcessGroup) -> None:
    """Check that rank `rank` of the tensor-parallel group of `stored` holds what its rank of `group` needs in `layout`.

    Raises:
        ValueError: its rows do not contain that layout's, or `group` has another size than the layout's tp.
    """
    factor = layout.tp // stored.tp
    if not stored.reaches(layout) or group.size() != layout.tp or group.rank() // factor != rank:
        raise ValueError(
            f"`layout` must split the stored shard ({stored}, tp rank {rank}) further, got {layout} with group rank "
            f"{group.rank()} of {group.size()}; reachable are {layout_names(stored.reachable)}"
        )


def check_gradients(params: Iterable[nn.Parameter | None], layout: Layout | None, stored: Layout) -> None:
    """Check that a step under another layout than the stored one wants no gradient of replicated parameters.

    `sync_gradients` sums theirs over the ranks that hold other tokens under the stored layout; under another one some
    of those hold the same tokens, and would be counted again.

    Raises:
        ValueError: it does.
    """
    if layout is None or layout == stored or not torch.is_grad_enabled():
        return
    if any(param is not None and param.requires_grad for param in params):
        raise ValueError(
            f"`layout` must be the stored {tuple(stored)} where gradients of replicated parameters are wanted, got "
            f"{tuple(layout)}; use torch.no_grad()"
        )


def find_layout(known: Mapping[Any, Found], layout: Layout | None) -> Found:
    """What a layer keeps for a layout; None stands for the stored one.

    Raises:
        ValueError: the layout was never added.
    """
    try:
        return known[layout]
    except KeyError:
        added = layout_names(other for other in known if other is not None)
        raise ValueError(f"`layout` must be one of {added}, got {layout}; see add_layout") from None


def part_of(module: nn.Module, name: str, kind: type[Part]) -> Part:
    """A child that is to run in another layout.

    Raises:
        TypeError: it is another's module, such as a wrapper, which knows of no layouts.
    """
    part = getattr(module, name)
    if not isinstance(part, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__} to run in other layouts, got {type(part).__name__}")
    return part


def check_covered(module: nn.Module, sliced: nn.Module) -> None:
    """Raise ValueError unless `sliced` stores every parameter of `module`: what is left out would not be computed."""
    left = sorted({name for name, _ in module.named_parameters()} - {name for name, *_ in iter_sources(sliced)})
    if left:
        raise ValueError(
            f"`{type(module).__name__}` must have no other parameters than {type(sliced).__name__} stores, "
            f"got {', '.join(left[:4])}"
        )


def sync_gradients(root: nn.Module, groups: Groups) -> None:
    """Sum the gradients that are partial after `backward`; call it on every rank before the optimizer steps.

    Sequence ranks see other tokens, so the gradients of weights replicated over `sp` are partial over it, as in data
    parallel training; those of q/k norms and of replicated KV heads also over `tp`. Afterwards each parameter's
    gradient is its slice of the unsharded one.

    Where FSDP has sharded a gradient over an outer mesh axis, each rank sums its shard of it.

    Parameters of modules that are not the library's (an adapter around a linear) say themselves over which groups
    theirs is partial: set `param.gradient_groups = (groups.tp, groups.sp)`, or `()` for none.

    Raises:
        ValueError: a trainable parameter of another's module does not say so.
    """
    foreign = [
        (f"{path}.{name}", param)
        for path, module in root.named_modules()
        if not isinstance(module, ShardedModule)
        for name, param in module.named_parameters(recurse=False)
        if param.requires_grad
    ]
    for name, param in foreign:
        if not hasattr(param, "gradient_groups"):
            raise ValueError(
                f"`{name}` must say over which groups its gradient is partial, got no `gradient_groups`; set it to "
                "(groups.sp,) for a weight sharded over tp, to (groups.tp, groups.sp) for a replicated one before it"
            )
    for module in root.modules():
        if isinstance(module, ShardedModule):
            module.sync_gradients(groups)
    for name, param in foreign:
        param.grad = _summed(param, param.gradient_groups, name)


def _summed(param: nn.Parameter, groups: Iterable[ProcessGroup], label: str) -> Tensor:
    """The gradient of a parameter (zeros where it has none) summed over groups."""
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    for group in groups:
        grad = comm.on_shards(grad, partial(comm.all_reduce, group=group, label=f"{label}.grad"))
    return grad


def name_modules(root: nn.Module) -> None:
    """Set the `label` of every layer below `root` to its dotted path, as `comm.record()` shows it."""
    for name, module in root.named_modules():
        if hasattr(type(module), "label"):
            module.label = name


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())

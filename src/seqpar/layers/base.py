"""What every sharded layer shares: where each row of the unsharded tensors is stored.

A layer fuses, reorders and slices weights as it likes, and says so once, in `sources`: for every tensor of the ordinary
layer that it replaces, which piece of it lies where in its own parameters. Slicing an ordinary layer, reading
safetensors, `state_dict`, gathering a checkpoint and summing gradients all follow from that one statement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Groups, ProcessGroup
from seqpar.partition import Piece, Range

__all__ = ["ShardedModule", "Source", "gather_state_dict", "iter_sources", "name_modules", "sync_gradients"]


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
    def window(self) -> Range:
        """The smallest range along `dim` of the unsharded tensor that holds all pieces."""
        return Range(min(p.full.start for p in self.pieces), max(p.full.stop for p in self.pieces))

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

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        """Groups over which the gradient of `param` is partial after `backward`; see `sync_gradients`."""
        return (groups.sp,)

    def sync_gradients(self, groups: Groups) -> None:
        """Sum this module's own partial gradients; see the function `sync_gradients`."""
        for name, param in self._parameters.items():
            if param is not None and param.requires_grad:
                grad = torch.zeros_like(param) if param.grad is None else param.grad
                for group in self.gradient_groups(name, groups):
                    grad = comm.all_reduce(grad, group=group, label=f"{self.label}.grad")
                param.grad = grad

    def load_source(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Fill the stored parameter with its pieces of one unsharded tensor.

        A parameter on the meta device is first made real on the tensor's device, in its own dtype.

        Args:
            name: a key of `sources()`.
            tensor: the unsharded tensor, or a window of it along the source's dim.
            offset: where that window begins.
        """
        source = self.sources()[name]
        param = self._materialise(source.param, tensor.device)
        with torch.no_grad():
            for piece in source.pieces:
                taken = tensor.narrow(piece.dim, piece.full.start - offset, piece.full.size)
                param.narrow(piece.dim, piece.local.start, piece.local.size).copy_(taken)

    def load_unsharded(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Slice whole tensors into this layer; a meta tensor leaves its parameter on the meta device."""
        for name in self.sources():
            tensor = tensors[name]
            assert tensor is not None, name
            if not tensor.is_meta:
                self.load_source(name, tensor)

    def gather_source(self, name: str) -> Tensor:
        """The unsharded tensor `name`, on every rank of `shard_group` (one all-gather of this rank's pieces)."""
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
        sources = self.sources()
        for name, source in sources.items():
            key = prefix + name
            if key not in state_dict:
                missing_keys.append(key)
                continue
            tensor = state_dict[key]
            if tuple(tensor.shape) == source.shape:
                self.load_source(name, tensor)
            elif tuple(tensor.shape) == source.local_shape:
                self._load_local(source, tensor)
            else:
                error_msgs.append(
                    f"`{key}` must have shape {source.shape} (whole) or {source.local_shape} (this rank's slice), "
                    f"got {tuple(tensor.shape)}"
                )
        if strict:
            own = {prefix + name for name in sources}
            children = tuple(f"{prefix}{child}." for child in self._modules)
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in own and not key.startswith(children)
            ]

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


def iter_sources(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, ShardedModule, str, Source]]:
    """Every unsharded tensor that `root` and its children store.

    Yields:
        The unsharded tensor's full name, the module, the name within the module, and its `Source`.
    """
    if isinstance(root, ShardedModule):
        for name, source in root.sources().items():
            yield prefix + name, root, name, source
    unnamed = getattr(root, "unnamed", ())
    for name, child in root.named_children():
        yield from iter_sources(child, prefix if name in unnamed else f"{prefix}{name}.")


def gather_state_dict(root: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict of `root`, on every rank.

    Comm: one all-gather per sharded tensor, over the layer's own group, in module order; call it on every rank.
    """
    return {full: module.gather_source(name) for full, module, name, _ in iter_sources(root)}


def sync_gradients(root: nn.Module, groups: Groups) -> None:
    """Sum the gradients that are partial after `backward`; call it on every rank before the optimizer steps.

    Sequence ranks see other tokens, so the gradients of weights replicated over `sp` are partial over it, as in data
    parallel training; those of q/k norms and of replicated KV heads also over `tp`. Afterwards each parameter's
    gradient is its slice of the unsharded one.
    """
    for module in root.modules():
        if isinstance(module, ShardedModule):
            module.sync_gradients(groups)


def name_modules(root: nn.Module) -> None:
    """Set the `label` of every layer below `root` to its dotted path, as `comm.record()` shows it."""
    for name, module in root.named_modules():
        if hasattr(type(module), "label"):
            module.label = name


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())

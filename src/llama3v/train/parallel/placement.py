"""Where the weights of a run lie, and how its ranks come to the same gradients.

    Alone        one process: the model as it is
    Replicated   every rank has the whole model; DDP adds the gradients up while the backward pass runs
    Sharded      every rank has a part of each tensor; FSDP2 collects a block's weights when it computes

The loss is divided by the supervised tokens of the step on *all* ranks before it is differentiated. So gradients are
summed over the ranks; the averages that DDP and FSDP2 take by default would be wrong here.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama3v.errors import ConfigError
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.parallel.ranks import Ranks
from llama3v.train.step import PassLoss, llm_layers, trained_visual

Kind = Literal["auto", "ddp", "fsdp"]


class Placement:
    """One process (*alone*), and what the other two ways share.

    Args:
        model: what trains in it is chosen already.
        device: where it computes.

    Attributes:
        forward: as `PassLoss.forward`.
        sharded: whether no rank has all that trains.
    """

    sharded = False

    def __init__(
        self,
        model: Llama3VForConditionalGeneration,
        device: torch.device | None = None,
        *,
        bf16: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.ranks = model, ranks or Ranks()
        self.device = device or next(model.parameters()).device
        self.forward: Any = self._place(PassLoss(model, bf16=bf16))

    def _place(self, passes: PassLoss) -> nn.Module:
        nn.Module.to(passes, self.device)
        return passes

    def before_pass(self, last: bool) -> None:
        """Before a pass's forward. last: of its step."""
        return

    def after_passes(self, tiles: int) -> None:
        """After a step's last backward; `tiles` went through this rank."""
        if not self.ranks.alone and not self.ranks.any(tiles > 0):
            for parameter in trained_visual(self.model):  # as one process does: without an image they do not train
                parameter.grad = None

    def clip(self, parameters: Sequence[nn.Parameter], clip_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most `clip_norm`; returns the norm before, over all ranks."""
        return nn.utils.clip_grad_norm_(parameters, clip_norm)

    def make_whole(self) -> None:
        """After training: give rank 0 the whole model, in its memory, where it can be written."""
        return


class Replicated(Placement):
    """DDP. The frozen parts are read by every rank from the same files and not exchanged."""

    def _place(self, passes: PassLoss) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        nn.Module.to(passes, self.device)
        passes.touches_all = True
        on_gpu = self.device.type == "cuda"
        # buffers are constants here (rotary frequencies), and frozen parameters do not change either
        keep_out = [name for name, _ in passes.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(passes, keep_out)
        wrapped = DistributedDataParallel(
            passes,
            device_ids=[self.device.index] if on_gpu else None,
            init_sync=False,  # the ranks compared digests of their weights
            gradient_as_bucket_view=True,
        )
        wrapped.register_comm_hook(None, _sum)
        return wrapped

    def before_pass(self, last: bool) -> None:
        self.forward.require_backward_grad_sync = last  # what DDP's no_sync() sets


class Sharded(Placement):
    """FSDP2. The trunk of the tower stays out of it: it does not train, and modes that run it do so in another thread."""

    sharded = True

    def _place(self, passes: PassLoss) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        passes.touches_all = True
        trunk = {p for p in self.model.vision.trunk_parameters().values() if isinstance(p, nn.Parameter)}
        for parameter in trunk:
            parameter.data = parameter.data.to(self.device)
        policy = MixedPrecisionPolicy()
        if passes.bf16:  # collect weights in bf16; add gradients up in fp32
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh(self.device.type, (self.ranks.count,))
        for layer in llm_layers(self.model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(passes, mesh=mesh, mp_policy=policy, ignored_params=trunk)
        for module in passes.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        return passes

    def clip(self, parameters: Sequence[nn.Parameter], clip_norm: float) -> Tensor:
        from torch.distributed.tensor import DTensor

        norm = super().clip(parameters, clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def make_whole(self) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a validation collected
        self.forward.reshard()
        known: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not isinstance(parameter, DTensor):
                    continue
                if parameter not in known:
                    full = parameter.full_tensor()  # on every rank, one tensor at a time
                    kept = full.cpu() if self.ranks.is_main else full.new_empty(0, device="cpu")
                    known[parameter] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
                module._parameters[name] = known[parameter]


def place(
    kind: Kind, model: Llama3VForConditionalGeneration, device: torch.device, *, bf16: bool, ranks: Ranks
) -> Placement:
    """Put the model where it computes.

    Args:
        kind: auto shards where weights of the LLM itself train, and replicates otherwise.

    The parameters may be other objects afterwards: make the optimizer with `parameters_of`.
    """
    if ranks.alone:
        return Placement(model, device, bf16=bf16)
    if kind == "auto":
        kind = "fsdp" if _llm_trains(model) else "ddp"
    how = Sharded if kind == "fsdp" else Replicated
    return how(model, device, bf16=bf16, ranks=ranks)


def parameters_of(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of an optimizer (stages.apply) with the model's parameters as they are now, by their names."""
    now = dict(model.named_parameters())
    return [{**group, "params": [now[name] for name in group["names"]]} for group in groups]


def share_of_rows(rows_per_step: int, ranks: Ranks) -> int:
    """Rows of a step that each rank takes. ConfigError where they cannot be shared out evenly."""
    if rows_per_step % ranks.count:
        raise ConfigError(
            f"--rows-per-step {rows_per_step} cannot be shared out evenly among {ranks.count} processes; start as many "
            "as divide it"
        )
    return rows_per_step // ranks.count


def _llm_trains(model: Llama3VForConditionalGeneration) -> bool:
    return any(p.requires_grad and "lora_" not in name for name, p in model.llm.named_parameters())


def _sum(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's reduction of a bucket of gradients, without its division by the number of ranks."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda reduced: reduced.value()[0])

"""Weights sharded over processes (FSDP2), for models that do not fit on one device: --shard.

Each layer is gathered only while it runs, so all processes must run the model together. One that
has no rows left, when others do, runs it on a row that counts for nothing.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import distribute_tensor


def shard_model(model, device):
    """Shard the weights of a causal model or classifier, in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    size = lambda block: sum(parameter.numel() for parameter in block.parameters())
    for layer in max(blocks, key=size, default=[]):
        fully_shard(layer, mesh=mesh)
    # A classifier's body and head are called separately.
    for part in (model.base_model, model.score) if hasattr(model, "score") else (model,):
        fully_shard(part, mesh=mesh)
    called = model.base_model if hasattr(model, "score") else model
    called.forward = without_rows(called.forward)
    model.is_sharded = True


def without_rows(forward):
    """A model's forward that also takes no rows at all: it runs one, and leaves it out."""
    def run(input_ids, attention_mask, position_ids, **kwargs):
        rows = len(input_ids)
        if not rows:
            input_ids = position_ids = input_ids.new_zeros(1, input_ids.shape[1])
            attention_mask = attention_mask.new_ones(1, attention_mask.shape[1])
        output = forward(input_ids=input_ids, attention_mask=attention_mask,
                         position_ids=position_ids, **kwargs)
        for name in {"logits", "last_hidden_state"} & output.keys():
            output[name] = output[name][:rows]
        return output

    return run


def reshard(model):
    """Free gathered weights: a forward pass without gradients leaves the root gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def part_of(tensor, like):
    """This process's part of a whole tensor, sharded like the other one."""
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

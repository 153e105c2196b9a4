"""What people do with nn.Conv2d and nn.BatchNorm2d, done with the layers: the same results as those of the equation."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from den_kernels import DynamicBatchNorm2d, DynamicConv2d, RoutingPlan
from den_kernels.testing import channel_mask
from tests.call_kinds import LEVELS, SAME, images

GROUPS = (4, 4, 8)
ROUTED = torch.tensor([1, 0, 3, 2])


def used(levels: torch.Tensor) -> torch.Tensor:
    return channel_mask(levels, GROUPS)[:, :, None, None]


class Masked(nn.Conv2d):
    """The equation of DynamicConv2d, with the state of nn.Conv2d."""

    def forward(self, x, levels):
        return torch.where(used(levels), super().forward(x), 0)


class Normed(nn.BatchNorm2d):
    """That of DynamicBatchNorm2d in eval mode."""

    def forward(self, x, levels, relu=False):
        y = super().forward(x)
        return torch.where(used(levels), y.relu() if relu else y, 0)


class Net(nn.Module):
    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        if dynamic:
            self.conv = DynamicConv2d(16, 16, **SAME, out_groups=GROUPS)
            self.norm = DynamicBatchNorm2d(16, groups=GROUPS).eval()
        else:
            self.conv, self.norm = Masked(16, 16, **SAME), Normed(16).eval()
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, x, levels):
        return self.norm(self.conv(x, levels), levels, relu=True)


def both(change=lambda net: net):
    return change(Net(True)), change(Net(False))


def assert_alike(ours, theirs, x=None):
    """Outputs with and without gradients, and gradients."""
    x = images(3) if x is None else x
    with torch.no_grad():
        torch.testing.assert_close(ours(x, ROUTED), theirs(x, ROUTED), rtol=1e-4, atol=1e-4)
    for model in (ours, theirs):
        model.zero_grad()
        model(x, ROUTED).square().sum().backward()
    for (name, got), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(wanted.grad.abs().max())
        torch.testing.assert_close(
            got.grad, wanted.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert got.grad.stride() == wanted.grad.stride()


def step(model, optimizer, steps=3):
    def closure():
        optimizer.zero_grad()
        loss = (model(images(1), ROUTED) - images(2)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model


CHANGES = {
    "l1 pruned": lambda net: (prune.l1_unstructured(net.conv, "weight", 0.5), net)[1],
    "pruned for good": lambda net: (
        prune.l1_unstructured(net.conv, "weight", 0.5), prune.remove(net.conv, "weight"), net
    )[2],
    "channels pruned": lambda net: (prune.ln_structured(net.conv, "weight", 0.5, n=2, dim=1), net)[1],
    "globally pruned": lambda net: (
        prune.global_unstructured([(net.conv, "weight"), (net.norm, "weight")], prune.L1Unstructured, amount=0.3), net
    )[1],
    "weight norm": lambda net: (weight_norm(net.conv), net)[1],
    "spectral norm": lambda net: (spectral_norm(net.conv).eval(), net)[1],
    "orthogonal": lambda net: (orthogonal(net.conv), net)[1],
    "vector": lambda net: (vector_to_parameters(2 * parameters_to_vector(net.parameters()), net.parameters()), net)[1],
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)) if isinstance(net.conv, DynamicConv2d) else net,
    "assigned": lambda net: (
        net.load_state_dict({k: (1.5 * v).clone() for k, v in net.state_dict().items()}, assign=True), net
    )[1],
    "averaged": lambda net: average(net),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
    "lbfgs": lambda net: step(net, torch.optim.LBFGS(net.parameters(), max_iter=3)),
    "sgd": lambda net: step(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)),
    "adamw foreach": lambda net: step(net, torch.optim.AdamW(net.parameters(), 0.01, foreach=True)),
    "adamw fused": lambda net: step(net, torch.optim.AdamW(net.parameters(), 0.01, fused=True)),
}  # fmt: skip


def average(net):
    averaged = AveragedModel(net)
    step(net, torch.optim.SGD(net.parameters(), 0.1), 1)
    averaged.update_parameters(net)
    averaged.update_parameters(net)
    return averaged.module


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_changed_alike(name):
    assert_alike(*both(CHANGES[name]))


def test_from_meta_to_empty():
    with torch.device("meta"):
        net = Net(True)
    state = Net(False).state_dict()
    net.to_empty(device="cpu").load_state_dict(state)
    assert_alike(net, Net(False))


def test_outputs_can_be_viewed():
    conv = DynamicConv2d(16, 16, **SAME, out_groups=GROUPS)
    assert conv(images()).view(4, -1).shape == (4, 16 * 36)
    assert conv(images(), ROUTED).view(4, -1).shape == (4, 16 * 36)


CALLS = {
    "checkpoint": lambda net, x: checkpoint(net, x, ROUTED, use_reentrant=False),
    "reentrant checkpoint": lambda net, x: checkpoint(net, x.requires_grad_(), ROUTED, use_reentrant=True),
    "saved on the CPU": lambda net, x: inside(torch.autograd.graph.save_on_cpu(), net, x),
    "packed": lambda net, x: inside(
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy), net, x
    ),
    "anomaly mode": lambda net, x: inside(torch.autograd.detect_anomaly(check_nan=True), net, x),
    "data parallel": lambda net, x: nn.DataParallel(net)(x, ROUTED),
    "functional call": lambda net, x: torch.func.functional_call(net, dict(net.named_parameters()), (x, ROUTED)),
}  # fmt: skip


def inside(context, net, x):
    with context:
        return net(x, ROUTED)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CALLS)
def test_called_alike(name):
    ours, theirs = both()
    for model in (ours, theirs):
        CALLS[name](model, images(3)).square().sum().backward()
    for got, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-4 * float(wanted.grad.abs().max()))


def test_a_route_in_a_checkpoint():
    net, x = Net(True), images(3)
    route = RoutingPlan.from_levels(ROUTED[:, None], 3)[0]
    for reentrant in (True, False):
        net.zero_grad()
        checkpoint(net, x.requires_grad_(), route, use_reentrant=reentrant).square().sum().backward()
        found = net.conv.weight.grad.clone()
        net.zero_grad()
        net(x, ROUTED).square().sum().backward()
        torch.testing.assert_close(found, net.conv.weight.grad)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(net):
    fully_shard(net.conv)
    return fully_shard(net)


@pytest.mark.parametrize("wrap", [
    sharded,
    nn.parallel.DistributedDataParallel,
    lambda net: nn.parallel.DistributedDataParallel(net, static_graph=True),
], ids=["fsdp2", "ddp", "static ddp"])  # fmt: skip
@pytest.mark.usefixtures("one_process")
def test_distributed_alike(wrap):
    ours, theirs = both()
    wrapped = wrap(ours)
    for optimizer_step in range(2):
        results = []
        for model in (wrapped, theirs):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            y = model(images(optimizer_step), ROUTED)
            y.square().sum().backward()
            optimizer.step()
            results.append(y)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in wrapped.parameters()]
    for got, wanted in zip(full, theirs.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("one_process")
def test_converted_to_sync_batch_norm_it_stays_and_is_synchronised():
    net = nn.ModuleDict({"ours": DynamicBatchNorm2d(16, groups=GROUPS), "plain": nn.BatchNorm2d(16)})
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert converted["ours"] is net["ours"]
    assert type(converted["plain"]) is nn.SyncBatchNorm
    assert converted["ours"].process_group == "world"
    same = DynamicBatchNorm2d(16, groups=GROUPS)
    assert torch.equal(converted["ours"](images(), ROUTED, relu=True), same(images(), ROUTED, relu=True))
    assert copy.deepcopy(converted)["ours"].process_group == "world"
    assert nn.SyncBatchNorm.convert_sync_batchnorm(same, dist.group.WORLD).process_group is dist.group.WORLD


def test_without_processes_a_converted_norm_is_its_own():
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(DynamicBatchNorm2d(16, groups=GROUPS))
    assert torch.equal(norm(images(), ROUTED), DynamicBatchNorm2d(16, groups=GROUPS)(images(), ROUTED))


def test_the_levels_of_a_call_are_not_kept():
    """Levels changed in place after the forward pass: the gradient is that of the forward pass."""
    net, levels, x = Net(True), LEVELS.clamp(max=3), images().requires_grad_()
    y = net(x, levels).square().sum()
    (wanted,) = torch.autograd.grad(y, x, retain_graph=True)
    levels.zero_()
    assert torch.equal(torch.autograd.grad(y, x)[0], wanted)

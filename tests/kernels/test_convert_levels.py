"""Levels reach the layers of a converted model: threads, nested contexts, copies, compilers, checkpoints, processes."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from den_kernels import DynamicBatchNorm2d, ElasticModel, convert, levels
from tests.foreign_models import foreign, images, random_levels
from tests.stand_ins import Network, PlainBasicBlock

NAME = "torchvision_basic"
GROUPS = 4


def converted(name: str = NAME) -> nn.Module:
    model = foreign(name)
    convert(model, GROUPS, example=images(name, 1))
    return model


def chosen(seed: int = 0, batch: int = 6) -> Tensor:
    return random_levels(batch, (0, 0, 0), GROUPS, seed)


def at(model: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    with torch.no_grad(), levels(model, chosen):
        return model(x)


def test_contexts_nest_and_end():
    model, x = converted(), images(NAME)
    whole, low, high = model(x), at(model, x, chosen(1)), at(model, x, chosen(2))
    assert not torch.equal(low, high)
    with torch.no_grad(), levels(model, chosen(1)):
        assert torch.equal(at(model, x, chosen(2)), high)
        assert torch.equal(model(x), low)
        with pytest.raises(RuntimeError, match="inner"), levels(model, chosen(2)):
            raise RuntimeError("inner")
        assert torch.equal(model(x), low)
    assert torch.equal(model(x), whole)


def test_threads_have_levels_of_their_own():
    model, x = converted(), images(NAME)
    wanted = [at(model, x, chosen(seed)) for seed in range(4)]
    inside, results = threading.Barrier(4), [[] for _ in range(4)]

    def use(seed: int) -> None:
        with torch.no_grad(), levels(model, chosen(seed)):
            inside.wait()
            for _ in range(5):
                results[seed].append(model(x))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(made) == 5 and all(torch.equal(y, w) for y in made) for made, w in zip(results, wanted, strict=True))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_converted_and_has_levels_of_its_own(way):
    model, x = converted(), images(NAME)
    other = COPIES[way](model)
    whole, wanted = model(x), at(model, x, chosen(1))
    with torch.no_grad(), levels(other, chosen(1)):
        assert torch.equal(other(x), wanted)
        assert torch.equal(model(x), whole)


def test_masks_take_any_groups():
    model, x = converted(), images(NAME)
    prefix = chosen()[:, :, None] > torch.arange(GROUPS)
    torch.testing.assert_close(at(model, x, prefix), at(model, x, chosen()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(at(model, x, prefix.flip(2)), at(model, x, chosen()))


class Selector(nn.Module):
    """[B, N] of what an image looks like."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3)) * 100).long().remainder(GROUPS + 1)


def test_an_elastic_model_takes_the_levels_of_its_selector():
    model, selector, x = converted(), Selector(), images(NAME)
    elastic = ElasticModel(model, selector)
    assert selector(x).unique().numel() == GROUPS + 1
    with torch.no_grad():
        assert torch.equal(elastic(x), at(model, x, selector(x)))
    assert list(elastic.state_dict()) == [f"model.{key}" for key in model.state_dict()]


class Nothing(nn.Module):
    """Level 0 for every block."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3, dtype=torch.long)


def test_an_elastic_model_raises_levels_of_blocks_without_a_shortcut():
    name = "torchvision_mobilenetv2"
    model, x = converted(name), images(name)
    lowest = torch.tensor([[0, 1, 0]]).expand(len(x), 3)
    with torch.no_grad():
        assert torch.equal(ElasticModel(model, Nothing())(x), at(model, x, lowest))


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_compiled_model_takes_other_levels_without_compiling_again(gradients):
    model, x = converted(), images(NAME)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        own = chosen(seed) if seed else torch.full((6, 3), GROUPS)
        results = []
        for each in (model, compiled):
            with torch.set_grad_enabled(gradients), levels(each, own):
                y = each(x)
            results.append([y, *(torch.autograd.grad(y.square().sum(), model.parameters()) if gradients else [])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))
    assert counter.frame_count == 1


def test_an_elastic_model_compiles_as_one_graph():
    elastic, counter = ElasticModel(converted(), Selector()), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(elastic, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in range(3):
            x = images(NAME, seed=seed)
            torch.testing.assert_close(compiled(x), elastic(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert elastic.carrier.selections is None


class Checkpointed(Network):
    """The blocks under one checkpoint, as timm does with `set_grad_checkpointing`."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.layers, x, use_reentrant=self.reentrant) if self.training else self.layers(x)
        return self.fc(x.mean((2, 3)))


def gradients_of(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], call=lambda model, x: model(x)
) -> list[Tensor]:
    """Two forward passes at levels of their own, then one backward pass, outside of any context."""
    model.zero_grad()
    total = torch.zeros(())
    for x, own in batches:
        with levels(model, own):
            total = total + call(model, x).square().sum()
    total.backward()
    return [parameter.grad for parameter in model.parameters()]


def without_statistics(model: nn.Module) -> nn.Module:
    """In training, with norms that evaluate: a checkpoint that runs them twice counts a batch twice."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def checkpointed(reentrant: bool) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = Checkpointed(PlainBasicBlock).double()
    model.reentrant = reentrant
    batches = [(images(NAME, seed=seed).double(), chosen(seed)) for seed in (1, 2)]
    convert(model, GROUPS, example=batches[0][0][:1])
    return without_statistics(model), batches


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_a_checkpoint_replays_the_levels_of_its_forward_pass(reentrant):
    model, batches = checkpointed(reentrant)
    plain = copy.deepcopy(model)
    plain.__class__ = Network
    for a, b in zip(gradients_of(model, batches), gradients_of(plain, batches), strict=True):
        torch.testing.assert_close(a, b)
    assert model.layers[0].conv1.carrier.shared.replays == {}


def test_a_checkpoint_around_the_model_replays_its_levels():
    model, batches = checkpointed(False)
    plain = copy.deepcopy(model)
    plain.__class__ = model.__class__ = Network

    def around(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    for a, b in zip(gradients_of(model, batches, around), gradients_of(plain, batches), strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_that_cannot_know_its_levels_says_so():
    model, batches = checkpointed(False)
    x, own = batches[0]
    with levels(model, own):
        y = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="levels: a checkpoint must lie inside the model, or be called with"):
        y.sum().backward()


def share_statistics(model: nn.Module) -> nn.Module:
    """In training, elastic norms over all processes; torch's own, which can share theirs on a GPU only, evaluate."""
    for module in model.train().modules():
        if isinstance(module, DynamicBatchNorm2d):
            assert nn.SyncBatchNorm.convert_sync_batchnorm(module) is module
        elif isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def trained(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients and statistics after two steps, because DDP's reducer learns the order of gradients in the first."""
    for _ in range(2):
        model.zero_grad()
        with levels(model, batch["levels"]):
            y = model(batch["x"])
        y.backward(batch["dy"])
    inner = getattr(model, "module", model)
    return {name: p.grad for name, p in inner.named_parameters()} | dict(inner.named_buffers())


def work(rank: int, size: int, folder: Path) -> None:
    """One process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    model = share_statistics(torch.load(folder / "model.pt", weights_only=False))
    torch.save(
        trained(DistributedDataParallel(model), torch.load(folder / f"batch{rank}.pt")), folder / f"made{rank}.pt"
    )
    dist.barrier()
    os._exit(0)  # no interpreter shutdown: threads of gloo that still wait for the GIL then would abort the process


def start(rank: int, size: int, folder: Path) -> subprocess.Popen:
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).resolve().parents[2])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(rank), str(size), str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_compute_what_one_does_on_the_joined_batch(tmp_path):
    """With norms that share their statistics: gradients of the sum, and running statistics."""
    batch = {"x": images(NAME, 8), "dy": torch.randn(8, 10), "levels": chosen(3, 8)}
    model = converted()
    torch.save(model, tmp_path / "model.pt")
    for rank, part in enumerate((slice(0, 3), slice(3, 8))):
        torch.save({name: tensor[part].clone() for name, tensor in batch.items()}, tmp_path / f"batch{rank}.pt")
    workers = [start(rank, 2, tmp_path) for rank in range(2)]
    alone = trained(share_statistics(model), batch)
    for rank, worker in enumerate(workers):
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        made = torch.load(tmp_path / f"made{rank}.pt")
        for name, wanted in alone.items():
            got = made[name] if _is_buffer(name) else 2 * made[name]  # DDP averages gradients
            close = {"rtol": 1e-3, "atol": 1e-4 * float(wanted.abs().max() + 1)}
            torch.testing.assert_close(got, wanted, **close, msg=lambda text, name=name: f"{name}: {text}")


def _is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


BAD = {
    "columns": (lambda: torch.zeros(6, 2, dtype=torch.long), ValueError, r"levels must be \[B, 3\].*got \[6, 2\]"),
    "one axis": (lambda: torch.zeros(6, dtype=torch.long), ValueError, r"levels must be \[B, 3\].*got \[6\]"),
    "a list": (lambda: [[0, 1, 2]], ValueError, "levels must be .* got list"),
    "too high": (lambda: torch.full((6, 3), 5), ValueError, "must be in 0..4"),
    "masks": (lambda: torch.ones(6, 3, 5).bool(), ValueError, r"masks must be \[B, 3, 4\], got \[6, 3, 5\]"),
    "floats": (lambda: torch.zeros(6, 3), TypeError, "levels must be an integer tensor, got torch.float32"),
}


@pytest.mark.parametrize("what", BAD)
def test_levels_are_checked(what):
    make, error, message = BAD[what]
    with pytest.raises(error, match=message):
        levels(converted(), make())


def test_levels_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="instances must be 6, got 4"):
        at(converted(), images(NAME), chosen(0, 4))


def test_levels_need_a_converted_model():
    with pytest.raises(ValueError, match=r"levels: model must be one that den_kernels\.convert has changed, got none"):
        levels(foreign(NAME), chosen())
    with pytest.raises(ValueError, match="got 2 converted models in one"):
        levels(nn.Sequential(converted(), converted()), chosen())


def test_a_block_without_a_shortcut_has_no_level_0():
    model = converted("torchvision_mobilenetv2")
    with pytest.raises(ValueError, match=r"levels of block 1 \(layers.1\) must be at least 1, as it has no shortcut"):
        levels(model, torch.zeros(6, 3, dtype=torch.long))


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

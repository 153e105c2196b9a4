"""den dag predict: a trained network on pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from den.dag.config import DagPredict
from den.data.inputs import as_inputs, picture_files
from den.nn.task_batch import find_task
from den.nn.tasks import Task
from den.runs.dag import OpenedRun, import_modules, open_run
from den.support.device import choose_device
from den.support.files import check_folder
from den.support.progress import progress

BATCH = 32


def main(command: DagPredict) -> None:
    """Print a line for each picture and task: the class and its probability, or where the map lies.

    Raises ValueError, before anything is computed, for a run, tasks, pictures or a folder that do not fit.
    """
    device = choose_device(command.device)
    import_modules(command.modules)
    run = open_run(command.run)
    tasks = chosen_tasks(run, command.task)
    files = picture_files(command.pictures)
    if any(task.dense for task in tasks):
        if command.out is None:
            dense = ", ".join(task.name for task in tasks if task.dense)
            raise ValueError(f"dag predict: out must be a folder for the maps of {dense}, got none")
        check_folder(command.out, "dag predict: out")
    run.model.to(device)
    parts = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    for part in progress(parts, "batches") if len(parts) > 1 else parts:
        for line in predicted(run, tasks, part, device, command.out):
            print(line, flush=True)


def chosen_tasks(run: OpenedRun, names: Sequence[str]) -> list[Task]:
    """The tasks of a run by their names, all without any; ValueError for those that no picture can be given."""
    tasks = [run.model.tasks[find_task(name, run.model.tasks)] for name in names] or list(run.model.tasks)
    if unknown := [task.name for task in tasks if task.name not in run.inputs]:
        raise ValueError(
            f"dag predict: {run.path} must say how pictures become images of {unknown[0]}, got a run of data loaders or"
            " of an earlier version: call its network (den.recipes.dag.recipe.load_network) on images of your own"
        )
    return tasks


@torch.inference_mode()
def predicted(
    run: OpenedRun, tasks: Sequence[Task], files: Sequence[Path], device: torch.device, out: Path | None
) -> Iterator[str]:
    """Lines of a batch of pictures; all tasks run together."""
    images = [as_inputs(files, task, run.inputs[task.name]).to(device) for task in tasks]
    outputs = run.model(images, [task.name for task in tasks])
    for i, path in enumerate(files):
        for task, values in zip(tasks, outputs, strict=True):
            if task.kind == "classification":
                share, label = values[i].softmax(0).max(0)
                names = run.inputs[task.name].class_names
                shown = names[int(label)] if names else str(int(label))
                yield f"{path}: {task.name} {shown} ({share:.0%})"
            elif not task.dense:
                yield f"{path}: {task.name} {' '.join(f'{value:.6g}' for value in values[i].flatten().tolist())}"
            elif out is not None:
                place = out / f"{path.stem}-{task.name}.npy"
                place.parent.mkdir(parents=True, exist_ok=True)
                np.save(place, as_map(task, values[i]))
                yield f"{path}: {task.name} in {place}"


def as_map(task: Task, values: Tensor) -> np.ndarray:
    """Outputs [values, H, W] of a picture as what they stand for.

    Labels uint8 [H, W] (int16 beyond 255 classes), unit normals float32 [H, W, 3], probabilities of edges and saliency
    float32 [H, W]; of other kinds the values, float32 [H, W] or [H, W, values].
    """
    if task.kind == "segmentation":
        return values.argmax(0).cpu().numpy().astype(np.uint8 if task.classes < 256 else np.int16)
    if task.kind in ("edges", "saliency"):
        values = values.sigmoid()
    elif task.kind == "normals":
        values = torch.nn.functional.normalize(values, dim=0)
    array = values.float().cpu().numpy()
    return array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)

"""Small files in the layouts of NYU-v2, Cityscapes and PASCAL-Context."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def write_npy_scenes(
    root: Path, counts: dict[str, int], size=(24, 32), classes=40, label="label", normals=True
) -> None:
    """Scenes of two halves, left dark and near, right bright and far; `counts`: of the folders train and val."""
    generator = np.random.default_rng(0)
    right = np.broadcast_to(np.arange(size[1]) >= size[1] // 2, size)
    for folder, count in counts.items():
        for i in range(count):
            labels = np.where(right, classes - 1, i % 2).astype(np.int64)
            labels[0, :3] = -1
            depth = np.where(right, 4.0, 1.0)
            depth[-1, :2] = 0
            normal = np.zeros((*size, 3), np.float32)
            normal[..., 0], normal[..., 2] = 0.6, 0.8
            normal[0, 0] = 0
            image = 0.25 + 0.5 * right[..., None] + 0.05 * generator.standard_normal((*size, 3))
            files = {"image": image.clip(0, 1), label: labels, "depth": depth[..., None], "normal": normal}
            for name, values in files.items():
                if normals or name != "normal":
                    (root / folder / name).mkdir(parents=True, exist_ok=True)
                    np.save(root / folder / name / f"{i}.npy", values)


def write_pascal(root: Path, names: dict[str, list[str]]) -> None:
    """A person's head and torso before a background, 20x30; a name beginning with "empty" has no parts."""
    for folder in ("ImageSets/Context", "JPEGImages", "semseg/VOC12", "human_parts", "sal_distill", "normals_distill",
                   "pascal-context/trainval"):  # fmt: skip
        (root / folder).mkdir(parents=True, exist_ok=True)
    person = np.zeros((20, 30), np.uint8)
    person[4:16, 10:20] = 1
    head = person.copy()
    head[8:] = 0
    for split, listed in names.items():
        (root / "ImageSets" / "Context" / f"{split}.txt").write_text("\n".join(listed) + "\n")
        for name in listed:
            Image.fromarray(np.stack([40 + 180 * person] * 3, -1)).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            labels = 15 * person
            labels[0, 0] = 255
            Image.fromarray(labels).save(root / "semseg" / "VOC12" / f"{name}.png")
            Image.fromarray(255 * person).save(root / "sal_distill" / f"{name}.png")
            upward = np.broadcast_to(np.array([127, 255, 127], np.uint8), (20, 30, 3))
            Image.fromarray(upward.copy()).save(root / "normals_distill" / f"{name}.png")
            savemat(root / "pascal-context" / "trainval" / f"{name}.mat", {"LabelMap": person.astype(np.int32)})
            parts = [{"part_name": "head", "mask": head}, {"part_name": "torso", "mask": person - head}]
            kept = [] if name.startswith("empty") else parts
            objects = [{"class": "person", "class_ind": 15, "mask": person, "parts": kept}]
            savemat(root / "human_parts" / f"{name}.mat", {"anno": {"imname": name, "objects": objects}})

"""Measure how long saving a checkpoint pauses training, by saving a model's complete training state repeatedly.

usage: python scripts/save_time.py [--model sasa_resnet50] [--repeats 15] [--folder FOLDER]   (on the disk to measure)
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sasa_train.config.compose import compose_config
from sasa_train.config.saved import to_yaml
from sasa_train.models import build_model
from sasa_train.runs.checkpoint import Checkpoints
from sasa_train.training.state import build_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sasa_resnet50")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    config = compose_config([f"model.name={arguments.model}", "data=imagenet", "trainer.ema_decay=0.999"])
    model = build_model(config.model, 1000, 224)
    state = build_state(config, model, torch.device("cpu"))
    for parameter in model.parameters():  # so that the optimizer has momentum buffers
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    content = state.state_dict() | {"config": to_yaml(config), "classes": [""] * 1000, "finished": False}
    content |= {"metrics": "", "fingerprint": {}, "provenance": {}, "best": {"top1": 0.0}}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    checkpoints, seconds = Checkpoints(folder, keep=3), dict[bool, list[float]]({False: [], True: []})
    for step in range(2 * arguments.repeats):
        is_best = step % 2 == 1
        start = time.perf_counter()
        checkpoints.save(content | {"step": step}, is_best)
        seconds[is_best].append(time.perf_counter() - start)
    size = (folder / "last.pt").stat().st_size / 1e6
    shutil.rmtree(folder)
    print(f"{arguments.model} with momentum and moving average, {size:.0f} MB, {arguments.repeats} saves of each kind")
    for is_best, taken in seconds.items():
        name, median = "last.pt and best.pt" if is_best else "last.pt", statistics.median(taken)
        print(f"{name:<20} median {median:.2f} s, from {min(taken):.2f} to {max(taken):.2f}")


if __name__ == "__main__":
    main()

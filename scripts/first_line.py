"""Measure how soon each command says its first line and refuses a wrong key, beyond the time of `import hydra`.

    python scripts/first_line.py [REPEATS]

Prints medians in seconds. Each command is also given a tiny run, made first, so that it gets as far as importing torch.
"""

import select
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {  # what makes the command work, and what it refuses
    "train": ("experiment=debug run_name=other", "trainer.epoch=3"),
    "evaluate": ("outputs/run", "outputs/run trainer.epoch=3"),
    "predict": ("outputs/run outputs/run/augmented.png", "outputs/run a.png trainer.epoch=3"),
    "visualize": ("outputs/run lr_schedule", "outputs/run trainer.epoch=3"),
    "export": ("outputs/run --formats safetensors", "outputs/run trainer.epoch=3"),
    "sweep": ("experiment=debug seed=0", "trainer.epoch=3"),
    "report": ("outputs/run", "outputs/run trainer.epoch=3"),
    "summary": ("model=sasa_resnet26", "trainer.epoch=3"),
    "benchmark": ("model conv_resnet26", "model conv_resnet26 --epoch=3"),
    "demo": ("outputs/run --port 0", "outputs/run trainer.epoch=3"),
    "data": ("verify outputs", "verify outputs trainer.epoch=3"),
}


def first_line(folder: str, arguments: list[str]) -> float:
    """Return the seconds until the program writes to stdout or stderr, or ends; then kill it."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    select.select([process.stdout], [], [], 60)
    seconds = time.perf_counter() - start
    process.kill()
    process.communicate()
    return seconds


def to_the_end(folder: str, arguments: list[str], code: int) -> float:
    """Return the seconds until the program ends, which must be with exit code `code`."""
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == code, f"{arguments}: exit {ended.returncode}\n{ended.stdout}{ended.stderr}"
    return time.perf_counter() - start


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        to_the_end(folder, ["-m", "sasa_train", "train", "experiment=debug", "run_name=run"], 0)
        print(f"{'command':<10} import hydra  first line beyond it  refusal beyond it")
        for name, (works, refused) in COMMANDS.items():
            command, seconds = ["-m", "sasa_train", name], list[tuple[float, float, float]]()
            for _ in range(repeats):  # in turn, so that other work on the machine affects all of them alike
                base = to_the_end(folder, ["-c", "import hydra"], 0)
                first = first_line(folder, [*command, *works.split()])
                end = to_the_end(folder, [*command, *refused.split()], 2)
                seconds.append((base, first - base, end - base))
            base, first, end = map(statistics.median, zip(*seconds, strict=True))
            print(f"{name:<10} {base:12.2f} {first:21.2f} {end:18.2f}", flush=True)


if __name__ == "__main__":
    main()

"""What the paper's Table 1 costs on GPUs: hours, GPU-hours, money, and what stops it from scaling. Markdown tables.

usage: python scripts/training_budget.py [--measured FILE.json] [--price 2.00] [--gpus 1 8 64] ...

docs/imagenet.md explains the formulas and shows what this prints. Images/s on a GPU are assumed until
`sasa-benchmark model ... --json FILE.json` has measured them; parameters and FLOPs are counted on the models.
"""

import argparse
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

NUM_TRAIN, NUM_VAL, IMAGE_SIZE = 1_281_167, 50_000, 224
# The paper's recipe, configs/experiment/recipe/imagenet_paper.yaml.
BATCH, EPOCHS, BN_MOMENTUM = 4096, 130, 1e-4
VAL_PASSES = 2  # an evaluation takes the averaged weights and the raw ones
TRAINING_PASSES = 3  # a training step costs three forward passes: the backward pass has two products for each one
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb
STATE_BYTES = 12  # a parameter in a checkpoint: weight, momentum and average in float32
SAVE_BYTES_PER_SEC = 217e6 / 0.49  # docs/reliability.md, sasa_resnet50
CPU_IMAGES_PER_SEC = {"conv_resnet50": 7.79, "hybrid_resnet50": 7.63, "sasa_resnet50": 7.57}  # docs/benchmarks.md
# Published training speeds, mixed precision: timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv.
RTX_3090 = (("resnet50", 224, 1218.01), ("halonet50ts", 256, 597.80), ("swin_tiny_patch4_window7_224", 224, 648.69),
            ("halonet_h1", 256, 176.70))  # fmt: skip
# NVIDIA's ResNet-50 v1.5 for PyTorch on a DGX A100 80GB, 256 images and 16 cores a GPU: precision, images/s on one GPU,
# times that on eight, hours of 90 epochs on one and on eight.
DGX_A100 = (("mixed precision", 2470.0, 6.72, "14", "3"), ("TF32", 938.0, 7.72, "36", "5"))
LINKS = ((1.25, "10 Gbit/s"), (3.125, "25 Gbit/s"), (12.5, "100 Gbit/s"), (25.0, "200 Gbit/s"),
         (100.0, "8 x 100 Gbit/s"))  # fmt: skip


@dataclass(frozen=True)
class Net:
    """A model and its speed on one GPU (or whatever was measured), images/s."""

    name: str
    params: int
    flops: int  # of a forward pass of one image
    training: float
    inference: float
    source: str  # measured or assumed


@dataclass(frozen=True)
class Cluster:
    """Bandwidths in bytes/s for each direction, times in seconds."""

    gpus_per_machine: int
    inside: float  # bandwidth of a GPU to the next one in its machine
    between: float  # of all network cards of a machine together
    latency: float  # of a hop
    overlap: float  # the part of the backward pass that hides communication
    step_floor: float  # a micro-batch takes at least this, however few its images
    max_micro_batch: int
    cores_per_gpu: float
    loader_per_core: float  # images/s

    @property
    def loader(self) -> float:
        """Images/s that the data workers of one GPU deliver."""
        return self.cores_per_gpu * self.loader_per_core


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    micro_batch: int
    num_micro_batches: int
    arithmetic: float  # what the images take at full speed
    compute: float  # the same, but at least the floor for each micro-batch
    all_reduce: float
    exposed: float  # communication that nothing hides
    data: float  # what the loader takes for these images, beside everything else

    @property
    def total(self) -> float:
        return max(self.compute + self.exposed, self.data)

    @property
    def limit(self) -> str:
        """What costs most beyond the arithmetic itself, where that is a twentieth of it."""
        busy = self.compute + self.exposed
        losses = {"data": self.data - busy, "launches": self.compute - self.arithmetic, "network": self.exposed}
        worst = max(losses, key=lambda name: losses[name])
        return worst if losses[worst] > 0.05 * self.arithmetic else "arithmetic"


def all_reduce_seconds(num_bytes: float, num_gpus: int, bandwidth: float, latency: float) -> float:
    """Ring all-reduce of DDP's buckets: each GPU sends 2 (n-1)/n of the bytes, in 2 (n-1) hops a bucket."""
    hops = 2 * (num_gpus - 1)
    return hops / num_gpus * num_bytes / bandwidth + num_buckets(num_bytes) * hops * latency


def num_buckets(num_bytes: float) -> int:
    return math.ceil(num_bytes / BUCKET_BYTES)


def split_batch(global_batch: int, num_gpus: int, max_micro_batch: int) -> tuple[int, int]:
    """Images of a micro-batch and micro-batches a step on each GPU, as few as fit.

    Raises:
        ValueError: the GPUs do not divide the batch.
    """
    if global_batch % num_gpus:
        raise ValueError(f"--global-batch {global_batch} must be divisible by the number of GPUs, {num_gpus}")
    images = global_batch // num_gpus
    count = next(k for k in range(math.ceil(images / max_micro_batch), images + 1) if images % k == 0)
    return images // count, count


def step_times(net: Net, cluster: Cluster, num_gpus: int, global_batch: int) -> Step:
    """A step of data parallelism; only the last micro-batch's backward pass can hide the all-reduce."""
    micro_batch, count = split_batch(global_batch, num_gpus, cluster.max_micro_batch)
    arithmetic = micro_batch / net.training
    compute = max(arithmetic, cluster.step_floor)
    is_one_machine = num_gpus <= cluster.gpus_per_machine
    bandwidth = cluster.inside if is_one_machine else min(cluster.inside, cluster.between)
    num_bytes = 4 * net.params
    all_reduce = all_reduce_seconds(num_bytes, num_gpus, bandwidth, cluster.latency)
    hidden = cluster.overlap * compute * (TRAINING_PASSES - 1) / TRAINING_PASSES
    last_bucket = all_reduce / num_buckets(num_bytes)  # its gradients are there when the backward pass is over
    exposed = max(all_reduce - hidden, last_bucket)
    return Step(micro_batch, count, count * arithmetic, count * compute, all_reduce, exposed,
                count * micro_batch / cluster.loader)  # fmt: skip


def run_seconds(net: Net, cluster: Cluster, num_gpus: int, global_batch: int, epochs: int) -> float:
    """A whole run: steps, an evaluation and a save an epoch."""
    steps = NUM_TRAIN // global_batch * step_times(net, cluster, num_gpus, global_batch).total
    evaluation = VAL_PASSES * NUM_VAL / num_gpus / min(net.inference, cluster.loader)
    return epochs * (steps + evaluation + STATE_BYTES * net.params / SAVE_BYTES_PER_SEC)


def efficiency(net: Net, cluster: Cluster, num_gpus: int, global_batch: int) -> float:
    """The part of `num_gpus` times one GPU's speed that is reached."""
    alone, together = (run_seconds(net, cluster, n, global_batch, 1) for n in (1, num_gpus))
    return alone / (num_gpus * together)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@functools.cache
def count(name: str, image_size: int) -> tuple[int, int]:
    """Parameters, and FLOPs of a forward pass of one image."""
    import timm

    import sasa_train.models  # noqa: F401  # registers the names
    from sasa_train.models.counting import count_flops, count_params, meta_model

    model = meta_model(lambda: timm.create_model(name))
    return count_params(model), count_flops(model, image_size)


Speeds = dict[str, tuple[float, float]]  # by model: training and inference, images/s


def build_nets(conv_images_per_sec: float, attention_factor: float, measured: Speeds) -> list[Net]:
    """Table 1's models. What was not measured goes with 1/FLOPs from `conv_resnet50`'s speed."""
    from sasa_train.paper import ROWS

    names = [row.model for row in ROWS if row.table == 1]
    if strange := measured.keys() - set(names):
        raise ValueError(f"--measured: {', '.join(sorted(strange))} must be of Table 1: {', '.join(names)}")
    conv_flops = count("conv_resnet50", IMAGE_SIZE)[1]
    conv_images_per_sec = measured.get("conv_resnet50", (conv_images_per_sec,))[0]
    nets = []
    for name in names:
        params, flops = count(name, IMAGE_SIZE)
        factor = 1.0 if name.startswith("conv") else attention_factor
        training = conv_images_per_sec * factor * conv_flops / flops
        speeds = measured.get(name, (training, TRAINING_PASSES * training))
        nets.append(Net(name, params, flops, *speeds, "measured" if name in measured else "assumed"))
    return nets


def read_measured(path: Path) -> tuple[str, Speeds]:
    """On what, and median images/s, from `sasa-benchmark model --json`."""
    try:
        found = json.loads(path.read_text())
        speeds = {}
        for row in found["rows"]:
            training, inference = (row[f"{what}_images_per_sec"]["median"] for what in ("training", "inference"))
            speeds[row["model"]] = (float(training), float(inference))
        return f"{found['header']['hardware']}: {found['header']['command']}", speeds
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {path} must be what sasa-benchmark model --json wrote: {error!r}") from error


def hours_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 10 else f"{hours:.2f}"


def speed_text(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def published_table() -> str:
    """How fast nets with attention are for their FLOPs, beside a convolutional one."""
    rates = [(name, size, speed, count(name, size)[1]) for name, size, speed in RTX_3090]
    sustained = [TRAINING_PASSES * flops * speed for *_, speed, flops in rates]
    rows = [[name, str(size), f"{flops / 1e9:.2f}", f"{speed:,.0f}", f"{rate / 1e12:.1f}", f"{rate / sustained[0]:.2f}"]
            for (name, size, speed, flops), rate in zip(rates, sustained, strict=True)]  # fmt: skip
    return table(["net", "pixels", "GFLOPs", "images/s, published", "TFLOP/s", "to resnet50"], rows)


def cost_table(nets: Sequence[Net], cluster: Cluster, gpus: list[int], batch: int, epochs: int, price: float) -> str:
    """Every model alone, and all of them."""
    header = ["model", "M parameters", "GFLOPs", "CPU-days, measured", "images/s a GPU"]
    for n in gpus:
        header += [f"{n} GPU{'s' if n > 1 else ''}: hours", "GPU-hours", f"cost at {price:.2f}"]
    hours = {net: [run_seconds(net, cluster, n, batch, epochs) / 3600 for n in gpus] for net in nets}
    rows = []
    for net in nets:
        speed = CPU_IMAGES_PER_SEC.get(net.name)
        days = f"{NUM_TRAIN // batch * batch * epochs / speed / 86400:,.0f}" if speed else "-"
        rows.append([net.name, f"{net.params / 1e6:.1f}", f"{net.flops / 1e9:.2f}", days,
                     f"{speed_text(net.training)} {net.source}", *_costs(hours[net], gpus, price)])  # fmt: skip
    together = [sum(hours[net][i] for net in nets) for i in range(len(gpus))]
    rows.append(["all", "", "", "", "", *_costs(together, gpus, price)])
    return table(header, rows)


def _costs(hours: Sequence[float], gpus: Sequence[int], price: float) -> list[str]:
    return [cell for n, h in zip(gpus, hours, strict=True)
            for cell in (hours_text(h), hours_text(n * h), f"{n * h * price:,.0f}")]  # fmt: skip


def scaling_table(net: Net, cluster: Cluster, gpus: Sequence[int], batch: int, epochs: int) -> str:
    """Where a step goes, and batch norm's momentum for as long a memory as the paper's."""
    header = ["GPUs", "micro-batch", "micro-batches a step", "bn_momentum", "compute, ms", "all-reduce, ms",
              "exposed, ms", "data, ms", "step, ms", "hours", "of n times one", "limit"]  # fmt: skip
    rows = []
    for n in gpus:
        step = step_times(net, cluster, n, batch)
        momentum = 1 - (1 - BN_MOMENTUM) ** (batch / BATCH / step.num_micro_batches)  # scripts/scale_averages.py
        times = [step.compute, step.all_reduce, step.exposed, step.data, step.total]
        hours = run_seconds(net, cluster, n, batch, epochs) / 3600
        rows.append([str(n), str(step.micro_batch), str(step.num_micro_batches), f"{momentum:.3g}",
                     *(f"{1e3 * t:,.1f}" for t in times), hours_text(hours),
                     f"{100 * efficiency(net, cluster, n, batch):.0f} %", step.limit])  # fmt: skip
    return table(header, rows)


def link_table(net: Net, cluster: Cluster, gpus: Sequence[int], batch: int) -> str:
    rows = []
    for bandwidth, name in LINKS:
        there = replace(cluster, between=1e9 * bandwidth)
        parts = [f"{100 * efficiency(net, there, n, batch):.0f} %" for n in gpus]
        times = [f"{1e3 * step_times(net, there, n, batch).all_reduce:.1f}" for n in gpus]
        rows.append([name, f"{bandwidth:g}", *times, *parts])
    header = ["network of a machine", "GB/s", *(f"all-reduce on {n}, ms" for n in gpus),
              *(f"{n} GPUs: of n times one" for n in gpus)]  # fmt: skip
    return table(header, rows)


def check_table(conv: Net, cluster: Cluster) -> str:
    """The formulas beside published measurements, on one machine."""
    rows = []
    there = replace(cluster, cores_per_gpu=16)
    for precision, speed, published, *published_hours in DGX_A100:
        net = replace(conv, training=speed, inference=TRAINING_PASSES * speed)
        alone, together = (step_times(net, there, n, 256 * n).total for n in (1, 8))
        rows.append([f"{precision}, 8 GPUs to 1", f"{published:.2f}", f"{8 * alone / together:.2f}"])
        for n, text in zip((1, 8), published_hours, strict=True):
            hours = run_seconds(net, there, n, 256 * n, 90) / 3600
            rows.append([f"{precision}, hours of 90 epochs on {n}", f"about {text}", f"{hours:.1f}"])
    return table(["ResNet-50 on a DGX A100", "published", "by these formulas"], rows)


def powers_that_divide(batch: int) -> list[int]:
    return [2**i for i in range(9) if batch % 2**i == 0]


def draw(net: Net, cluster: Cluster, batch: int, epochs: int, path: Path) -> None:
    """A PNG: hours over GPUs for some networks, and the parts of a step on the one of `cluster`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    from sasa_train.figures import DPI, STYLES, WIDTH

    gpus = powers_that_divide(batch)
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    hours = [run_seconds(net, cluster, n, batch, epochs) / 3600 for n in gpus]
    left.plot(gpus, [hours[0] / n for n in gpus], color="#888888", lw=1, label="n times one GPU's speed")
    for (color, _, marker, line), (bandwidth, name) in zip(STYLES[1:], LINKS[::2], strict=False):
        there = replace(cluster, between=1e9 * bandwidth)
        hours = [run_seconds(net, there, n, batch, epochs) / 3600 for n in gpus]
        left.plot(gpus, hours, color=color, marker=marker, ls=line, mec="black", mew=0.5, ms=4, label=name)
    left.axvline(cluster.gpus_per_machine, color="#888888", lw=1, ls=":", label="one machine")
    left.set(yscale="log", ylabel=f"hours for {epochs} epochs")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    steps = [step_times(net, cluster, n, batch) for n in gpus]
    parts = {"arithmetic": [s.arithmetic / s.total for s in steps],
             "launching kernels": [(s.compute - s.arithmetic) / s.total for s in steps],
             "waiting for the network": [s.exposed / s.total for s in steps],
             "waiting for data": [(s.total - s.compute - s.exposed) / s.total for s in steps]}  # fmt: skip
    bottom = [0.0] * len(gpus)
    for (color, hatch, *_), (name, shares) in zip(STYLES, parts.items(), strict=False):
        label = name if max(shares) > 1e-9 else None
        right.bar(range(len(gpus)), shares, 0.8, bottom, color=color, hatch=hatch, ec="black", lw=0.5, label=label)
        bottom = [b + share for b, share in zip(bottom, shares, strict=True)]
    right.set(ylabel="part of a step", xticks=range(len(gpus)), xticklabels=gpus, ylim=(0, 1))
    left.set(xscale="log", xticks=gpus, xticklabels=gpus)
    left.xaxis.set_minor_locator(NullLocator())
    for axis in (left, right):
        axis.set_xlabel(f"GPUs, {batch} images a step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.savefig(path, dpi=DPI, format="png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    speed = parser.add_argument_group("speed of a GPU")
    speed.add_argument("--measured", type=Path, metavar="FILE.json", help="of sasa-benchmark model --json")
    speed.add_argument(
        "--conv-images-per-sec",
        type=float,
        default=DGX_A100[0][1],
        metavar="RATE",
        help="training of conv_resnet50 where not measured; the others go with 1/FLOPs (%(default)s)",
    )
    speed.add_argument(
        "--attention-factor",
        type=float,
        default=0.63,
        metavar="F",
        help="FLOP/s of nets with attention, to convolutional ones (%(default)s, halonet50ts's)",
    )
    speed.add_argument(
        "--step-floor-ms",
        type=float,
        default=20.0,
        metavar="MS",
        help="least time of a micro-batch: launching its kernels (%(default)s)",
    )
    speed.add_argument("--max-micro-batch", type=int, default=256, metavar="IMAGES", help="what fits (%(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--global-batch", type=int, default=BATCH, metavar="IMAGES", help="(%(default)s)")
    run.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    run.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="(1 8 64)")
    run.add_argument("--price", type=float, default=2.0, help="of a GPU-hour, in any currency (%(default)s)")
    links = parser.add_argument_group("machines")
    links.add_argument("--gpus-per-machine", type=int, default=8, metavar="N", help="(%(default)s)")
    links.add_argument(
        "--inside-gb-per-sec",
        type=float,
        default=200.0,
        metavar="GB/S",
        help="between GPUs of a machine, nccl-tests' busbw (%(default)s)",
    )
    links.add_argument(
        "--between-gb-per-sec",
        type=float,
        default=12.5,
        metavar="GB/S",
        help="of all network cards of a machine together (%(default)s, 100 Gbit/s)",
    )
    links.add_argument("--latency-us", type=float, default=10.0, metavar="US", help="of a hop (%(default)s)")
    links.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        metavar="PART",
        help="of the backward pass that hides communication (%(default)s)",
    )
    links.add_argument("--cores-per-gpu", type=float, default=12, metavar="N", help="for data workers (%(default)s)")
    links.add_argument(
        "--loader-images-per-sec",
        type=float,
        default=335.0,
        metavar="RATE",
        help="of one core (%(default)s, docs/benchmarks.md)",
    )
    detail = parser.add_argument_group("detail")
    detail.add_argument("--model", default="conv_resnet50", help="of the tables of scaling and the plot (%(default)s)")
    detail.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    return parser


def build_cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(
        options.gpus_per_machine,
        1e9 * options.inside_gb_per_sec,
        1e9 * options.between_gb_per_sec,
        1e-6 * options.latency_us,
        options.overlap,
        1e-3 * options.step_floor_ms,
        options.max_micro_batch,
        options.cores_per_gpu,
        options.loader_images_per_sec,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check(options)
        print_budget(options)
    except ValueError as error:
        parser.error(str(error))


def check(options: argparse.Namespace) -> None:
    """Raises ValueError: an option's value cannot be."""
    may_be_zero = {"latency_us", "overlap", "price", "step_floor_ms"}
    for name, values in vars(options).items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int | float) and (value < 0 or (value == 0 and name not in may_be_zero)):
                raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    if options.global_batch > NUM_TRAIN:
        raise ValueError(f"--global-batch {options.global_batch} must be at most the {NUM_TRAIN} training images")
    if options.overlap > 1:
        raise ValueError(f"--overlap {options.overlap} must be a part of the backward pass, from 0 to 1")


def print_budget(options: argparse.Namespace) -> None:
    """Raises ValueError: an option's value does not fit."""
    epochs, batch, gpus = options.epochs, options.global_batch, options.gpus
    hardware, measured = read_measured(options.measured) if options.measured else ("", {})
    nets = {n.name: n for n in build_nets(options.conv_images_per_sec, options.attention_factor, measured)}
    if options.model not in nets:
        raise ValueError(f"--model {options.model} must be one of {', '.join(nets)}")
    cluster, net, many = build_cluster(options), nets[options.model], powers_that_divide(batch)
    tables = {
        "Published training speed, one RTX 3090": published_table(),
        f"Table 1, {epochs} epochs, batch {batch}": cost_table(
            list(nets.values()), cluster, gpus, batch, epochs, options.price
        ),
        f"{net.name}, {net.source}": scaling_table(net, cluster, many, batch, epochs),
    }
    if across := [n for n in many if n > cluster.gpus_per_machine][::2]:
        tables[f"{net.name} on other networks"] = link_table(net, cluster, across, batch)
    tables["Check"] = check_table(nets["conv_resnet50"], cluster)
    if hardware:
        print(f"measured on {hardware}\n")
    print("\n\n".join(f"{title}\n\n{text}" for title, text in tables.items()))
    if options.plot:
        draw(net, cluster, batch, epochs, options.plot)


if __name__ == "__main__":
    main()

"""The plain version of train + prune + fine-tune, to hold the toolkit's against.

What a tutorial does: PIL images through a DataLoader with two workers, fp32, torchvision's transforms, FastNAS with
a DataLoader's batches and a score over a DataLoader, fine-tuning without a teacher: 20 and 12 epochs of the first
12,000 images. Same budget as `toolkit finetune --fast --flops 60M`, whose 14 and 8 epochs draw 12,000 of all images
each. Run both, one after the other, with:

    python benchmarks/plain_pipeline.py IMAGEFOLDER [--skip-plain] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPOCHS, FINETUNE_EPOCHS, TRAIN_IMAGES, VAL_IMAGES, BATCH = 20, 12, 12_000, 2_000, 128
BUDGET, DIVISOR = 60e6, 16


def plain(folder: Path, seed: int) -> dict[str, float]:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from toolkit.compression import fastnas, flops, models
    from toolkit.workload import Model

    torch.manual_seed(seed)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    still = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    moving = transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), still])
    order = torch.randperm(len(ImageFolder(str(folder / "train")))).tolist()
    train_set = Subset(ImageFolder(str(folder / "train"), moving), order[:TRAIN_IMAGES])
    val_set = Subset(ImageFolder(str(folder / "train"), still), order[TRAIN_IMAGES : TRAIN_IMAGES + VAL_IMAGES])
    train = DataLoader(train_set, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    val = DataLoader(val_set, BATCH, num_workers=2, persistent_workers=True)
    test = DataLoader(ImageFolder(str(folder / "test"), still), BATCH, num_workers=2)

    @torch.no_grad()
    def accuracy(network: nn.Module, loader: DataLoader) -> float:
        network.eval()
        return sum((network(x).argmax(1) == y).sum().item() for x, y in loader) / len(loader.dataset)

    def fit(network: nn.Module, epochs: int, lr: float) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        total = epochs * len(train)
        warm = len(train)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / (total - warm))),
        )
        best, state = -1.0, network.state_dict()
        for epoch in range(epochs):
            network.train()
            for inputs, labels in train:
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(inputs), labels).backward()
                optimizer.step()
                schedule.step()
            score = accuracy(network, val)
            print(f"plain {epoch + 1}/{epochs} validation {score:.2%}", file=sys.stderr, flush=True)
            if score > best:
                best, state = score, {k: v.clone() for k, v in network.state_dict().items()}
        network.load_state_dict(state)

    import modelopt.torch.prune as mtp

    begin = time.monotonic()
    network = models.build(Model.parse("resnet20"), 10, seed)
    fit(network, EPOCHS, 0.1)
    trained = time.monotonic()
    baseline = accuracy(network, test)
    with flops.counting():
        network, _ = mtp.prune(
            network,
            fastnas._mode(DIVISOR),
            {"flops": BUDGET},
            torch.zeros(1, 3, 32, 32),
            {
                "data_loader": train,
                "collect_func": lambda batch: batch[0],
                "score_func": lambda candidate: accuracy(candidate, val),
            },
        )
    pruned = time.monotonic()
    fit(network, FINETUNE_EPOCHS, 0.05)
    end = time.monotonic()
    return {
        "train_s": trained - begin,
        "prune_s": pruned - trained,
        "finetune_s": end - pruned,
        "total_s": end - begin,
        "baseline": baseline,
        "final": accuracy(network, test),
        "flops": flops.flops(network, 32),
    }


def toolkit(folder: Path, seed: int) -> dict[str, float]:
    """Time `toolkit finetune` as a whole command, store and start included."""
    with tempfile.TemporaryDirectory() as place:
        profiles = Path(place) / "profiles"
        profiles.mkdir()
        (profiles / "bench.yaml").write_text(f"flops: 60M\nchannel_divisor: {DIVISOR}\n")
        command = [sys.executable, "-m", "toolkit", "finetune", "host-cpu", "--profile", "bench", "--fast"]
        command += ["--data", f"imagefolder:{folder.resolve()}", "--flops", "60M", "--seed", str(seed), "--json"]
        begin = time.monotonic()
        printed = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, text=True, check=True).stdout
        end = time.monotonic()
        document = json.loads(printed)
    seconds = {stage["name"]: stage["seconds"] for stage in document["stages"]}
    return {
        "data_s": seconds["data"] + seconds["check"],
        "train_s": seconds["train"],
        "prune_s": seconds["prune"],
        "finetune_s": seconds["finetune"],
        "total_s": end - begin,
        "baseline": document["model"]["baseline"]["accuracy"],
        "final": document["model"]["final"]["accuracy"],
        "flops": document["model"]["final"]["flops"],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--skip-plain", action="store_true")
    parser.add_argument("--seed", type=int, default=123)
    arguments = parser.parse_args()
    results = {"toolkit": toolkit(arguments.folder, arguments.seed)}
    if not arguments.skip_plain:
        results["plain"] = plain(arguments.folder, arguments.seed)
        results["ratio"] = {key: results["toolkit"][key] / results["plain"][key] for key in ("total_s", "prune_s")}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

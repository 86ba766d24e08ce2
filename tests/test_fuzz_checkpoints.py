"""Check that damaged checkpoints are either refused with an error that names the file, or loaded whole and unaltered.

FUZZ_EXAMPLES=10000 sets the number of attempts, which is lower by default.
"""

import os
import random

import torch
from mutating import mutated
from reading_runs import assert_equal_state
from writing_runs import content

from sasa_train.runs.checkpoint import CheckpointError, Checkpoints, load_checkpoint, manifest_of

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "400"))


def test_a_mutated_checkpoint_is_refused_or_loaded_whole(tmp_path):
    """Half of the checkpoints have a manifest; the others have none, like a single file received from elsewhere."""
    rng, path = random.Random(0), tmp_path / "last.pt"
    original = content(7) | {"ema": {"weight": torch.arange(50.0)}, "optimizer": {"state": {0: {"step": 3}}}}
    Checkpoints(tmp_path, 0).save(original, is_best=False)
    data, manifest = path.read_bytes(), manifest_of(path).read_bytes()
    original = load_checkpoint(path)
    refused = {True: 0, False: 0}
    for number in range(NUM_EXAMPLES):
        has_manifest = number % 2 == 0
        mutant = mutated(data, rng, [data])
        path.write_bytes(mutant)
        if has_manifest:
            manifest_of(path).write_bytes(manifest if number % 8 else mutated(manifest, rng, [manifest]))
        else:
            manifest_of(path).unlink(missing_ok=True)
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            refused[has_manifest] += 1
            continue
        assert mutant == data or not has_manifest, "the manifest's hash is not this file's"
        assert_equal_state(found, original)
    print(f"refused: {refused[True]} of {NUM_EXAMPLES // 2} with a manifest, {refused[False]} without")
    assert refused[False] > NUM_EXAMPLES / 4


WRONG = (None, 3, -1, 1.5, "text", True, [], {}, [None], {"weight": 1}, torch.zeros(2), 10**30)


def test_a_strangers_checkpoint_with_other_parts_is_refused_or_has_all_of_them(tmp_path):
    """Parts are replaced or removed at random; whatever is loaded must have the types that other code expects."""
    rng, num_refused = random.Random(0), 0
    for number in range(max(100, NUM_EXAMPLES // 50)):
        whole = content(7) | {"format_version": 2}
        for key in rng.sample(sorted(whole), rng.choice((1, 1, 2))):
            if rng.random() < 0.2:
                del whole[key]
            else:
                whole[key] = rng.choice(WRONG)
        path = tmp_path / f"{number % 4}.pt"
        torch.save(whole, path)
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            num_refused += 1
            continue
        assert type(found["step"]) is int and isinstance(found["config"], str) and isinstance(found["model"], dict)
    assert num_refused > 30

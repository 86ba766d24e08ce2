"""Write sasa_train/data/digits.npz from scikit-learn's copy of the UCI handwritten digits (needs scikit-learn).

usage: python scripts/build_digits.py [DEST]
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def main() -> None:
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "sasa_train/data/digits.npz"
    digits = load_digits()
    np.savez_compressed(dest, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{dest}: {digits.images.shape} images of 0..16, {dest.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

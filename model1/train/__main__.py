"""`python -m model1.train`: the training verb without the rest of the command line."""

import argparse
from pathlib import Path

from model1.train.loop import train
from model1.train.presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model1.train", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="nano")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="default: ./model1-PRESET")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    args = parser.parse_args()
    train(
        args.preset,
        args.out or Path(f"model1-{args.preset}"),
        device=args.device,
        steps=args.steps,
        resume=args.resume,
    )


if __name__ == "__main__":
    main()

"""Measures how many captioned clips the lab's simulator makes per minute on one core."""

from __future__ import annotations

import statistics
import time

from videorepa.world.render import make_clip

CLIPS, REPEATS = 300, 5


def main() -> None:
    make_clip(0, 0)
    rates = []
    for repeat in range(REPEATS):
        start = time.perf_counter()
        for index in range(CLIPS):
            make_clip(repeat, index)
        rates.append(60 * CLIPS / (time.perf_counter() - start))
    print(
        f"{statistics.median(rates):,.0f} clips a minute on one core "
        f"({min(rates):,.0f} to {max(rates):,.0f} over {REPEATS} repeats of {CLIPS}); "
        f"{statistics.median(rates) / 5000:.1f} times the 5,000 that streaming needs"
    )


if __name__ == "__main__":
    main()

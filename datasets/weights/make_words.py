"""Write a vocabulary as JSON: make_words.py FILE. Made-up words, the same in each build."""

from __future__ import annotations

import json
import random
import sys

_WORDS = 50_000
_SYLLABLES = ("ba", "co", "du", "fe", "gi", "ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "ve", "za")


def main() -> None:
    rng = random.Random(20)
    words = {number: "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 5))) for number in range(_WORDS)}
    with open(sys.argv[1], "w") as file:
        json.dump(words, file)


if __name__ == "__main__":
    main()

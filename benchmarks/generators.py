"""The earlier name of benchmarks.speed.generators, kept for those who call it by that."""

from benchmarks.speed.generators import main

if __name__ == "__main__":
    main()

"""The earlier name of benchmarks.speed.generators, kept for those who still use it."""

from benchmarks.speed.generators import main

if __name__ == "__main__":
    main()

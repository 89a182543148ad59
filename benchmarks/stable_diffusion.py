"""The earlier name of benchmarks.speed.stable_diffusion, kept for those who still use it."""

from benchmarks.speed.stable_diffusion import main

if __name__ == "__main__":
    main()

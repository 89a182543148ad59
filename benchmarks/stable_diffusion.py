"""The earlier name of benchmarks.speed.stable_diffusion, kept for those who call it by that."""

from benchmarks.speed.stable_diffusion import main

if __name__ == "__main__":
    main()

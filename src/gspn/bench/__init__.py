"""`gspn bench`: what the layer and the models cost on the user's own machine, against their usual alternatives.

    contenders   the modules that gspn is compared with
    measuring    clocks, rounds in which contenders take turns, peak memory, what a result file says of the machine
    suites       what is measured and what fits into the minutes: layer, growth, models
    figures      the pictures

The benchmarks of the repository import contenders and measuring from here.
"""

"""What the mixer is worth: one small backbone, many mixers, three tasks, all on CIFAR-10. study.py is the command."""

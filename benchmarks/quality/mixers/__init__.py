"""How much does the mixer matter? One small backbone, many mixers, three tasks on CIFAR-10. study.py is the command."""

"""How much does the mixer matter? One small backbone, many mixers, four tasks on CIFAR-10. study.py is the command."""

"""What test_distributed.py runs by torchrun: two steps of DDP on maps of one pixel, where nothing reads the weights of
the scan. It prints the largest gradient of their projection."""

import torch
from torch.nn.parallel import DistributedDataParallel

import gspn


def main():
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(gspn.GSPN2d(4, backend="reference"))
    for _ in range(2):  # the second forward pass tells where a gradient of the first is missing
        model(torch.randn(2, 4, 1, 1)).square().sum().backward()
    if torch.distributed.get_rank() == 0:
        print(model.module.weight_proj.grad.abs().max().item())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

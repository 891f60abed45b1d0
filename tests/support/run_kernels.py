"""Runs every kernel on small inputs on a GPU, for compute-sanitizer to watch."""

import torch
from compile_kernels import every_launch, every_predictor

if __name__ == "__main__":
    torch.set_default_device("cuda")
    for dtype, wide in ((torch.bfloat16, torch.bfloat16), (torch.int8, torch.float16)):
        for B in (1, 3):
            every_launch(dtype, wide, B)
            for D in (256, 20):
                every_predictor(dtype, wide, B, D=D)
    torch.cuda.synchronize()
    print("ran every kernel")

"""A machine that executes PTX on the CPU and checks what GPU kernels do: order of accesses, bounds, asynchronous copies and products."""

"""The engine on NVIDIA GPUs: Triton kernels, fused layers, CUDA graphs. Imported only when a model is on one."""

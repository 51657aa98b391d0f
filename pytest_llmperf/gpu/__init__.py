"""The GPUs of this machine, as NVML tells of them."""

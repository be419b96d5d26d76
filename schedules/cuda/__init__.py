"""TensorIR schedules for NVIDIA GPUs."""

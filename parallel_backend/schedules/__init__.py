"""Schedules as pure functions of numbers and tensors: no process, no device, no ComfyUI."""

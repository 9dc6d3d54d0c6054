"""The backend's one door to ComfyUI's own code: loading a denoiser, in whole or in part, and calling it."""

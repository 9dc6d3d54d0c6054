"""Leapfrog: one generation, several GPUs. Imported by ComfyUI; a test runner that imports it bare gets nothing."""

if __package__:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

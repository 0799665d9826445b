"""What ComfyUI loads: the entry point of the node pack."""

from .nodes import comfy_entrypoint as comfy_entrypoint
